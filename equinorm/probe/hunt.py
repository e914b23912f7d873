"""The function that made the first NaN or infinity, found by a second forward pass that looks at every result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from equinorm.probe.measure import measure
from equinorm.probe.state import Preserved
from equinorm.probe.tensors import real, tensors_in
from equinorm.probe.watch import Watch

# Masks hold minus infinity on purpose, and these functions make them or carry them.
MASKS = {
    "masked_fill",
    "masked_fill_",
    "where",
    "full",
    "full_like",
    "fill_",
    "triu",
    "triu_",
    "tril",
    "tril_",
    "new_full",
    "tensor",
    "clone",
}
MASKS |= {"empty", "empty_like", "new_empty", "expand", "repeat", "to", "float", "__setitem__", "__get__", "view", "reshape", "detach"}


@dataclass(frozen=True)
class Origin:
    """Where a value stopped being finite.

    Attributes:
        layer: dotted name of the innermost module that was running.
        function: the function's name.
        low, high: extremes of its arguments.
        nan, inf: how many values of the result are.
    """

    layer: str
    function: str
    low: float
    high: float
    nan: int
    inf: int


class _Found(BaseException):
    """Ends the search; not an Exception, so that no model catches it."""


class _Hunt(Watch):
    origin: Origin | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunction():
            given = [t for t in tensors_in((args, kwargs)) if real(t) and t.numel()]
            bounds = [measure(t)[0] for t in given]
        result = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name not in MASKS and all(stats.finite for stats in bounds):
            with torch._C.DisableTorchFunction():
                for tensor in tensors_in(result):
                    if real(tensor) and tensor.numel() and not (stats := measure(tensor)[0]).finite:
                        low = min((b.min for b in bounds), default=math.nan)
                        high = max((b.max for b in bounds), default=math.nan)
                        layer = self.frames[-1].name if self.frames else ""
                        self.origin = Origin(layer, name.strip("_"), low, high, stats.nan, stats.inf)
                        raise _Found
        return result


def first_function(model: nn.Module, preserved: Preserved, call: Callable[[Watch], tuple[Any, Any]]) -> Origin | None:
    """Run the model again until a function of finite arguments returns what is not finite; None if none is seen."""
    hunt = _Hunt(model, preserved, measured=False)
    try:
        hunt.attach()
        with torch.no_grad(), hunt:
            call(hunt)
    except _Found:
        pass
    finally:
        hunt.close()
    return hunt.origin
