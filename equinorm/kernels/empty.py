"""The kernels of a tensor without elements, as functions on tensors.

An empty batch takes the same path as a full one, so that a process without data exchanges as many messages as the others, in every pass.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor


def moments(x: Tensor, per: Literal["sample", "batch"]) -> tuple[Tensor, Tensor]:
    """Mean and variance 0, each (N, C) or, over the batch, (1, C)."""
    shape = (x.shape[0] if per == "sample" else 1, x.shape[1])
    return torch.zeros(shape, dtype=torch.float64, device=x.device), torch.zeros(shape, dtype=torch.float64, device=x.device)


INTERLEAVED = True  # as of the CPU


def fused(_: object) -> None:
    """Nothing follows nothing."""


def affine(x: Tensor, *_: Tensor) -> Tensor:
    """Nothing, in the shape of x."""
    return torch.empty_like(x)


def reduce(_: Tensor, x: Tensor, __: Tensor, per: Literal["sample", "batch"]) -> tuple[Tensor, Tensor]:
    """Two sums over nothing: 0, each (N, C) or, over the batch, (1, C)."""
    return moments(x, per)


def backward(_: Tensor, x: Tensor, *__: Tensor) -> Tensor:
    """Nothing, in the shape of x."""
    return torch.empty_like(x)


def row_forward(x: Tensor, *_: Tensor | None, rows: int, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing, in the shape of x; mean and rstd of no rows."""
    mean, rstd = torch.zeros(2, rows, dtype=torch.float64, device=x.device)
    return torch.empty_like(x), mean, rstd


def row_backward(
    _: Tensor, x: Tensor, *__: Tensor | None, wanted: tuple[bool, bool, bool], groups: int, k: int, **___: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Nothing for x; gradient 0 for the parameters, each (groups * k,)."""
    dweight, dbias = (torch.zeros(groups * k, dtype=torch.float64, device=x.device) if need else None for need in wanted[1:])
    return torch.empty_like(x), dweight, dbias
