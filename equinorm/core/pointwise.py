"""The channel geometry for methods that bend: moments -> a rule on (N, C) tensors -> an elementwise function of x and what the rule made.

Where the last beat of a norm is no affine map (an activation that belongs to the method, a maximum, a bounded function), it is written as a
pair of plain PyTorch functions: its value and its derivative. They run over blocks of x that fit into the cache, so that what they make on
the way never reaches memory: the forward reads x once and writes y, the backward reads dy and x and writes dx, and only x is kept. As
everywhere, the plain path, on the whole tensor, is the definition, and is what gets recorded when a gradient will be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equinorm.core.channel import unhooked
from equinorm.core.measure import Per, defined, fused
from equinorm.core.moments import Moments
from equinorm.core.sync import Remembering, recalling
from equinorm.kernels import Impl, dense, like, pick
from equinorm.kernels.reference import small_dtype, wide

Rule = Callable[..., "tuple[Sequence[Tensor], Moments | None]"]

BLOCK = 1 << 17  # values: large enough to hide the price of a call, small enough that temporaries stay in the caches and off fresh pages


class Point(NamedTuple):
    """An elementwise function of x and of small tensors that broadcast to it, the parts, all of one floating type.

    Attributes:
        value: ``value(x, *parts)``, by differentiable operations.
        pull: ``pull(dy, x, *parts)`` returns dx, and for each part a tensor of the shape of x whose sum over the positions that share
            the part is the part's gradient.
    """

    value: Callable[..., Tensor]
    pull: Callable[..., tuple[Tensor, Sequence[Tensor]]]


def pointwise_norm(
    x: Tensor,
    rule: Rule,
    point: Point,
    *tensors: Tensor | None,
    per: Per | None = "sample",
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Moments | None]:
    """``point.value(x, *parts)`` with the parts that ``rule`` makes of the moments of ``x``.

    Args:
        x: (N, C, *S), floating, any memory layout; the output has its dtype and, where dense, its layout.
        rule: ``rule(moments, *tensors)`` returns the parts, each (N | 1, C | 1), and the moments that a running estimate may learn from, or
            None. It must be pure, as in :func:`~equinorm.core.channel.channel_norm`.
        point: the elementwise function; it gets float32 for half types.
        tensors: what the rule differentiates with respect to; None entries are handed through.
        per: how finely moments are measured; None when the rule needs none.
        mask: boolean (N, 1, *S), True where data is; the rest enters nothing, comes out as 0 and gets gradient 0.
        impl: "plain" rules the kernels and the blocks out for this call.

    Returns:
        the output, and the rule's moments without gradient.
    """
    kernels = pick(x, impl) if mask is None else None
    if kernels is None:
        y, seen = _plain(x, rule, point, tensors, per, mask)
        return y, seen and _without_gradient(seen)
    x = dense(x)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *tensors)):
        parts, seen = rule(None if per is None else fused(kernels, x, per), *tensors)
        return _evaluate(point, x, parts), seen
    box: list[Moments | None] = []
    return _Pointwise.apply(kernels, rule, point, per, box, x, *tensors), box[0]


def where_larger(grad: Tensor, excess: Tensor) -> Tensor:
    """What of ``grad`` a maximum passes to the one that exceeds the other by ``excess``, which is overwritten: half where they are equal.

    In arithmetic, since selecting by a boolean tensor costs ten times as much.
    """
    half = grad * 0.5
    return torch.addcmul(half, half, excess.sign_())


def _plain(
    x: Tensor, rule: Rule, point: Point, tensors: Sequence[Tensor | None], per: Per | None, mask: Tensor | None
) -> tuple[Tensor, Moments | None]:
    """The definition."""
    parts, seen = rule(None if per is None else defined(x, per, mask), *tensors)
    data = wide(x) if mask is None else torch.where(mask, wide(x), 0.0)
    y = point.value(data, *(part.to(data.dtype).reshape(*part.shape, *[1] * (x.ndim - 2)) for part in parts))
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype), seen


def _without_gradient(x: Moments) -> Moments:
    return Moments(x.mean.detach(), x.var.detach(), x.count)


class _Rows(NamedTuple):
    """How a dense tensor lies in memory: (A, S, K), the S positions of a row sharing the parts of its K channels."""

    a: int
    s: int
    k: int
    shared: bool  # one row of all samples, since no part knows samples

    @classmethod
    def of(cls, x: Tensor, parts: Sequence[Tensor]) -> _Rows:
        n, c = x.shape[:2]
        s = x.shape[2:].numel()
        if x.is_contiguous() and s > 1:
            return cls(n * c, s, 1, False)
        if all(part.shape[0] == 1 for part in parts):
            return cls(1, n * s, c, True)
        return cls(n, s, c, False)

    def view(self, x: Tensor) -> Tensor:
        """``x`` (N, C, *S) as (A, S, K), in place."""
        return (x if self.k == 1 or x.ndim == 2 else x.movedim(1, -1)).view(self.a, self.s, self.k)

    def spread(self, part: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A part (N | 1, C | 1) as (A, 1, K)."""
        n, c = x.shape[:2]
        return part.detach().to(dtype).expand(1 if self.shared else n, c).reshape(self.a, 1, self.k)

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and positions of blocks that fit into the cache; on other devices than the CPU the whole."""
        size = BLOCK if x.device.type == "cpu" else max(x.numel(), 1)
        row = self.s * self.k
        if row <= size:
            step = max(size // max(row, 1), 1)
            yield from ((slice(i, i + step), slice(None)) for i in range(0, self.a, step))
        else:
            step = max(size // self.k, 1)
            yield from ((slice(i, i + 1), slice(j, j + step)) for i in range(self.a) for j in range(0, self.s, step))


def _evaluate(point: Point, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    y, rows = torch.empty_like(x), _Rows.of(x, parts)
    source, target = rows.view(x.detach()), rows.view(y)
    spread = [rows.spread(part, x, wide(x[:0]).dtype) for part in parts]
    with torch.no_grad():
        for i, j in rows.blocks(x):
            target[i, j] = point.value(wide(source[i, j]), *(part[i] for part in spread))
    return y


def _pulled(point: Point, dy: Tensor, x: Tensor, parts: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """What flows to x directly, in the type of the arithmetic, and to each part; to those not needed, 0."""
    dtype, rows = wide(x[:0]).dtype, _Rows.of(x, parts)
    dx = torch.empty_like(x, dtype=dtype)
    source, incoming, target = rows.view(x), rows.view(dy), rows.view(dx)
    spread = [rows.spread(part, x, dtype) for part in parts]
    sums = [x.new_zeros(rows.a, 1, rows.k, dtype=small_dtype(x)) for _ in parts]
    for i, j in rows.blocks(x):
        target[i, j], to_parts = point.pull(wide(incoming[i, j]), wide(source[i, j]), *(part[i] for part in spread))
        for total, to_part, need in zip(sums, to_parts, needed, strict=True):
            if need:
                total[i] += to_part.sum(1, keepdim=True)
    return dx, [total.reshape(-1, x.shape[1]).sum_to_size(part.shape).to(part.dtype) for total, part in zip(sums, parts, strict=True)]


class _Pointwise(torch.autograd.Function):
    """One read for the moments, one read and write to apply; backward as the parts require."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, rule: Rule, point: Point, per: Per | None, box: list[Moments | None], x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[5:]
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, wanted[1:], strict=True)]
        moments = None if per is None else fused(kernels, x, per)
        if moments is not None and wanted[0]:
            moments.mean.requires_grad_()
            moments.var.requires_grad_()
        with torch.enable_grad(), unhooked(), Remembering() as ctx.exchanges:
            parts, seen = rule(moments, *leaves)
        box.append(seen and _without_gradient(seen))
        ctx.save_for_backward(x, *tensors)
        ctx.kernels, ctx.rule, ctx.point, ctx.per = kernels, rule, point, per
        ctx.small = moments, leaves, parts
        return _evaluate(point, x, parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():
            with recalling(ctx.exchanges):
                y, _ = _plain(x, ctx.rule, ctx.point, tensors, ctx.per, None)
            sources = [t for t, need in zip((x, *tensors), wanted, strict=True) if need and t is not None]
            found = iter(torch.autograd.grad(y, sources, dy, create_graph=True, allow_unused=True))
            return (None,) * 5 + tuple(next(found) if need else None for need in wanted)
        moments, leaves, parts = ctx.small
        direct, to_parts = _pulled(ctx.point, like(dy, x), x, [part.detach() for part in parts], [part.requires_grad for part in parts])
        sources = [t for t in (*(moments[:2] if moments and wanted[0] else ()), *leaves) if t is not None and t.requires_grad]
        grads: dict[int, Tensor | None] = {}
        results = [(part, to_part) for part, to_part in zip(parts, to_parts, strict=True) if part.requires_grad]
        if results and sources:
            received = torch.autograd.grad(
                [part for part, _ in results], sources, [to_part for _, to_part in results], retain_graph=True, allow_unused=True
            )
            grads = {id(source): grad for source, grad in zip(sources, received, strict=True)}
        dx = direct if wanted[0] else None
        if dx is not None and moments is not None:
            to_mean, to_var = (grads.get(id(part)) for part in moments[:2])
            if to_mean is not None or to_var is not None:
                count, zero = max(moments.count, 1), moments.mean.new_zeros(1, 1)
                slope, offset = zero if to_var is None else to_var * (2 / count), zero if to_mean is None else to_mean / count
                dx = ctx.kernels.backward(direct, wide(x), moments.mean.detach(), zero + 1, slope, offset)
        dx = None if dx is None else dx.to(x.dtype)
        return (None, None, None, None, None, dx, *(t if t is None else grads.get(id(t)) for t in leaves))
