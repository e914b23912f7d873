"""The first beat alone: the moments of a tensor that something else than its own norm needs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from equinorm.core.moments import Moments
from equinorm.kernels import Impl, dense, pick, reference

Per = Literal["sample", "batch"]


def measure(x: Tensor, *, per: Per = "sample", mask: Tensor | None = None, impl: Impl = "auto") -> Moments:
    """The moments of ``x``, differentiable to any order: one read forward, one read and one write backward.

    They are what a norm of *another* tensor takes as an argument of its rule (the style of adaptive instance norm, a reference batch). The
    moments of the tensor that is being normalized come from :func:`~equinorm.core.channel.channel_norm`, without a second read.

    Args:
        x: (N, C, *S), floating, any memory layout.
        per: "sample" for (N, C), "batch" for (1, C).
        mask: boolean (N, 1, *S), True where data is.
        impl: "plain" rules the kernels out for this call.
    """
    kernels = pick(x, impl) if mask is None else None
    if kernels is None:
        return defined(x, per, mask)
    x = dense(x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return fused(kernels, x, per)
    mean, var = _Measured.apply(kernels, per, x)
    return Moments(mean, var, values(x, mean))


def defined(x: Tensor, per: Per, mask: Tensor | None) -> Moments:
    """The definition."""
    spatial = tuple(range(2, x.ndim))
    mean, var, count = reference.moments(x, spatial if per == "sample" else (0, *spatial), mask)
    shape = mean.shape[:2]
    return Moments(mean.reshape(shape), var.reshape(shape), count.reshape(count.shape[:2]) if isinstance(count, Tensor) else count)


def fused(kernels: Any, x: Tensor, per: Per) -> Moments:
    """By the kernels, without gradient; ``x`` is dense."""
    mean, var = kernels.moments(x, per)
    return Moments(mean, var, values(x, mean))


def values(x: Tensor, mean: Tensor) -> int:
    """How many values of ``x`` stand behind each entry of ``mean``; 0 for an empty batch."""
    return x.numel() // max(mean.numel(), 1)


class _Measured(torch.autograd.Function):
    """dx = g_mean / n + (2 g_var / n) (x - mean); the definition is recorded where the gradient will be differentiated again."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, per: Per, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = kernels.moments(x, per)
        ctx.kernels, ctx.per = kernels, per
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, to_mean: Tensor, to_var: Tensor) -> tuple[None, None, Tensor]:
        x, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            moments = defined(x, ctx.per, None)
            (dx,) = torch.autograd.grad((moments.mean, moments.var), x, (to_mean, to_var), create_graph=True)
            return None, None, dx
        n = max(values(x, mean), 1)
        return None, None, ctx.kernels.affine(x, mean, to_var * (2 / n), to_mean / n)
