"""What conditional norms share: checks of the condition, a linear map of it, and rows of a table that it chooses or blends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.kernels.reference import wide


class Projection(nn.Linear):
    """A linear map of a condition, computed in float32 at least, inside autocast too.

    Its outputs are scales and shifts of whole channels: rounded to a half type, they would be coarser than what they are applied to (beside
    1, bfloat16 does not see a scale of 1e-3), and the map is small. Its owner initializes it.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None)

    def forward(self, condition: Tensor) -> Tensor:
        with torch.autocast(condition.device.type, enabled=False):
            condition, weight = wide(condition), wide(self.weight)
            dtype = torch.promote_types(condition.dtype, weight.dtype)
            return F.linear(condition.to(dtype), weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def check_condition(module: nn.Module, x: Tensor, condition: Tensor, width: int) -> None:
    """Check a condition of shape (N | 1, width) for an input of N samples.

    Raises:
        TypeError: not floating point.
        ValueError: another shape.
    """
    name = type(module).__name__
    if not condition.is_floating_point():
        raise TypeError(f"{name}: the condition must be floating point, got {condition.dtype}; embed class numbers first, or use a table")
    if condition.ndim != 2 or condition.shape[1] != width or condition.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"{name}: the condition must have shape ({x.shape[0]}, {width}), one row per sample, or (1, {width}); "
            f"got {tuple(condition.shape)}"
        )


def check_choice(module: nn.Module, x: Tensor, choice: Tensor, rows: int) -> None:
    """Check class numbers (N,) or shares (N | 1, rows) or (rows,) for an input of N samples and a table of ``rows`` rows.

    Raises:
        TypeError: neither integers nor floating point.
        ValueError: another shape, or a class number outside of the table (found on the CPU; other devices report it in their own way).
    """
    name, shape, n = type(module).__name__, tuple(choice.shape), x.shape[0]
    if choice.is_floating_point():
        if choice.ndim not in (1, 2) or choice.shape[-1] != rows or (choice.ndim == 2 and choice.shape[0] not in (1, n)):
            raise ValueError(f"{name}: shares must have shape ({n}, {rows}) or ({rows},), one number per class, got {shape}")
        return
    if choice.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: classes must be int64 or int32 numbers, or floating-point shares of each class, got {choice.dtype}")
    if shape != (n,):
        raise ValueError(f"{name}: class numbers must have shape ({n},), one per sample, got {shape}")
    watched = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if type(choice) is Tensor and choice.device.type == "cpu" and not watched and n:
        low, high = choice.aminmax()
        if low < 0 or high >= rows:
            raise ValueError(f"{name}: class numbers must be in [0, {rows}), got {int(low if low < 0 else high)}")


def chosen(table: Tensor, choice: Tensor) -> Tensor:
    """Rows of ``table`` (K, C) by class numbers (N,), or their blend by shares (N, K) or (K,): (N | 1, C) in float32 at least."""
    if not choice.is_floating_point():
        return wide(F.embedding(choice, table))
    with torch.autocast(table.device.type, enabled=False):
        table, shares = wide(table), torch.atleast_2d(wide(choice))
        dtype = torch.promote_types(table.dtype, shares.dtype)
        return shares.to(dtype) @ table.to(dtype)
