"""The geometry of positions: one statistic over the channels, or each group of them, at every position of every sample.

In contiguous (N, C, *S) the channels of a position lie far apart, but those of neighbouring positions side by side: whole planes are added
up, in blocks of samples that fit into the cache. Where the channels of a position lie together it is a row: see
:mod:`equinorm.core.row`. Only x is kept for the backward,

    dx = (dy - mean(dy) - y mean(dy y)) / deviation,

with means over the group, the first one absent where nothing is centred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from equinorm.kernels import Impl, dense, like, pick
from equinorm.kernels.reference import wide

BLOCK = 1 << 19  # values: on one core no slower than less, and on several the price of sharing each operation shrinks


def position_norm(
    x: Tensor, definition: Callable[[Tensor], Tensor], groups: int, eps: float, *, centered: bool, impl: Impl = "auto"
) -> Tensor:
    """Divide by the root of the variance (or mean square) plus ``eps`` over the channels of each group at each position.

    Args:
        x: (N, C, *S), floating, any memory layout; the output has its dtype and, where dense, its layout.
        definition: the same in differentiable operations on the whole tensor; it runs wherever something looks at the operations, and is
            recorded where a gradient will be differentiated again.
        groups: of contiguous channels, divides C.
        eps: added inside the root.
        centered: subtract the mean, and divide by the deviation from it.
        impl: "plain" rules the blocks out for this call.
    """
    if pick(x, impl) is None or not x.numel():
        return definition(x)
    return _Position.apply(definition, groups, eps, centered, dense(x))


def _blocks(x: Tensor, groups: int, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of samples as (n, G, C / G, *S), in the type of the arithmetic but for the last, which is written to."""
    step = max(BLOCK // x[0].numel(), 1)
    for i in range(0, len(x), step):
        *read, written = (t[i : i + step].unflatten(1, (groups, -1)) for t in (x, *others))
        yield (*(wide(t) for t in read), written)


def _normalized(x: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """The block, normalized, and one over its deviation (n, G, 1, *S)."""
    if centered:  # twice: the mean is off by a rounding that far from zero is large
        x = x - x.mean(2, keepdim=True)
        x -= x.mean(2, keepdim=True)
    reciprocal = x.square().mean(2, keepdim=True).add_(eps).rsqrt_()
    return x * reciprocal, reciprocal


class _Position(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, definition: Callable[[Tensor], Tensor], groups: int, eps: float, centered: bool, x: Tensor) -> Tensor:
        ctx.definition, ctx.settings = definition, (groups, eps, centered)
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        for block, target in _blocks(x, groups, y):
            target.copy_(_normalized(block, eps, centered)[0])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (groups, eps, centered) = ctx.saved_tensors, ctx.settings
        if torch.is_grad_enabled():
            return None, None, None, None, *torch.autograd.grad(ctx.definition(x), x, dy, create_graph=True)
        dx = torch.empty_like(x)
        for block, from_y, target in _blocks(x, groups, like(dy, x), dx):
            y, reciprocal = _normalized(block, eps, centered)
            y *= (from_y * y).mean(2, keepdim=True)
            if centered:
                y += from_y.mean(2, keepdim=True)
            torch.sub(from_y, y, out=y)
            target.copy_(y.mul_(reciprocal))
        return None, None, None, None, dx
