"""What remedies read off the record of calls."""

from __future__ import annotations

from torch import nn

from equinorm.kernels.activations import TABLE, Activation, find, of_module
from equinorm.probe.record import Call, Report


def first_calls(report: Report) -> list[Call]:
    """The first call of every linear layer and convolution."""
    return [call for call in report.calls if call.role == "linear" and call.kind == "module" and call.number == 0]


def activation_before(report: Report, call: Call, model: nn.Module | None) -> Activation:
    """The activation whose output a layer reads, seen through dropout, pooling and changes of shape; the identity if there is none."""
    while call.inputs:
        call = report.calls[max(call.inputs)]
        if call.role == "activation":
            return _activation(call, model)
        if call.role not in ("dropout", "pool", "shape"):
            break
    return find("identity")


def _activation(call: Call, model: nn.Module | None) -> Activation:
    if call.kind == "function":
        name = call.type.rstrip("_")
        return find(name if name in TABLE else "identity")
    module = model.get_submodule(call.name) if model is not None else None
    if module is not None:
        return of_module(module) or find("identity")
    return find(call.type.lower()) if call.type.lower() in TABLE else find("identity")


def weighted(report: Report, index: int) -> Call | None:
    """The last layer with weights at the end of a branch."""
    while index >= 0:
        call = report.calls[index]
        if call.kind == "module" and call.role in ("linear", "norm"):
            return call
        inside = [c for c in report.calls[:index] if c.leaf and c.name.startswith(f"{call.name}.") and c.role in ("linear", "norm")]
        if inside:
            return inside[-1]
        index = max(call.inputs, default=-1)
    return None
