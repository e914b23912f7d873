"""The definition of every kernel, in plain PyTorch.

These few functions are four things at once: what the fast kernels must equal, the path taken where no kernel fits (another device, a
padding mask, an empty batch, no compiler), the path that ``torch.compile`` and ``torch.func`` trace, and the path that is recorded when a
gradient will itself be differentiated. So they use only differentiable, out-of-place PyTorch operations.

Large tensors are read in float32 for half types and in their own type otherwise. Small tensors (one number per sample and channel) are
float64 wherever the device has it: free at that size, and it carries the part of the centre that float32 cannot hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """``x`` in the type that arithmetic on large tensors uses: float32 for half types, otherwise unchanged."""
    return x.float() if x.dtype in HALF else x


def small_dtype(x: Tensor) -> torch.dtype:
    """The type of small statistics on the device of ``x``: float64, or float32 where the device has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def moments(x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean and biased variance of ``x`` over ``dims`` (kept as size 1), and the number of values behind them.

    The input is centred twice. A float32 mean is off by half an ulp, which at mean/std = 1e4 is already 1e-3 standard deviations; the mean
    of what is left after subtracting it is that missing part, and costs no memory traffic when the data is in cache.

    Args:
        x: floating input of any shape.
        dims: dimensions to average over; may be empty, then every value is its own mean.
        mask: boolean, broadcastable to ``x``; where False the value does not count, whatever it holds.

    Returns:
        mean and variance in :func:`small_dtype`, with ``dims`` of size 1; the count as a number, or with a mask as a tensor.
        Over no values at all both moments are 0.
    """
    small, x = small_dtype(x), wide(x)
    if mask is None:
        count = 1
        for dim in dims:
            count *= x.shape[dim]
        if not dims:
            return x.to(small), x.new_zeros((), dtype=small).expand(x.shape), 1
        if count == 0:
            nothing = x.sum(dims, keepdim=True).to(small)
            return nothing, nothing, 0
        shift = x.detach().mean(dims, keepdim=True)
        centred = x - shift
        rest = centred.mean(dims, keepdim=True)
        var = (centred - rest).square().mean(dims, keepdim=True)
        return shift.to(small) + rest.to(small), var.to(small), count
    zero = x.new_zeros(())
    mask = mask.expand([x.shape[dim] if dim in {d % x.ndim for d in dims} else size for dim, size in enumerate(mask.shape)])
    counts = mask.to(x.dtype).sum(dims, keepdim=True) if dims else mask.to(x.dtype)
    divisor = counts.clamp(min=1)
    known = torch.where(mask, x, zero)
    if not dims:
        return known.to(small), torch.zeros_like(known, dtype=small), counts.to(small)
    shift = known.detach().sum(dims, keepdim=True) / divisor
    centred = torch.where(mask, known - shift, zero)
    rest = centred.sum(dims, keepdim=True) / divisor
    var = torch.where(mask, (centred - rest).square(), zero).sum(dims, keepdim=True) / divisor
    return shift.to(small) + rest.to(small), var.to(small), counts.to(small)


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``(x - center) * scale + shift`` in the type of ``x``, with small tensors that broadcast against it.

    The part of the centre that the type of ``x`` can hold is subtracted from ``x``, exactly where it matters; what it cannot hold is worth
    one constant per channel and joins the shift.
    """
    data = wide(x)
    held = center.detach().to(data.dtype)
    rest = shift + (held.to(center.dtype) - center) * scale
    return ((data - held) * scale.to(data.dtype) + rest.to(data.dtype)).to(x.dtype)
