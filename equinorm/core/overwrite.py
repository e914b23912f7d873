"""A channel norm and its activation in the memory of their input, which is recovered from the output when backward needs it.

A norm keeps its input for backward, and the layer behind the activation keeps the activation's output. Here the output takes the place of
the input: one map of the two is stored. Backward inverts the activation and the affine map. Large tensors are worked on piece by piece, so
that no second one exists even for a moment, except for the gradient.

Where rounding the output loses the input, that channel of the input is kept beside: where its scale is tiny against its shift, or 0, and
where its activation saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equinorm.core.affine import Affine
from equinorm.core.channel import Rule, channel_norm, split, unhooked
from equinorm.core.measure import defined, measure
from equinorm.core.moments import Moments
from equinorm.core.sync import Remembering, capturing, recalling
from equinorm.kernels import Impl, dense, like, observed, pick, reference

PIECE = {"cpu": 2**18}  # elements worked on at a time: what stays in cache; elsewhere what hides the cost of a launch
LARGE_PIECE = 2**24


class Invertible(NamedTuple):
    """An activation that can be undone: differentiable functions of large tensors."""

    apply: Callable[[Tensor], Tensor]  # y of z
    invert: Callable[[Tensor], Tensor]  # z of y
    pull: Callable[[Tensor, Tensor], Tensor]  # dL/dz of dL/dy and y
    least: Callable[[float], float] = lambda eps: -inf  # the least z that y, rounded to relative precision eps, still determines


def overwriting_norm(
    x: Tensor,
    rule: Rule,
    *tensors: Tensor | None,
    activation: Invertible,
    measured: bool,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Moments | None]:
    """:func:`~equinorm.core.channel.channel_norm` over the batch and an activation, in the memory of ``x``.

    Args:
        x: (N, C, *S), floating; not a leaf that requires a gradient, nor a view. It is overwritten, except where operations are traced
            (``torch.compile``, ``torch.func``) instead of run.
        rule: as for ``channel_norm``, for moments (1, C).
        tensors: what the rule differentiates with respect to.
        activation: applied to the normalized x.
        measured: whether the rule needs moments.
        mask: boolean (N, 1, *S); positions without data come out as 0.
        impl: "plain" rules the kernels out for this call.

    Returns:
        the output, and the rule's moments without gradient.
    """
    if observed(x):
        y, seen = channel_norm(reference.wide(x), rule, *tensors, per="batch" if measured else None, mask=mask, impl=impl)
        y = activation.apply(y)
        return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype), seen
    plan = _Plan(rule, activation, measured, mask, impl)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        box: list[Moments | None] = []
        return _Overwritten.apply(plan, box, x, *tensors)[0], box[0]
    affine, seen = split(rule(_measured(x, plan), *tensors))
    _write(x, affine, plan)
    return x, seen


class _Plan(NamedTuple):
    rule: Rule
    activation: Invertible
    measured: bool
    mask: Tensor | None
    impl: Impl


class _Overwritten(torch.autograd.Function):
    """Returns y in the memory of x, the moments of x and the channels of x that are kept.

    The last three are outputs for the sake of higher derivatives: x is recovered from all four as a differentiable function, and what flows
    back to them reaches x through this function's own backward.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, box: list[Moments | None], x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[2:]
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, wanted[1:], strict=True)]
        moments = _measured(x, plan)
        if moments is not None and wanted[0]:
            moments.mean.requires_grad_()
            moments.var.requires_grad_()
        with torch.enable_grad(), unhooked(), Remembering() as ctx.exchanges:
            affine, seen = split(plan.rule(moments, *leaves))
        box.append(seen and Moments(seen.mean.detach(), seen.var.detach(), seen.count))
        values = Affine(*(part.detach() for part in affine))
        index = _lost(values, x, plan)
        kept = x.index_select(1, index)
        _write(x, values, plan)
        ctx.mark_dirty(x)
        mean, var = (m.detach().clone() for m in (moments[:2] if moments else (affine.scale, affine.scale)))  # any, where none is measured
        ctx.save_for_backward(x, mean, var, kept, *tensors)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.index, ctx.small, ctx.count = plan, index, (moments, leaves, affine), None if moments is None else moments.count
        return x, mean, var, kept

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, to_mean: Tensor | None, to_var: Tensor | None, to_kept: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, None, *_recorded(ctx, dy, to_mean, to_var, to_kept)
        y, _, _, kept, *_ = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        plan, index, wanted = ctx.plan, ctx.index, ctx.needs_input_grad[2:]
        moments, leaves, affine = ctx.small
        values = Affine(*(part.detach() for part in affine))

        def pieces() -> Iterator[tuple[Any, ...]]:
            """For each piece: x - center, the gradient behind the activation, the mask, and where the piece lies."""
            for y_piece, dy_piece, kept_piece, mask, dx_piece in _pieces(y, dy, kept, plan.mask, dx):
                y_wide = reference.wide(y_piece)
                dz = plan.activation.pull(reference.wide(dy_piece), y_wide)
                u = _recovered(y_wide, values, plan.activation, kept_piece, index)
                if mask is not None:
                    dz, u = torch.where(mask, dz, 0.0), torch.where(mask, u, 0.0)
                yield u, dz, mask, dx_piece

        dx = torch.empty_like(y) if wanted[0] else None
        sums = (_reduce(dz, u, plan.impl) for u, dz, *_ in pieces())
        sum_dz, sum_dz_u = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))  # (1, C)
        sources = [t for t in (*(moments[:2] if moments and wanted[0] else ()), *leaves) if t is not None and t.requires_grad]
        results = [i for i in range(3) if affine[i].requires_grad]
        received = (-values.scale * sum_dz, sum_dz_u, sum_dz)
        grads: dict[int, Tensor | None] = {}
        if results:
            shaped = [received[i].sum_to_size(affine[i].shape) for i in results]
            found = torch.autograd.grad([affine[i] for i in results], sources, shaped, retain_graph=True, allow_unused=True)
            grads = {id(source): grad for source, grad in zip(sources, found, strict=True)}
        if dx is not None:
            slope, offset = values.scale.new_zeros(1, 1), values.scale.new_zeros(1, 1)
            if moments is not None:
                count = moments.count.clamp(min=1) if isinstance(moments.count, Tensor) else max(moments.count, 1)
                of_mean, of_var = (
                    sum((g for g in (grads.get(id(part)), more) if g is not None), offset)
                    for part, more in zip(moments[:2], (to_mean, to_var), strict=True)
                )
                slope = of_var * 2 / count
                # x - mean = u + center - mean: the centre is that of all processes.
                offset = of_mean / count + slope * (values.center - moments.mean.detach())
            for u, dz, mask, dx_piece in pieces():
                piece = _combine(dz, u, values.scale, slope, offset, plan.impl)
                dx_piece.copy_(piece if mask is None else torch.where(mask, piece, 0.0))
            if to_kept is not None:
                dx.index_add_(1, index, to_kept)
        return None, None, dx, *(t if t is None else grads.get(id(t)) for t in leaves)


def _recorded(
    ctx: Any, dy: Tensor | None, to_mean: Tensor | None, to_var: Tensor | None, to_kept: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients with their own graph: x as a differentiable function of the outputs, and the definition applied to it."""
    y, mean, var, kept, *tensors = ctx.saved_tensors
    plan, wanted = ctx.plan, ctx.needs_input_grad[2:]
    moments = Moments(mean, var, ctx.count) if plan.measured else None
    with recalling(ctx.exchanges):
        affine, _ = split(plan.rule(moments, *tensors))
    u = _recovered(reference.wide(y), affine, plan.activation, kept, ctx.index)
    x = u + _spread(affine.center, y).to(u.dtype)
    # Not the tensors from which x was recovered, but new ones: what is sought are derivatives at a fixed x.
    direct = [t if t is None else t.view_as(t) for t in tensors]
    with recalling(ctx.exchanges):
        z, _ = channel_norm(x, plan.rule, *direct, per="batch" if plan.measured else None, mask=plan.mask, impl="plain")
    y = plan.activation.apply(z)
    results, received = [], []
    if dy is not None:
        results.append(y if plan.mask is None else torch.where(plan.mask, y, 0.0))
        received.append(dy.to(y.dtype))
    if moments is not None:
        again = defined(x, "batch", plan.mask)
        for result, grad in ((again.mean, to_mean), (again.var, to_var)):
            if grad is not None:
                results.append(result)
                received.append(grad)
    if to_kept is not None:
        results.append(x.index_select(1, ctx.index))
        received.append(to_kept.to(x.dtype))
    sources = [t for t, need in zip((x, *direct), wanted, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(results, sources, received, create_graph=True, allow_unused=True))
    dx, *others = (next(grads) if need and t is not None else None for t, need in zip((x, *direct), wanted, strict=True))
    return dx if dx is None else dx.to(y.dtype), *others


def _measured(x: Tensor, plan: _Plan) -> Moments | None:
    if not plan.measured:
        return None
    return reduce(Moments.merge, (measure(piece, per="batch", mask=mask, impl=plan.impl) for piece, mask in _pieces(x, plan.mask)))


def _write(x: Tensor, affine: Affine, plan: _Plan) -> None:
    for piece, mask in _pieces(x, plan.mask):
        data = reference.wide(piece)  # rounded once, behind the activation
        kernels = pick(data, plan.impl)
        if kernels is None:
            z = reference.affine(data, *(_spread(part, x) for part in affine))
        else:
            z = kernels.affine(dense(data), *affine)
        y = plan.activation.apply(z)
        piece.copy_(y if mask is None else torch.where(mask, y, 0.0))


def _reduce(dz: Tensor, u: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
    """Sums of ``dz`` and ``dz * u`` for each channel, (1, C)."""
    small = reference.small_dtype(u)
    if (kernels := pick(u, impl)) is not None:
        u = dense(u)
        return kernels.reduce(like(dz, u), u, torch.zeros(1, 1, dtype=small, device=u.device), "batch")
    dims = (0, *range(2, u.ndim))
    return dz.sum(dims).to(small).unsqueeze(0), (dz * u).sum(dims).to(small).unsqueeze(0)


def _combine(dz: Tensor, u: Tensor, scale: Tensor, slope: Tensor, offset: Tensor, impl: Impl) -> Tensor:
    """``scale * dz + slope * u + offset``."""
    if (kernels := pick(u, impl)) is not None:
        u = dense(u)
        return kernels.backward(like(dz, u), u, torch.zeros_like(scale), scale, slope, offset)
    scale, slope, offset = (_spread(part, u).to(u.dtype) for part in (scale, slope, offset))
    return scale * dz + slope * u + offset


def _recovered(y: Tensor, affine: Affine, activation: Invertible, kept: Tensor, index: Tensor) -> Tensor:
    """``x - center`` in the type of y, which is wide."""
    scale, shift = (_spread(part, y).to(y.dtype) for part in (affine.scale, affine.shift))
    u = (activation.invert(y) - shift) / torch.where(scale == 0, 1.0, scale)
    if index.numel() == 0:
        return u
    center = _spread(affine.center.expand(1, u.shape[1]), u).index_select(1, index)
    return u.index_copy(1, index, (kept.to(center.dtype) - center).to(u.dtype))


def _lost(affine: Affine, x: Tensor, plan: _Plan) -> Tensor:
    """The channels that rounding y would lose: recovered to less than four digits (in half types, to eight times their own rounding)."""
    if capturing(x) or x.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=x.device)  # a number of channels that depends on values cannot be captured
    eps = torch.finfo(x.dtype).eps
    center, scale, shift = (part.expand(1, x.shape[1]) for part in affine)
    lost = (scale.abs() * max(8.0, 1e-4 / eps) < shift.abs()) | (scale == 0)
    if (least := plan.activation.least(eps)) > -inf:
        ends = []
        for piece, mask in _pieces(x, plan.mask):
            for end, extreme in ((inf, Tensor.amin), (-inf, Tensor.amax)):
                data = piece if mask is None else torch.where(mask, piece, end)
                ends.append((extreme(data, (0, *range(2, x.ndim))) - center) * scale + shift)
        lost = lost | (torch.stack(ends).amin(0) < least)
    return lost.flatten().nonzero().flatten()


def _pieces(x: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """``x`` and what lies along it, cut along the longest dimension other than the channels."""
    dim = max((d for d in range(x.ndim) if d != 1), key=lambda d: x.shape[d])
    size = max(PIECE.get(x.device.type, LARGE_PIECE) * x.shape[dim] // max(x.numel(), 1), 1)
    cut = [None if t is None else t.split(size, dim) for t in (x, *others)]
    for k in range(len(cut[0] or ())):
        yield tuple(None if t is None else t[k] for t in cut)


def _spread(small: Tensor, x: Tensor) -> Tensor:
    return small.reshape(*small.shape, *[1] * (x.ndim - 2))
