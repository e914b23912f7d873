"""Remedies that set or scale weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from equinorm import init
from equinorm.checkup.numbers import counted, short
from equinorm.checkup.remedies.reading import activation_before, first_calls, weighted
from equinorm.checkup.remedies.remedy import Remedy, kinds
from equinorm.checkup.trial import Case
from equinorm.init.layers import LAYERS, assign, blocks, identity_of
from equinorm.probe.findings import Finding
from equinorm.probe.record import Call, Report

NEW_WEIGHTS = "New weights: what the layers have learned is lost."


def gains(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """He's initialisation with the gain of the activation in front of each layer."""
    if layers := first_calls(report):
        used = sorted({activation_before(report, call, None).name for call in layers} - {"identity"})
        yield Remedy(
            "initialise by gain",
            f"Initialise {counted(len(layers), 'layer')} after He, each with the gain of the activation in front of it"
            f"{' (' + ', '.join(used) + ')' if used else ''}; biases 0.",
            kinds(found),
            _initialise,
            NEW_WEIGHTS,
            2,
        )


def _initialise(case: Case) -> None:
    done: set[int] = set()
    for call in first_calls(case.report):
        layer = case.module(call.name)
        if isinstance(layer, LAYERS) and identity_of(layer) not in done:
            done.add(identity_of(layer))
            init.he_(layer, activation_before(case.report, call, case.model).function)


def measured(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """LSUV, and scaling of the weights that are there."""
    if not first_calls(report):
        return
    yield Remedy(
        "LSUV",
        "Orthonormal weights, scaled until every layer's output on this batch has standard deviation 1.",
        kinds(found),
        _lsuv,
        NEW_WEIGHTS,
        2,
    )
    yield Remedy(
        "scale the weights",
        "Scale every layer's weight until its output on this batch has standard deviation 1; directions of weights stay.",
        kinds(found),
        partial(_lsuv, orthonormal=False),
        "The function changes where the scale of a layer matters.",
        1,
    )


def _lsuv(case: Case, orthonormal: bool = True) -> None:
    init.lsuv(case.model, case.source.batch, forward=case.run, orthonormal=orthonormal)


def rescale(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """One odd layer brought to the gain of its peers."""
    gains = {call.name: call.forward.rms / call.input.rms for call in first_calls(report) if call.forward and call.input and call.input.rms}
    odd = [finding.layers[0] for finding in found if gains.get(finding.layers[0])]
    middle = statistics.median(gains.values()) if gains else 0.0
    if odd and middle:
        factors = {name: middle / gains[name] for name in odd}
        named = ", ".join(f"{name!r} by {short(factor)}" for name, factor in factors.items())
        yield Remedy(
            "scale the odd layer",
            f"Multiply weight and bias of {named}, which gives the layer the gain of the others.",
            kinds(found),
            partial(_multiply, factors=factors),
            "The function changes where the scale of this layer matters.",
            1,
        )


@torch.no_grad()
def _multiply(case: Case, factors: Mapping[str, float]) -> None:
    for name, factor in factors.items():
        module = case.module(name)
        if isinstance(module, LAYERS):
            assign(module, blocks(module) * factor)
            if module.bias is not None:
                module.bias.mul_(factor)
        elif module is not None:
            for parameter in module.parameters(recurse=False):
                parameter.mul_(factor)


def branches(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """Residual branches or sums scaled."""
    sums = [call for call in report.calls if call.residual is not None]
    last = [weighted(report, call.residual.branch_from) for call in sums if call.residual]
    ends = list(dict.fromkeys(call.name for call in last if call is not None))
    zeros: dict[str, float] = dict.fromkeys(ends, 0.0)
    smaller: dict[str, float] = dict.fromkeys(ends, 1 / math.sqrt(max(len(sums), 1)))
    if len(sums) > 1 and ends:
        yield Remedy(
            "scale the residual branches",
            f"Multiply the last layer of {len(ends)} residual branches by 1/sqrt({len(sums)}), for {len(sums)} sums.",
            kinds(found),
            partial(_multiply, factors=smaller),
            "The branches say less at the start; they can grow in training.",
            1,
        )
        yield Remedy(
            "start the residual branches at 0",
            f"Set the last layer of {len(ends)} residual branches to 0: every block begins as its skip.",
            kinds(found),
            partial(_multiply, factors=zeros),
            "What these layers have learned is lost.",
            2,
        )
    if outer := _scalable(report, sums):
        yield Remedy(
            "scale the residual sums",
            f"Multiply the output of {len(outer)} residual blocks by 1/sqrt(2), which keeps the variance of a sum of two equal terms.",
            kinds(found),
            partial(_scale_outputs, names=outer),
            "Each of these blocks becomes a Sequential of itself and the factor, which changes names in the state dict.",
            1,
        )


def _scalable(report: Report, sums: Sequence[Call]) -> list[str]:
    """Modules whose output is one residual sum, or a positive multiple of one when the sum is: those may be scaled from outside."""
    inside: dict[str, list[Call]] = {}
    for call in sums:
        if call.residual:
            inside.setdefault(call.residual.module, []).append(call)
    found = []
    for module, held in inside.items():
        ends = [call for call in report.calls if call.name == module and call.kind == "module"]
        if not module or len(held) != 1 or len(ends) != 1:
            continue
        behind = report.calls[held[0].index + 1 : ends[0].index]
        if all(call.type.lower().rstrip("_") in ("relu", "leaky_relu", "leakyrelu", "identity", "dropout") for call in behind):
            found.append(module)
    return found


class Scale(nn.Module):
    """A fixed factor.

    Args:
        factor: multiplies.

    Shape: any.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:.6g}"


def _scale_outputs(case: Case, names: Sequence[str]) -> None:
    for name in names:
        case.replace(name, nn.Sequential(case.model.get_submodule(name), Scale(2**-0.5)))


def orthogonal_steps(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """Orthogonal matrices where a recurrent layer explodes or forgets."""
    names = [finding.layers[0] for finding in found if report.calls[finding.calls[0]].role == "recurrent"] if found else []
    if names:
        yield Remedy(
            "orthogonal recurrent weights",
            f"Orthogonal matrices for the recurrent weights of {', '.join(map(repr, names))}, gate by gate.",
            kinds(found),
            partial(_recurrent, names=names),
            NEW_WEIGHTS,
            2,
        )


@torch.no_grad()
def _recurrent(case: Case, names: Sequence[str]) -> None:
    for name in names:
        for own, parameter in case.model.get_submodule(name).named_parameters(recurse=False):
            if own.startswith("weight_hh"):
                for gate in parameter.split(parameter.shape[1]):
                    nn.init.orthogonal_(gate)


def biases(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
    """Biases in front of dead channels set back."""
    held = {p.module: p for p in report.parameters if p.role in ("bias", "affine bias") and p.rms > 0}
    names = [layer for layer in dict.fromkeys(layer for finding in found for layer in finding.layers) if layer in held]
    if names:
        yield Remedy(
            "biases back to 0",
            f"Set the bias of {counted(len(names), 'layer')} in front of dead channels to 0: {', '.join(map(repr, names[:4]))}"
            f"{' ...' if len(names) > 4 else ''}.",
            kinds(found),
            partial(_zero_biases, names=names),
            "What these biases have learned is lost.",
            1,
        )


@torch.no_grad()
def _zero_biases(case: Case, names: Sequence[str]) -> None:
    for name in names:
        bias = getattr(case.model.get_submodule(name), "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
