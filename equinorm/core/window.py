"""Sums over a sliding window along one dimension: the neighbourhood that the local norms look at."""

from __future__ import annotations

from math import exp
from typing import Any

import torch
from torch import Tensor


def box(size: int) -> tuple[float, ...]:
    """``size`` equal taps of sum 1."""
    return (1 / size,) * size


def gaussian(size: int, sigma: float) -> tuple[float, ...]:
    """``size`` taps of a Gaussian bell of width ``sigma``, centred, of sum 1."""
    bell = [exp(-0.5 * ((k - (size - 1) / 2) / sigma) ** 2) for k in range(size)]
    return tuple(tap / sum(bell) for tap in bell)


def window_sum(x: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
    """``y[i] = sum_k taps[k] * x[i + k - n // 2]`` along ``dim``, with zeros beyond the ends; n = ``len(taps)``.

    Windows over several dimensions are products of such sums. The adjoint of the sum is the mirrored sum, so that derivatives of every
    order cost what the sum costs, and nothing is saved. (A convolution would run in reduced precision wherever that is allowed for
    convolutions, which on CUDA it is unless switched off; and an unrolled sum would fill one zero tensor per tap in its backward.)

    Args:
        x: floating, any shape and layout; the result has its dtype.
        taps: at least one.
        dim: the dimension to slide along.
    """
    dim, before = dim % x.ndim, len(taps) // 2
    if torch.compiler.is_compiling():  # the compiler fuses the unrolled sum and its derivative
        return _unrolled(x, taps, dim, before)
    return _WindowSum.apply(x, taps, dim, before)


def mirrored_sum(x: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
    """The adjoint of :func:`window_sum`: what each position gets back from the windows that it lies in. Without gradient of its own."""
    return _unrolled(x, taps[::-1], dim % x.ndim, len(taps) - 1 - len(taps) // 2)


def _unrolled(x: Tensor, taps: tuple[float, ...], dim: int, before: int) -> Tensor:
    """The definition; ``before`` of the taps lie before the position itself."""
    length = x.shape[dim]
    y = x * taps[before]
    for k, tap in enumerate(taps):
        offset = k - before
        reach = length - abs(offset)
        if offset and reach > 0:
            y.narrow(dim, max(0, -offset), reach).add_(x.narrow(dim, max(0, offset), reach), alpha=tap)
    return y


class _WindowSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, taps: tuple[float, ...], dim: int, before: int) -> Tensor:
        return _unrolled(x, taps, dim, before)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.taps, ctx.dim, ctx.before = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _WindowSum.apply(dy, ctx.taps[::-1], ctx.dim, len(ctx.taps) - 1 - ctx.before), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _WindowSum.apply(dx, ctx.taps, ctx.dim, ctx.before)
