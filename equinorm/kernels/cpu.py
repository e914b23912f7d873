"""The CPU kernels, as functions on tensors. What each computes is defined in :mod:`equinorm.kernels.reference`.

Large tensors are (N, C, *S), dense, contiguous or channels_last; results have the dtype and layout of x. Small tensors are float64. All
arithmetic inside is in float64, rounded once when a result is stored, and every sum has a fixed order: the bits of a result depend neither
on the number of threads nor, for a result per sample, on the other samples. Callers ask :func:`available` first, and keep empty tensors
away.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from equinorm.kernels import build
from equinorm.kernels.activations import Activation

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The activations that the kernels apply with a map: their number there, and the argument that is the parameter.
_FUSED = {
    "relu": (1, ""),
    "leaky_relu": (2, "negative_slope"),
    "relu6": (3, ""),
    "elu": (4, "alpha"),
    "silu": (5, ""),
    "hardswish": (6, ""),
}
INTERLEAVED = True  # row_forward and row_backward take channels_last inputs
Per = Literal["sample", "batch"]
Fused = tuple[int, float]  # an activation's number and parameter
NOTHING: Fused = (0, 0.0)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_available: bool | None = None


def available() -> bool:
    """Whether the kernels are there. The first call may compile them; if that fails it warns, once, with the reason."""
    global _available
    if _available is None:
        reason = build.result().reason
        _available = not reason
        if reason:
            warnings.warn(
                f"equinorm runs without its CPU kernels, in plain PyTorch operations, because {reason}", RuntimeWarning, stacklevel=2
            )
    return _available


def info() -> dict[str, Any]:
    """What became of the kernels: ``state``, "ready" or "unavailable", and what :class:`equinorm.kernels.build.Build` holds."""
    found = build.result()
    return {"state": "unavailable" if found.reason else "ready", **vars(found)}


def layout(x: Tensor) -> Literal["ncs", "nsc"] | None:
    """The order of x in memory: "ncs" if contiguous, "nsc" if channels_last, None if neither."""
    if x.is_contiguous():
        return "ncs"
    if x.ndim in _CHANNELS_LAST:
        return "nsc" if x.is_contiguous(memory_format=_CHANNELS_LAST[x.ndim]) else None
    return "nsc" if x.ndim > 2 and x.movedim(1, -1).is_contiguous() else None


def moments(x: Tensor, per: Per) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each (N, C) or, over the batch, (1, C)."""
    n, c, s, channels_last = _shape(x)
    rows = n if per == "sample" else 1
    mean, var = torch.empty(rows, c, dtype=torch.float64), torch.empty(rows, c, dtype=torch.float64)
    torch.ops.equinorm.channel_moments.default(x, mean, var, n, c, s, channels_last)
    return mean, var


def fused(activation: Activation | None) -> Fused | None:
    """An activation as the kernels take it; None for none, and for one that they do not know.

    Raises:
        KeyError: the kernels know the activation, but not how to find its parameter.
    """
    if activation is None or activation.name not in _FUSED:
        return None
    number, argument = _FUSED[activation.name]
    return number, activation.function.keywords[argument] if argument and isinstance(activation.function, partial) else 0.0


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, then: Fused = NOTHING) -> Tensor:
    """``(x - center) * scale + shift``, with small tensors (N | 1, C | 1), and behind it the activation ``then``."""
    n, c, s, channels_last = _shape(x)
    y = torch.empty_like(x)
    torch.ops.equinorm.channel_affine.default(x, small(center, c), small(scale, c), small(shift, c), y, n, c, s, channels_last, *then)
    return y


def reduce(
    dy: Tensor, x: Tensor, center: Tensor, per: Per, before: tuple[Tensor, ...] = (), then: Fused = NOTHING
) -> tuple[Tensor, Tensor]:
    """Sums of ``dy`` and of ``dy * (x - center)``, each (N, C) or, over the batch, (1, C). ``dy`` has the dtype and layout of x.

    With an activation ``then``, ``dy`` is the gradient behind it, and ``before`` the center, scale and shift of the map that it follows.
    """
    n, c, s, channels_last = _shape(x)
    rows = n if per == "sample" else 1
    sum_dy, sum_dy_x = torch.empty(rows, c, dtype=torch.float64), torch.empty(rows, c, dtype=torch.float64)
    torch.ops.equinorm.channel_reduce.default(dy, x, small(center, c), sum_dy, sum_dy_x, n, c, s, channels_last, *_map(before, c), *then)
    return sum_dy, sum_dy_x


def backward(
    dy: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
    before: tuple[Tensor, ...] = (),
    then: Fused = NOTHING,
) -> Tensor:
    """``scale * dy + slope * (x - center) + offset``, with small tensors (N | 1, C | 1). ``dy`` has the dtype and layout of x.

    ``before`` and ``then`` are as in :func:`reduce`.
    """
    n, c, s, channels_last = _shape(x)
    dx = torch.empty_like(x)
    parts = small(center, c), small(scale, c), small(slope, c), small(offset, c)
    torch.ops.equinorm.channel_backward.default(dy, x, *parts, dx, n, c, s, channels_last, *_map(before, c), *then)
    return dx


def row_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    eps: float,
    centered: bool,
    then: Fused = NOTHING,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd * weight + bias`` for each of ``rows`` rows of ``k * s`` elements of the contiguous or channels_last x.

    Element i of row r has the parameter ``(r % groups) * k + i // s``. The first ``measured`` elements of a row enter its statistic; with
    ``centered=False`` the mean is taken as 0. An activation ``then`` may follow parameters of whole channels (s > 1), not of columns.
    In a channels_last x the rows are groups of channels of a sample, measured throughout.

    Returns:
        the output; mean and rstd, each (rows,).
    """
    y = torch.empty_like(x)
    mean, rstd = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.float64)
    weight, bias = _parameter(weight), _parameter(bias)
    torch.ops.equinorm.row_forward.default(
        x, weight, bias, y, mean, rstd, rows, groups, k, s, measured, eps, centered, *then, channels_last
    )
    return y, mean, rstd


def row_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    wanted: tuple[bool, bool, bool],
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    centered: bool,
    bias: Tensor | None = None,
    then: Fused = NOTHING,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`row_forward` to x, weight and bias.

    Those of the parameters are (groups * k,) in the weight's dtype, float64 without one, and None unless ``wanted``. With an activation
    ``then``, ``dy`` is the gradient behind it and ``bias`` that of the forward.
    """
    dx = torch.empty_like(x)
    weight = _parameter(weight)
    dtype = torch.float64 if weight is None else weight.dtype
    dweight = torch.empty(groups * k, dtype=dtype) if wanted[1] else None
    dbias = torch.empty(groups * k, dtype=dtype) if wanted[2] else None
    torch.ops.equinorm.row_backward.default(
        dy, x, weight, mean, rstd, dx, dweight, dbias, rows, groups, k, s, measured, centered, _parameter(bias), *then, channels_last
    )
    return dx, dweight, dbias


def running_update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, weight: float, bessel: float) -> None:
    """Move running estimates (C,), float32 or float64, by ``weight`` towards ``mean`` and ``var * bessel``; see RunningMoments.learn."""
    torch.ops.equinorm.running_update.default(running_mean, running_var, mean.contiguous(), var.contiguous(), weight, bessel)


def _shape(x: Tensor) -> tuple[int, int, int, bool]:
    n, c = x.shape[:2]
    return n, c, x.numel() // (n * c), not x.is_contiguous()


def small(t: Tensor, c: int) -> Tensor:
    """A small tensor (N | 1, C | 1) as the kernels of either device take it: float64, contiguous, (N | 1, C)."""
    if t.dtype is torch.float64 and t.shape[1] == c and t.is_contiguous():
        return t  # the usual case, at a tenth of the price of what follows
    return t.expand(t.shape[0], c).to(torch.float64).contiguous()


def _map(before: tuple[Tensor, ...], c: int) -> tuple[Tensor | None, ...]:
    return tuple(small(t, c) for t in before) if before else (None, None, None)


def _parameter(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()
