"""A model under treatment: what a remedy may change, on a copy or on the model itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.probe import calling
from equinorm.probe.record import Report
from equinorm.probe.run import probe
from equinorm.probe.source import Source
from equinorm.probe.tensors import mapped


@dataclass
class Case:
    """What a remedy works on.

    Attributes:
        report: the report that it is prescribed from.
        model, optimizer: to be changed in place.
        source: how the model was probed.
    """

    report: Report
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    source: Source

    @classmethod
    def of(cls, report: Report) -> Case:
        """The model itself.

        Raises:
            ValueError: the report was read from a file and holds no model.
        """
        if report.source is None:
            raise ValueError(
                "prescribe: the report holds no model; only a report that equinorm.probe returned in this process can be acted on"
            )
        return cls(report, report.source.model, report.source.optimizer, report.source)

    @classmethod
    def copied(cls, report: Report) -> Case:
        """A copy of the model and its optimizer, which hold the same parameters."""
        case = cls.of(report)
        model, optimizer = copy.deepcopy((case.model, case.optimizer))
        return cls(report, model, optimizer, case.source)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Call the model with a copy of the batch, as the probe did."""
        batch = mapped(batch, Tensor.clone)
        if self.source.forward is not None:
            return self.source.forward(model, batch)
        args, kwargs, _, _ = calling.split(model, batch, self.source.loss_fn)
        return model(*args, **kwargs)

    def probed(self) -> Report:
        """Probe what became of the model, as it was probed before."""
        source = self.source
        return probe(
            self.model, source.batch, source.loss_fn, optimizer=self.optimizer, forward=source.forward, thresholds=source.thresholds,
            weights=source.weights, gap=source.gap,
        )  # fmt: skip

    def module(self, name: str) -> nn.Module | None:
        """The module of that name, None if there is none."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of the one of that name."""
        old = self.model.get_submodule(name)
        for parent in list(self.model.modules()):
            for own, child in parent._modules.items():
                if child is old:
                    parent._modules[own] = module
        module.train(old.training)

    def forget(self, parameter: Tensor) -> None:
        """Take a parameter that is gone out of the optimizer."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not parameter]
            self.optimizer.state.pop(parameter, None)
