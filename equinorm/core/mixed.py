"""The geometry of a mixture: each position belongs to each of K components with a responsibility, and every component has its own map.

The three beats again: weighted moments per component and channel -> a rule on (K, C) tensors -> at each position the responsible mean of K
affine maps. Nothing of the size of the input exists per component. A position is centred on its own component *, the most responsible one,
which loses no digits however far apart the components are, and what the others add are differences of small tensors:

    sum_k p_k a_k (x - mu_k) = (sum_k p_k a_k) (x - mu_*) + sum_k p_k a_k (mu_* - mu_k)

and likewise for the sums over positions that moments and gradients are made of. So all of it is matrix products with thin matrices: the
responsibilities, K rows, and those of the positions of each component, K^2 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equinorm.core.channel import unhooked
from equinorm.core.moments import Moments
from equinorm.core.precision import without_autocast
from equinorm.core.sync import LEAST, Remembering, recalling
from equinorm.kernels import dense, like, pick
from equinorm.kernels.reference import affine, small_dtype

Rule = Callable[..., "tuple[tuple[Tensor, Tensor, Tensor], Moments | None]"]

BLOCK = 1 << 18  # values of a block of samples
FEW = 6  # products of matrices so thin, contiguous ones, are slower than their rows added in the cache


def mixed_norm(x: Tensor, p: Tensor, rule: Rule, *tensors: Tensor | None, measured: bool) -> tuple[Tensor, Moments | None]:
    """``sum_k p_k ((x - center_k) * scale_k + shift_k)`` with what ``rule`` makes of the moments under ``p``.

    Args:
        x: (N, C, *S), float32 or float64; 0 where nothing counts.
        p: (N, K, *S) of the same type, not negative; all 0 where nothing counts.
        rule: ``rule(moments, *tensors)`` returns center, scale and shift, each (K | 1, C), and the moments that a running estimate may
            learn from, or None. It gets :class:`Moments` of shape (K, C) with counts (K, 1), and must be pure, as in
            :func:`~equinorm.core.channel.channel_norm`.
        tensors: what the rule differentiates with respect to; None entries are handed through.
        measured: False gives the rule None in place of moments.

    Returns:
        the output, of the shape, type and layout of x; and the rule's moments without gradient.
    """
    if pick(x) is None or p.requires_grad:
        y, seen = _plain(x, p, rule, tensors, measured)
        return y, seen and _without_gradient(seen)
    box: list[Moments | None] = []
    return _Mixed.apply(rule, measured, box, dense(x), p, *tensors), box[0]


def defined(x: Tensor, p: Tensor) -> Moments:
    """The definition of the moments (K, C) of ``x`` under ``p``, centred twice as all moments are, with counts (K, 1)."""
    small, dims = small_dtype(x), (0, *range(2, x.ndim))
    counts, means, variances = [], [], []
    for k in range(p.shape[1]):
        p_k = p[:, k : k + 1]
        count = p_k.sum(dtype=small)
        share = p_k / count.clamp(min=LEAST).to(x.dtype)
        shift = (share.detach() * x.detach()).sum(dims, keepdim=True)
        centred = x - shift
        rest = (share * centred).sum(dims, keepdim=True)
        var = (share * (centred - rest).square()).sum(dims, keepdim=True)
        counts.append(count)
        means.append((shift.to(small) + rest.to(small)).flatten())
        variances.append(var.to(small).flatten())
    return Moments(torch.stack(means), torch.stack(variances), torch.stack(counts).unsqueeze(1))


def _plain(x: Tensor, p: Tensor, rule: Rule, tensors: Sequence[Tensor | None], measured: bool) -> tuple[Tensor, Moments | None]:
    """The definition."""
    parts, seen = rule(defined(x, p) if measured else None, *tensors)
    center, scale, shift = (part.expand(p.shape[1], -1).reshape(-1, x.shape[1], *[1] * (x.ndim - 2)) for part in parts)
    y = torch.zeros_like(x)
    for k in range(p.shape[1]):
        y = y + p[:, k : k + 1] * affine(x, center[k], scale[k], shift[k])
    return y, seen


def _without_gradient(x: Moments) -> Moments:
    return Moments(x.mean.detach(), x.var.detach(), x.count.detach() if isinstance(x.count, Tensor) else x.count)


class _Block(NamedTuple):
    """Samples whose data fits into the cache, as views in whatever layout the input has."""

    data: Tensor  # (n, C, S)
    p: Tensor  # (n, K, S)
    own: Tensor  # (n, K, S), 1 for the component that a position is centred on
    cross: Tensor  # (n, K K, S), own_j p_k

    def centred(self, held: Tensor) -> Tensor:
        """``x - held_*``, with ``held`` (K, C) in the type of the data."""
        return self.data - expected(held, self.own)

    def mix(self, out: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Write ``sum_k p_k ((x - center_k) * scale_k + shift_k)``, all (K, C)."""
        held = center.to(self.p.dtype)
        others = (held.to(center.dtype).unsqueeze(1) - center) * scale + shift  # (K, K, C)
        torch.bmm(others.flatten(0, 1).T.to(self.p.dtype).expand(len(self.p), -1, -1), self.cross, out=out)
        out.addcmul_(self.centred(held), expected(scale, self.p))


def _blocks(x: Tensor, p: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Blocks of ``x``, each with the same samples of ``others``, which are shaped like it."""
    data, p = columns(x), columns(p)
    views = [columns(t) for t in others]
    if not data.numel():
        return  # an empty batch takes part in every exchange all the same
    step = max(BLOCK // data[0].numel(), 1)
    for i in range(0, len(data), step):
        part = p[i : i + step]
        own = torch.zeros_like(part).scatter_(1, part.argmax(1, keepdim=True), 1.0)
        cross = (own.unsqueeze(2) * part.unsqueeze(1)).flatten(1, 2)
        yield (_Block(data[i : i + step], part, own, cross), *(t[i : i + step] for t in views))


def _sums(t: Tensor, by: Tensor) -> Tensor:
    """Sums over samples and positions of each channel of ``t`` (n, C, S) times each row of ``by`` (n, R, S): (R, C), small."""
    return torch.bmm(by, t.mT).sum(0, dtype=torch.float64)


def expected(t: Tensor, p: Tensor) -> Tensor:
    """sum_k p_k t_k, the responsible mean of ``t`` (K, C): (n, C, S')."""
    t = t.to(p.dtype)
    if p.shape[1] > FEW or not p.is_contiguous():
        return torch.bmm(t.T.expand(len(p), -1, -1), p)
    mean = t[0].unsqueeze(1) * p[:, :1]
    for k in range(1, len(t)):
        mean.addcmul_(t[k].unsqueeze(1), p[:, k : k + 1])
    return mean


def columns(t: Tensor) -> Tensor:
    """(N, C, *S) as (N, C, S); where there is one position, as (1, C, N): samples take the place of positions. A view of dense tensors."""
    return t.flatten(2) if t.shape[2:].numel() != 1 else t.flatten(1).T.unsqueeze(0)


def from_columns(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Back to ``shape`` (N, C, *S), as a view."""
    return t.reshape(shape) if prod(shape[2:]) != 1 else t[0].T.reshape(shape)


def _moments(x: Tensor, p: Tensor) -> Moments:
    """Two passes: the means, then what they miss and the squares."""
    k = p.shape[1]
    count = columns(p).sum((0, 2), dtype=torch.float64).unsqueeze(1)  # (K, 1)
    known = count.clamp(min=LEAST)
    zero = count.new_zeros(k, x.shape[1])
    guess = sum((_sums(block.data, block.p) for (block,) in _blocks(x, p)), zero) / known
    held = guess.to(x.dtype)  # (K, C)
    sums, squares, linked, members = zero, zero, count.new_zeros(k * k, x.shape[1]), count.new_zeros(k * k)
    for (block,) in _blocks(x, p):
        e = block.centred(held)
        linked = linked + _sums(e, block.cross)
        sums, squares = sums + _sums(e, block.p), squares + _sums(e.square_(), block.p)
        members = members + block.cross.sum((0, 2), dtype=torch.float64)
    apart = held.double().unsqueeze(1) - held.double()  # (K, K, C): held_j - held_k at [j, k]
    linked, members = linked.unflatten(0, (k, k)), members.reshape(k, k, 1)
    rest = (sums + (apart * members).sum(0)) / known
    var = (squares + (apart * (2 * linked + apart * members)).sum(0)) / known - rest.square()
    return Moments(held.double() + rest, var.clamp(min=0), count)


class _Mixed(torch.autograd.Function):
    """Two reads for the moments, one read and write to apply; backward in one reducing and one writing pass."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, measured: bool, box: list[Moments | None], x: Tensor, p: Tensor, *tensors: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[3:4] + ctx.needs_input_grad[5:]
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needed[1:], strict=True)]
        with without_autocast(x):
            moments = _moments(x, p) if measured else None
            if moments is not None and needed[0]:
                moments.mean.requires_grad_()
                moments.var.requires_grad_()
            with torch.enable_grad(), unhooked(), Remembering() as ctx.exchanges:
                parts, seen = rule(moments, *leaves)
            box.append(seen and _without_gradient(seen))
            ctx.save_for_backward(x, p, *tensors)
            ctx.rule, ctx.measured, ctx.small = rule, measured, (moments, leaves, parts)
            y, by_component = torch.empty_like(x), _by_component(parts, p.shape[1])
            for block, target in _blocks(x, p, y):
                block.mix(target, *by_component)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, p, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:4] + ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():
            with recalling(ctx.exchanges):
                y, _ = _plain(x, p, ctx.rule, tensors, ctx.measured)
            sources = [t for t, need in zip((x, *tensors), needed, strict=True) if need and t is not None]
            found = iter(torch.autograd.grad(y, sources, dy, create_graph=True, allow_unused=True))
            dx, *others = (next(found) if need else None for need in needed)
            return (None, None, None, dx, None, *others)
        moments, leaves, parts = ctx.small
        with without_autocast(x):
            dy, k = like(dy, x), p.shape[1]
            center, scale, _ = _by_component(parts, k)
            held = center.to(x.dtype)
            to_shift = along = torch.zeros_like(center)
            linked = center.new_zeros(k * k, center.shape[1])
            for block, incoming in _blocks(x, p, dy):
                to_shift, linked = to_shift + _sums(incoming, block.p), linked + _sums(incoming, block.cross)
                along = along + _sums(block.centred(held).mul_(incoming), block.p)
            apart = held.double().unsqueeze(1) - center  # (K, K, C): held_j - center_k at [j, k]
            to_scale = along + (apart * linked.unflatten(0, (k, k))).sum(0)
            received = (-scale * to_shift, to_scale, to_shift)  # what center, scale and shift get
            sources = [t for t in (*(moments[:2] if moments and needed[0] else ()), *leaves) if t is not None and t.requires_grad]
            results = [
                (part, got.sum_to_size(part.shape).to(part.dtype)) for part, got in zip(parts, received, strict=True) if part.requires_grad
            ]
            grads: dict[int, Tensor | None] = {}
            if results and sources:
                found = torch.autograd.grad(
                    [part for part, _ in results], sources, [got for _, got in results], retain_graph=True, allow_unused=True
                )
                grads = {id(source): grad for source, grad in zip(sources, found, strict=True)}
            dx = None
            if needed[0]:
                dx = torch.empty_like(x)
                to_mean, to_var = (grads.get(id(part)) for part in moments[:2]) if moments else (None, None)
                for block, incoming, target in _blocks(x, p, dy, dx):
                    direct = expected(scale, block.p).mul_(incoming)
                    if moments is None or to_mean is None or to_var is None:
                        target.copy_(direct)
                        continue
                    known = moments.count.clamp(min=LEAST)
                    block.mix(target, moments.mean.detach(), to_var * (2 / known), to_mean / known)
                    target.add_(direct)
        return (None, None, None, dx, None, *(t if t is None else grads.get(id(t)) for t in leaves))


def _by_component(parts: Sequence[Tensor], k: int) -> tuple[Tensor, ...]:
    """Center, scale and shift, each (K, C) and small, without gradient."""
    return tuple(part.detach().double().expand(k, -1) for part in parts)
