"""The row geometry: one statistic per row, applied while the row is in cache.

A row is a contiguous stretch of the input that shares one statistic: the last dimensions of a token (layer and RMS norm), or the channels
and positions of one group of one sample (group and instance norm). The affine map is per column for the first kind and per channel for the
second, which the kernels treat alike: element i of row r has parameter (r mod groups) * k + i // s.

As in the channel geometry the plain path is the definition, and is what gets recorded when a gradient will be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equinorm.core.affine import Affine, normalize
from equinorm.core.channel import channel_norm
from equinorm.core.moments import Moments
from equinorm.kernels import Impl, dense, like, pick, reference
from equinorm.kernels.activations import Activation


def row_norm(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centered: bool = True,
    measured: int | None = None,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Normalize the last ``dims`` dimensions of ``x``: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: floating, any shape and layout.
        dims: how many trailing dimensions share a statistic.
        weight: of the shape of those dimensions, or None.
        bias: likewise.
        eps: added inside the root.
        centered: False keeps the mean and divides by the root mean square.
        measured: the statistic reads only the first ``measured`` elements of a row (with ``dims`` = 1).
        mask: boolean, broadcastable to ``x``; elements where it is False enter no statistic, come out as 0 and get gradient 0.
        impl: "plain" rules the kernels out for this call.
    """
    kernels = pick(x, impl) if mask is None else None
    if kernels is None:
        return _plain_row(x, dims, weight, bias, eps, centered, measured, mask)
    length = 1
    for size in x.shape[-dims:]:
        length *= size
    x = x.contiguous()
    shape = {
        "rows": x.numel() // length,
        "groups": 1,
        "k": length,
        "s": 1,
        "measured": measured or length,
        "centered": centered,
    }
    return _rows(kernels, shape, eps, lambda *t: _plain_row(t[0], dims, t[1], t[2], eps, centered, measured, None), x, weight, bias)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    impl: Impl = "auto",
    then: Activation | None = None,
) -> Tensor:
    """Normalize each of ``groups`` contiguous channel groups of each sample of ``x``: (N, C, *S), with ``weight`` and ``bias`` (C,).

    It is the channel geometry's rule :func:`over_groups`, which is local to a group: where a group is contiguous in memory, it is measured
    and normalized while in cache. ``groups = C`` is instance norm. The activation ``then`` follows before anything is stored.
    """

    def rule(moments: Moments, weight: Tensor | None, bias: Tensor | None) -> Affine:
        return normalize(moments.over_groups(groups), weight, bias, eps)

    kernels = pick(x, impl) if mask is None else None
    if kernels is None:
        return channel_norm(x, rule, weight, bias, mask=mask, impl=impl, then=then)[0]
    x, fused, s = dense(x), kernels.fused(then), x.shape[2:].numel()
    channels_last = not x.is_contiguous()
    if (channels_last and not kernels.INTERLEAVED) or (then and (not fused or s == 1)):
        return channel_norm(x, rule, weight, bias, impl=impl, then=then)[0]
    k = x.shape[1] // groups
    shape = {"rows": x.shape[0] * groups, "groups": groups, "k": k, "s": s, "measured": k * s, "centered": True}
    if channels_last:
        shape["channels_last"] = True
    if fused:
        shape["then"] = fused
    return _rows(kernels, shape, eps, lambda *t: channel_norm(t[0], rule, *t[1:], impl="plain", then=then)[0], x, weight, bias)


def _plain_row(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    measured: int | None,
    mask: Tensor | None,
) -> Tensor:
    """The definition."""
    over = tuple(range(-dims, 0))
    data = reference.wide(x)
    if mask is not None:
        data = torch.where(mask, data, data.new_zeros(()))
    if centered:
        mean, var, _ = reference.moments(data, over, mask)
        normalized = reference.affine(data, mean, (var + eps).rsqrt(), mean.new_zeros(()))
    else:
        head = data if measured is None else data[..., :measured]
        known = head.shape[-dims:].numel() if mask is None else mask.expand_as(data)[..., : head.shape[-1]].sum(over, True).clamp(min=1)
        normalized = data * (head.square().sum(over, keepdim=True) / known + eps).rsqrt()
    if weight is not None:
        normalized = normalized * weight
    if bias is not None:
        normalized = normalized + bias
    if mask is not None:
        normalized = torch.where(mask, normalized, normalized.new_zeros(()))
    return normalized.to(x.dtype)


def _rows(kernels: Any, shape: dict[str, Any], eps: float, plain: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Rows.apply(kernels, shape, eps, plain, x, weight, bias)
    return kernels.row_forward(x, weight, bias, eps=eps, **shape)[0]


class _Rows(torch.autograd.Function):
    """Statistics and normalization of a row while it is in cache; the backward likewise."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, shape: dict[str, Any], eps: float, plain: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y, mean, rstd = kernels.row_forward(x, weight, bias, eps=eps, **shape)
        ctx.kernels, ctx.shape, ctx.plain = kernels, shape, plain
        ctx.save_for_backward(x, weight, bias)
        ctx.small = mean, rstd
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            sources = [t for t, need in zip(inputs, wanted, strict=True) if need]
            grads = iter(torch.autograd.grad(ctx.plain(*inputs), sources, dy, create_graph=True))
            return (None, None, None, None, *(next(grads) if need else None for need in wanted))
        x, weight, bias = inputs
        activated = {"bias": bias} if "then" in ctx.shape else {}
        dx, dweight, dbias = ctx.kernels.row_backward(like(dy, x), x, weight, *ctx.small, wanted=wanted, **ctx.shape, **activated)
        return None, None, None, None, dx, _as(dweight, weight), _as(dbias, bias)


def _as(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if grad is None or parameter is None:
        return None
    grad = grad if grad.shape == parameter.shape else grad.reshape(parameter.shape)
    return grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype)
