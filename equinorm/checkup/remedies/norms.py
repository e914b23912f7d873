"""Remedies that change norms, and what stands in front of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equinorm import surgery
from equinorm.checkup.numbers import counted
from equinorm.checkup.remedies.remedy import Remedy, kinds
from equinorm.checkup.trial import Case
from equinorm.probe.findings import Finding
from equinorm.probe.record import Report


def another_norm(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """Group norm where the batch is too small or estimates do not fit."""
    calls = {norm.name: report.calls[norm.call] for norm in report.norms if "N" in norm.pools}
    flat = {name for name, call in calls.items() if len(call.shape) == 2}
    if report.failure is not None and report.failure.layer_type == "BatchNorm1d":
        flat.add(report.failure.layer)
    if names := {*calls, *flat}:
        yield Remedy(
            "group norm instead" if names != flat else "layer norm instead",
            f"Swap {counted(len(names), 'norm')} that need the batch for group norm; weight and bias are carried over.",
            kinds(found),
            partial(_swap, flat=frozenset(flat), spatial=frozenset(names - flat)),
            "The model computes something else; train it on for a while.",
            1,
        )


def _swap(case: Case, flat: frozenset[str], spatial: frozenset[str]) -> None:
    # Stale estimates say nothing about the output that the new norms should come near; then they are fitted to this batch.
    stale = any(finding.kind == "running_drift" for finding in case.report.findings)
    groups: tuple[tuple[frozenset[str], dict[str, Any]], ...] = ((spatial, {}), (flat, {"num_groups": 1}))  # a group must hold some values
    for names, options in groups:
        if names:
            surgery.swap(
                case.model,
                "group",
                where=lambda name, _, names=names: name in names,
                calibrate=[case.source.batch] if stale else None,
                forward=case.run,
                optimizer=case.optimizer,
                **options,
            )


def recalibration(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """Running statistics measured anew."""
    if any(norm.tracks for norm in report.norms):
        yield Remedy(
            "recalibrate",
            "Measure the running statistics anew, here on this batch; for use take surgery.recalibrate with training data.",
            kinds(found),
            _recalibrate,
        )


def _recalibrate(case: Case) -> None:
    surgery.recalibrate(case.model, [case.source.batch], forward=case.run)


def one_norm(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """An identity in the place of a norm behind a norm."""
    for finding in found:
        yield Remedy(
            f"remove {finding.layers[0]!r}",
            f"Put an identity in the place of {finding.layers[0]!r}, which normalizes what {finding.layers[1]!r} has normalized.",
            kinds([finding]),
            partial(_remove, name=finding.layers[0]),
            "Its affine map is lost.",
            1,
        )


def _remove(case: Case, name: str) -> None:
    for parameter in case.model.get_submodule(name).parameters():
        case.forget(parameter)
    case.replace(name, nn.Identity())


def no_bias(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """No biases in front of norms."""
    names = list(dict.fromkeys(layer for finding in found for layer in finding.layers))
    yield Remedy(
        "remove biases in front of norms",
        f"Remove the bias of {counted(len(names), 'layer')} in front of norms; running means move by it, so the output stays.",
        kinds(found),
        partial(_drop_biases, names=names),
    )


@torch.no_grad()
def _drop_biases(case: Case, names: Sequence[str]) -> None:
    readers = {index: norm.name for norm in case.report.norms for index in case.report.calls[norm.call].inputs}
    for name in names:
        layer = case.model.get_submodule(name)
        bias = layer.bias
        assert isinstance(bias, Tensor)
        call = case.report.call(name)
        norm = case.module(readers[call.index]) if call.index in readers else None
        running = getattr(norm, "running_mean", None)
        if isinstance(running, Tensor):
            running.sub_(bias)
        case.forget(bias)
        layer.bias = None  # type: ignore[assignment]


def usual_momentum(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """A momentum that follows neither the last batch alone nor nothing."""
    names = list(dict.fromkeys(layer for finding in found for layer in finding.layers))
    yield Remedy(
        "momentum 0.1", f"Set the momentum of {counted(len(names), 'norm')} to 0.1.", kinds(found), partial(_momentum, names=names)
    )


def _momentum(case: Case, names: Sequence[str]) -> None:
    for name in names:
        case.model.get_submodule(name).momentum = 0.1  # type: ignore[assignment]
