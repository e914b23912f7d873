"""The covariance geometry: mean and covariance per group of channels -> a rule on (G, d, d) -> one matrix per group, applied to x.

The same three beats as in the channel geometry, with matrices in place of numbers. The plain path is the definition: differentiable PyTorch
around a few matrix products on (G, d, M), for G groups of d contiguous channels and all M samples and positions. The fused path does the
same products block by block on x as it lies in memory, keeps only x, and has the backward

    dx = matrix^T dy + (H + H^T) / n (x - mean) + g_mean / n

with g_mean and H the gradients that the rule sends to mean and covariance. Small tensors are float64 where the device has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equinorm.core.channel import unhooked
from equinorm.core.precision import without_autocast
from equinorm.core.sync import Remembering, recalling
from equinorm.kernels import Impl, dense, like, pick, reference

Parts = tuple[Tensor, Tensor, "Tensor | None"]
Seen = tuple["Covariance", Tensor]
Rule = Callable[..., "tuple[Parts, Seen | None]"]

CACHED = 1 << 18  # values of a block of x that is centred and multiplied at once
BLOCK = 1024  # positions whose products are summed in the type of the data; the sums of blocks are added in that of small tensors


class Covariance(NamedTuple):
    """Mean and biased covariance of the channels of each group, with the number of values behind them.

    Attributes:
        mean: (G, d) small tensor.
        cov: (G, d, d) small tensor, symmetric.
        count: samples and positions; a number, or a tensor where a mask or other processes decide.
    """

    mean: Tensor
    cov: Tensor
    count: int | Tensor


class Grouped(NamedTuple):
    """The input by groups of channels, minus an origin near its mean that carries no gradient.

    Subtracting first keeps products small: what the origin misses of the mean is subtracted from the products, where it no longer matters.

    Attributes:
        data: (G, d, M) in the type of large tensors; 0 where nothing counts.
        origin: (G, d) in that type.
        kept: (M,) boolean, True where data counts; None where all does.
    """

    data: Tensor
    origin: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, x: Tensor, d: int, mask: Tensor | None, origin: Tensor | None = None) -> Grouped:
        """Arrange x (N, C, *S) in groups of ``d`` channels; the origin is the mean, or the one given, as far as its type can hold it."""
        data = reference.wide(x).movedim(1, 0).flatten(1).unflatten(0, (-1, d))
        kept = None if mask is None else mask.flatten()
        if kept is not None:
            data = torch.where(kept, data, 0)
        if origin is None:
            count = max(data.shape[2], 1) if kept is None else kept.sum().clamp(min=1)
            origin = data.detach().sum(2) / count
        data = data - origin.to(data.dtype).unsqueeze(2)
        return cls(data if kept is None else torch.where(kept, data, 0), origin.to(data.dtype), kept)

    def measure(self) -> Covariance:
        """Mean and covariance of x."""
        small = reference.small_dtype(self.data)
        count = self.data.shape[2] if self.kept is None else self.kept.sum()
        size = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
        rest = self.data.sum(2).to(small) / size  # (G, d)
        cov = _Products.apply(self.data, small) / size - rest.unsqueeze(2) * rest.unsqueeze(1)
        return Covariance(self.origin.to(small) + rest, (cov + cov.mT) / 2, count)

    def project(self, center: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """``matrix @ (x - center) + bias``: (G, d, M), with center (G, d), matrix (G, d, d), bias (C,)."""
        shift = matrix @ (self.origin.to(center.dtype) - center).unsqueeze(2)  # (G, d, 1)
        if bias is not None:
            shift = shift + bias.to(matrix.dtype).reshape_as(center).unsqueeze(2)
        y = torch.baddbmm(shift.to(self.data.dtype), matrix.to(self.data.dtype), self.data)
        return y if self.kept is None else torch.where(self.kept, y, 0)


def ungrouped(y: Tensor, x: Tensor) -> Tensor:
    """``y`` (G, d, M) in the shape, dtype and memory layout of ``x`` (N, C, *S)."""
    y = y.to(x.dtype).reshape(x.shape[1], x.shape[0], *x.shape[2:])  # (C, N, *S)
    if x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return y.movedim(0, -1).contiguous().movedim(-1, 1)
    return y.movedim(0, 1).contiguous()


def matrix_norm(
    x: Tensor,
    d: int,
    rule: Rule,
    *tensors: Tensor | None,
    center: Tensor | None = None,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Seen | None]:
    """``matrix @ (x - center) + shift`` for each group of ``d`` channels, with what ``rule`` makes of mean and covariance.

    Args:
        x: (N, C, *S), floating, any memory layout; the output has its dtype and, where dense, its layout.
        d: channels per group; divides C.
        rule: ``rule(seen, *tensors)`` returns center (G, d), matrix (G, d, d) and shift (C,) or None, and what a running estimate may learn
            from, a covariance and a matrix, or None. It must be pure, as in :func:`~equinorm.core.channel.channel_norm`.
        tensors: what the rule differentiates with respect to; None entries are handed through.
        center: the rule's center, where it is known beforehand: then nothing is measured, and the rule gets None.
        mask: boolean (N, 1, *S), True where data is; the rest enters nothing, comes out as 0 and gets gradient 0.
        impl: "plain" rules the kernels out for this call.

    Returns:
        the output, and what the rule says to learn from, without gradient.
    """
    kernels = pick(x, impl) if mask is None else None
    if kernels is None:
        y, seen = _plain(x, d, rule, tensors, center, mask)
        return y, seen and _without_gradient(*seen)
    box: list[Seen | None] = []
    return _Matrices.apply(kernels, d, rule, center, box, dense(x), *tensors), box[0]


def _plain(
    x: Tensor, d: int, rule: Rule, tensors: Sequence[Tensor | None], center: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Seen | None]:
    """The definition."""
    grouped = Grouped.of(x, d, mask, center)
    parts, seen = rule(grouped.measure() if center is None else None, *tensors)
    return ungrouped(grouped.project(*parts), x), seen


def _without_gradient(seen: Covariance, matrix: Tensor) -> Seen:
    return Covariance(seen.mean.detach(), seen.cov.detach(), seen.count), matrix.detach()


def _grouped(t: Tensor, d: int) -> Tensor:
    """A dense tensor as (B, G, d, L), in place: B samples of L positions, or all of them in a row where channels lie together."""
    if t.is_contiguous() and t.shape[2:].numel() > 1:
        return t.flatten(2).unflatten(1, (-1, d))
    rows = t.flatten(1) if t.shape[2:].numel() == 1 else t.movedim(1, -1).flatten(0, -2)  # (M, C)
    return rows.T.unflatten(0, (-1, d)).unsqueeze(0)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of tensors (B, G, d, L), with at most BLOCK positions: (b G, d, l), as views."""
    b, g, d, length = tensors[0].shape
    if not tensors[0].numel():
        return  # an empty batch takes part in every exchange all the same
    positions = min(max(CACHED // (g * d), 1), BLOCK, length)
    samples = max(CACHED // (g * d * positions), 1)
    for i in range(0, b, samples):
        for j in range(0, length, positions):
            yield tuple(t[i : i + samples, :, :, j : j + positions].flatten(0, 1) for t in tensors)


def _total(products: Tensor, groups: int) -> Tensor:
    """The sum over samples of (b G, ...), in float64: (G, ...)."""
    return products.unflatten(0, (-1, groups)).sum(0, dtype=torch.float64)


class _Matrices(torch.autograd.Function):
    """Two reads for mean and covariance, one read and write to apply; backward in one reducing and one writing pass."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, d: int, rule: Rule, center: Tensor | None, box: list[Seen | None], x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[5:]
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, wanted[1:], strict=True)]
        data, dtype = _grouped(x, d), reference.wide(x[:0]).dtype
        groups = data.shape[1]
        seen = None
        if center is None:
            mean = kernels.moments(x, "batch")[0].reshape(groups, d)
            origin, count = mean.to(dtype), x.numel() // x.shape[1]
            products = mean.new_zeros(groups, d, d)
            for (block,) in _blocks(data):
                e = _centred(block, origin)
                products += _total(torch.bmm(e, e.mT), groups)
            rest = mean - origin
            cov = products / max(count, 1) - rest.unsqueeze(2) * rest.unsqueeze(1)
            seen = Covariance(mean, (cov + cov.mT) / 2, count)
            if wanted[0]:
                mean.requires_grad_()
                seen.cov.requires_grad_()
        else:
            origin = center.to(dtype)
        with torch.enable_grad(), unhooked(), Remembering() as ctx.exchanges:
            parts, learned = rule(seen, *leaves)
        box.append(learned and _without_gradient(*learned))
        ctx.save_for_backward(x, *tensors)
        ctx.d, ctx.rule, ctx.center, ctx.origin, ctx.small = d, rule, center, origin, (seen, leaves, parts)
        at, matrix = parts[0].detach(), parts[1].detach()
        bias = None if parts[2] is None else parts[2].detach()
        shift = (matrix @ (origin.to(at.dtype) - at).unsqueeze(2)).squeeze(2)
        shift = (shift if bias is None else shift + bias.to(shift.dtype).reshape(groups, d)).to(dtype)
        y, forward = torch.empty_like(x), matrix.to(dtype)
        for block, target in _blocks(data, _grouped(y, d)):
            _product(target, shift, (forward, _centred(block, origin)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        with without_autocast(x):
            if torch.is_grad_enabled():
                with recalling(ctx.exchanges):
                    y, _ = _plain(x, ctx.d, ctx.rule, tensors, ctx.center, None)
                sources = [t for t, need in zip((x, *tensors), wanted, strict=True) if need and t is not None]
                found = iter(torch.autograd.grad(y, sources, dy, create_graph=True, allow_unused=True))
                return (None,) * 5 + tuple(next(found) if need else None for need in wanted)
            (seen, leaves, parts), origin = ctx.small, ctx.origin
            (groups, d), dtype = origin.shape, origin.dtype
            center, matrix = (part.detach() for part in parts[:2])
            data, incoming = _grouped(x, d), _grouped(like(dy, x), d)
            sources = [t for t in (*(seen[:2] if seen and wanted[0] else ()), *leaves) if t is not None and t.requires_grad]
            grads: dict[int, Tensor | None] = {}
            if any(part is not None and part.requires_grad for part in parts):
                along, to_shift = torch.zeros_like(matrix), torch.zeros_like(center)
                for block, from_y in _blocks(data, incoming):
                    from_y = reference.wide(from_y)
                    along += _total(torch.bmm(from_y, _centred(block, origin).mT), groups)
                    to_shift += _total(from_y.sum(2), groups)
                to_matrix = along + to_shift.unsqueeze(2) * (origin.to(center.dtype) - center).unsqueeze(1)
                to_center = -(matrix.mT @ to_shift.unsqueeze(2)).squeeze(2)
                received = zip(parts, (to_center, to_matrix, to_shift), strict=True)
                results = [
                    (part, got.reshape(part.shape).to(part.dtype)) for part, got in received if part is not None and part.requires_grad
                ]
                found = torch.autograd.grad(
                    [part for part, _ in results],
                    sources,
                    [got.reshape(part.shape).to(part.dtype) for part, got in results],
                    retain_graph=True,
                    allow_unused=True,
                )
                grads = {id(source): grad for source, grad in zip(sources, found, strict=True)}
            dx = None
            if wanted[0]:
                dx = torch.empty_like(x)
                to_mean, to_cov = (grads.get(id(part)) for part in seen[:2]) if seen else (None, None)
                backward = matrix.mT.to(dtype)
                if to_mean is None or to_cov is None:
                    for from_y, target in _blocks(incoming, _grouped(dx, d)):
                        _product(target, torch.zeros_like(origin), (backward, reference.wide(from_y)))
                else:
                    count = max(seen.count, 1)
                    slope = (to_cov + to_cov.mT) / count
                    rest = seen.mean.detach() - origin
                    offset = (to_mean / count - (slope @ rest.unsqueeze(2)).squeeze(2)).to(dtype)
                    slope = slope.to(dtype)
                    for block, from_y, target in _blocks(data, incoming, _grouped(dx, d)):
                        _product(target, offset, (backward, reference.wide(from_y)), (slope, _centred(block, origin)))
        return (None, None, None, None, None, dx, *(t if t is None else grads.get(id(t)) for t in leaves))


def _centred(block: Tensor, origin: Tensor) -> Tensor:
    """``block`` (b G, d, l) minus ``origin`` (G, d), in the type of the arithmetic."""
    return (block.unflatten(0, (-1, len(origin))) - origin.unsqueeze(2)).flatten(0, 1)


def _product(out: Tensor, shift: Tensor, *terms: tuple[Tensor, Tensor]) -> None:
    """Write the sum of ``matrix @ data`` and ``shift``: (b G, d, l), with a shift (G, d) and matrices (G, d, d) for each of G groups."""
    samples = len(out) // len(shift)
    total = shift.repeat(samples, 1).unsqueeze(2)
    for matrix, data in terms:
        total = torch.baddbmm(total, matrix.repeat(samples, 1, 1), data, out=out if out.dtype == data.dtype else None)
    if total is not out:
        out.copy_(total)


class _Products(torch.autograd.Function):
    """``data @ data.mT`` (G, d, d) in the small type, summed in blocks: over millions of positions as exact as over a thousand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(data: Tensor, small: torch.dtype) -> Tensor:
        whole = torch.compiler.is_compiling() or not data.shape[2]  # a trace of thousands of blocks would take minutes to compile
        blocks = (data,) if whole else data.split(BLOCK, 2)
        total = (blocks[0] @ blocks[0].mT).to(small)
        for block in blocks[1:]:
            total = total + block @ block.mT
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (data,) = ctx.saved_tensors
        return (grad + grad.mT).to(data.dtype) @ data, None
