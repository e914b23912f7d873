"""Norms whose backward is, by definition of the method, not the derivative of their forward.

Online norm, power norm and moving-average batch norm normalize by statistics of the past, and send back a gradient that a control process
has corrected: ``dx = scale * (g + along * y) + offset``, with small tensors ``along`` and ``offset`` that depend on the averages of g and
g y, now and in the past. So their traffic is that of any norm over channels: one pass reduces, one writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equinorm.core.measure import Per
from equinorm.kernels import Impl, dense, like, pick, reference

Control = Callable[[Tensor, Tensor, "int | Tensor"], tuple[Tensor, Tensor]]


def controlled_norm(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    control: Control,
    *,
    per: Per,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``y * weight + bias`` with ``y = (x - center) * scale``, and a backward pass of the method's own.

    The gradients of weight and bias are the derivatives. Nothing can be differentiated twice: a backward pass with ``create_graph=True``
    raises RuntimeError.

    Args:
        x: (N, C, *S), floating, any memory layout; the output has its dtype and, where dense, its layout.
        center: (N | 1, C), small, without gradient.
        scale: likewise.
        weight: (C,) or None.
        bias: likewise.
        control: called once per backward pass as ``control(mean_g, mean_gy, count)`` with the averages of ``g = dz * weight`` and of
            ``g * y`` and the number of values behind each; returns ``along`` and ``offset``, (N | 1, C). It may read and move state.
        per: how finely g is averaged: "sample" for (N, C), "batch" for (1, C).
        mask: boolean (N, 1, *S), True where data is; the rest enters no average, comes out as 0 and gets gradient 0.
        impl: "plain" rules the kernels out for this call.
    """
    kernels = pick(x, impl) if mask is None else None
    return _Controlled.apply(kernels, control, per, x if kernels is None else dense(x), center, scale, weight, bias, mask)


class _Controlled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        control: Control,
        per: Per,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.kernels, ctx.control, ctx.per = kernels, control, per
        ctx.save_for_backward(x, center, scale, weight, mask)
        scale = scale if weight is None else scale * weight
        shift = scale.new_zeros(1, 1) if bias is None else bias.to(scale.dtype).unsqueeze(0)
        if kernels is not None:
            return kernels.affine(x, center, scale, shift)
        center, scale, shift = (_spread(part, x) for part in (center, scale, shift))
        if mask is None:
            return reference.affine(x, center, scale, shift)
        zero = x.new_zeros(())
        return torch.where(mask, reference.affine(torch.where(mask, x, zero), center, scale, shift), zero)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "this norm's backward pass is by definition not the derivative of its forward pass, so it cannot be recorded to be "
                "differentiated again: call backward without create_graph=True, or use a norm with an exact derivative, or eval()"
            )
        x, center, scale, weight, mask = ctx.saved_tensors
        if ctx.kernels is not None:
            dz = like(dz, x)
            sum_dz, sum_dz_x = ctx.kernels.reduce(dz, x, center, ctx.per)
        else:
            sum_dz, sum_dz_x = _reduce(dz, x, center, ctx.per, mask)
        sum_dz_y = sum_dz_x * scale
        count = _count(x, ctx.per, mask)
        share = (1 if weight is None else weight.to(scale.dtype)) / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        along, offset = ctx.control(sum_dz * share, sum_dz_y * share, count)
        dx = None
        if ctx.needs_input_grad[3]:
            g = scale if weight is None else scale * weight
            slope, offset = along * scale.square(), offset.expand(center.shape)
            if ctx.kernels is not None:
                dx = ctx.kernels.backward(dz, x, center, g, slope, offset)
            else:
                dx = _write(dz, x, center, g, slope, offset, mask)
        dweight = sum_dz_y.sum(0) if ctx.needs_input_grad[6] else None
        dbias = sum_dz.sum(0) if ctx.needs_input_grad[7] else None
        return None, None, None, dx, None, None, dweight, dbias, None


def _spread(small: Tensor, x: Tensor) -> Tensor:
    return small.reshape(*small.shape, *[1] * (x.ndim - 2))


def _count(x: Tensor, per: Per, mask: Tensor | None) -> int | Tensor:
    """Values behind each average: a number, or with a mask (N | 1, 1)."""
    values = x.shape[2:].numel() * (x.shape[0] if per == "batch" else 1)
    if mask is None:
        return values
    dims = tuple(range(1 if per == "sample" else 0, x.ndim))
    return mask.sum(dims, dtype=reference.small_dtype(x)).reshape(-1, 1)


def _reduce(dz: Tensor, x: Tensor, center: Tensor, per: Per, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of ``dz`` and of ``dz * (x - center)``, the part of the centre that the type of x cannot hold included."""
    small, data, dz = reference.small_dtype(x), reference.wide(x), reference.wide(dz)
    if mask is not None:
        data, dz = torch.where(mask, data, 0.0), torch.where(mask, dz, 0.0)
    held = center.to(data.dtype)
    dims = tuple(range(2, x.ndim))
    parts = [part.sum(dims) if dims else part for part in (dz, dz * (data - _spread(held, x)))]
    sum_dz, sum_dz_x = (part.to(small) for part in parts)  # (N, C)
    sum_dz_x = sum_dz_x + (held.to(small) - center) * sum_dz
    return (sum_dz, sum_dz_x) if per == "sample" else (sum_dz.sum(0, keepdim=True), sum_dz_x.sum(0, keepdim=True))


def _write(dz: Tensor, x: Tensor, center: Tensor, scale: Tensor, slope: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """``scale * dz + slope * (x - center) + offset``."""
    data = reference.wide(x) if mask is None else torch.where(mask, reference.wide(x), 0.0)
    center, scale, slope, offset = (_spread(part, x) for part in (center, scale, slope, offset))
    dx = scale.to(data.dtype) * reference.wide(dz) + reference.affine(data, center, slope, offset)
    return (dx if mask is None else torch.where(mask, dx, 0.0)).to(x.dtype)
