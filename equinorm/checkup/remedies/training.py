"""Remedies for the input, the type of numbers and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from equinorm.checkup.numbers import short
from equinorm.checkup.remedies.remedy import Remedy, kinds
from equinorm.checkup.trial import Case
from equinorm.probe.findings import Finding
from equinorm.probe.record import Report
from equinorm.probe.tensors import mapped

STEP = 1e-3  # of a weight's size: what one step changes where training goes well, as a rule of thumb


def standard_input(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """A layer in front that standardizes the input."""
    name = found[0].layers[0]
    if name:
        yield Remedy(
            "standardize the input",
            f"Subtract the batch's mean per channel in front of {name!r}, divide by its standard deviation; for use take the data's.",
            kinds(found),
            partial(_standardize, name=name),
            f"{name!r} becomes a Sequential of the two, which changes names in the state dict; doing it to the data costs nothing.",
        )


class Standardize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    Args:
        mean, std: (C,).
        dim: the dimension of the channels.

    Shape: any with C channels in that dimension.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1 if d == self.dim % x.ndim else 1 for d in range(x.ndim)]
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def extra_repr(self) -> str:
        return f"{len(self.mean)}, dim={self.dim}"


def _standardize(case: Case, name: str) -> None:
    layer, seen = case.model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    training = [(module, module.training) for module in case.model.modules()]
    try:
        with torch.no_grad():
            case.run(case.model.eval(), case.source.batch)
    finally:
        handle.remove()
        for module, mode in training:
            module.training = mode
    x = seen[0]
    dim = 1 if x.ndim > 2 and not isinstance(layer, nn.Linear) else -1
    channels = x.movedim(dim, 0).flatten(1).double()  # (C, n)
    mean, std = channels.mean(1), channels.std(1, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, std.max() if std.max() > 0 else 1.0)  # a constant channel is only shifted
    case.replace(name, nn.Sequential(Standardize(mean.to(x.dtype), std.to(x.dtype), dim), layer))


def bfloat16(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """bfloat16 in the place of float16."""
    if "float16" in report.environment.get("dtypes", ()):
        yield Remedy(
            "bfloat16",
            "Convert the model from float16 to bfloat16, whose range is that of float32; its inputs must be given in bfloat16, too.",
            kinds(found),
            _to_bfloat16,
            "Three bits of precision are lost.",
        )


def _to_bfloat16(case: Case) -> None:
    case.model.bfloat16()
    batch = mapped(case.source.batch, lambda tensor: tensor.bfloat16() if tensor.dtype == torch.float16 else tensor)
    case.source = replace(case.source, batch=batch)


def decay_groups(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """No weight decay for biases and affine parameters."""
    if report.source is not None and report.source.optimizer is not None:
        yield Remedy(
            "no decay of biases and norms",
            "Split the optimizer's groups: biases and affine parameters of norms get weight_decay=0.",
            kinds(found),
            _split_groups,
        )


def _split_groups(case: Case) -> None:
    assert case.optimizer is not None
    free = {p.name for p in case.report.parameters if p.role in ("bias", "affine weight", "affine bias", "scalar")}
    names = {parameter: name for name, parameter in case.model.named_parameters()}
    for group in list(case.optimizer.param_groups):
        if group.get("weight_decay"):
            apart = [p for p in group["params"] if names.get(p) in free]
            if apart:
                group["params"] = [p for p in group["params"] if names.get(p) not in free]
                case.optimizer.param_groups.append({**group, "params": apart, "weight_decay": 0.0})


def learning_rate(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """A learning rate at which a step changes weights by the usual share."""
    if report.source is None or report.source.optimizer is None:
        return
    updates = {p.name: p.update for p in report.parameters if p.update and p.role == "weight"}
    names = {parameter: name for name, parameter in report.source.model.named_parameters()}
    factors = []
    for group in report.source.optimizer.param_groups:
        known = [updates[names[p]] for p in group["params"] if names.get(p) in updates]
        factors.append(STEP / max(known) if known else 1.0)
    if any(not 0.5 < factor < 2 for factor in factors):
        yield Remedy(
            "another learning rate",
            f"Multiply the learning rate by {', '.join(map(short, factors))}, so that no step changes a weight by more than {STEP:g}.",
            kinds(found),
            partial(_multiply_rates, factors=factors),
        )


def _multiply_rates(case: Case, factors: Sequence[float]) -> None:
    assert case.optimizer is not None
    for group, factor in zip(case.optimizer.param_groups, factors, strict=True):
        group["lr"] *= factor
