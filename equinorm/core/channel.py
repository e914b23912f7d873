"""The channel geometry: moments per (sample, channel) -> a rule on (N, C) tensors -> one affine map of x. The one clever file.

Two paths compute the same thing. The *plain path* is the definition: differentiable PyTorch, to any order, on any device. The *fused path*
reads and writes the large tensor as seldom as the mathematics allows. Its forward measures moments (one read) and applies the map (one
read, one write), and keeps only x and the small graph of the rule. Its backward reduces the incoming gradient per channel (one read of dy
and x), differentiates the rule on its small tensors by ordinary autograd, and writes dx in one final pass:

    dx = scale * dy + (2 g_var / n) * (x - mean) + g_mean / n

with g_mean, g_var the gradients that the rule sends to the moments. A first derivative is all that this gives. When gradients are being
recorded in backward (a gradient penalty, ``create_graph=True``), the plain path is recorded instead: then derivatives of any order are
right. A fused backward without this switch is silently wrong from the second derivative on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks as top_saved_tensors_default_hooks  # pyright: ignore[reportMissingImports]
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

from equinorm.core.affine import Affine
from equinorm.core.measure import Per, defined, fused
from equinorm.core.moments import Moments
from equinorm.core.sync import Remembering, recalling
from equinorm.kernels import Impl, dense, like, pick, reference
from equinorm.kernels.activations import Activation

Rule = Callable[..., "Affine | tuple[Affine, Moments]"]


def channel_norm(
    x: Tensor,
    rule: Rule,
    *tensors: Tensor | None,
    per: Per | None = "sample",
    mask: Tensor | None = None,
    impl: Impl = "auto",
    then: Activation | None = None,
) -> tuple[Tensor, Moments | None]:
    """Normalize ``x`` by what ``rule`` makes of its moments.

    Args:
        x: (N, C, *S), floating, any memory layout; the output has its dtype and, where dense, its layout.
        rule: ``rule(moments, *tensors)`` returns an :class:`Affine`, or a pair of it and the :class:`Moments` that a running estimate may
            learn from. It must be pure: no in-place operation, no randomness, no ``.item()``, no update of a buffer (a later derivative
            runs it again). It must not differentiate through anything that is not among its arguments.
        tensors: what the rule differentiates with respect to (weights, gates); None entries are handed through. A buffer that the module
            updates later is passed as a copy.
        per: how finely moments are measured: "sample" for (N, C); "batch" for (1, C), for rules that only pool over the batch; None when
            the rule needs no moments (it gets None).
        mask: boolean (N, *S) or (N, 1, *S), True where data is. Positions without data enter no statistic; they come out as 0 and get
            gradient 0, whatever they hold.
        impl: "plain" rules the kernels out for this call.
        then: follows the map before anything is stored. Backward recomputes what it needs from ``x``.

    Returns:
        the output, and the rule's moments without gradient (None when it returned none).
    """
    kernels = pick(x, impl) if mask is None else None
    if kernels is None:
        y, seen = _plain(x, rule, tensors, per, mask, then)
        return y, seen and _without_gradient(seen)
    x = dense(x)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *tensors)):
        affine, seen = split(rule(_measure(kernels, x, per), *tensors))
        return _apply(kernels, x, affine, then), seen
    box: list[Moments | None] = []
    return _Fused.apply(kernels, rule, per, then, box, x, *tensors), box[0]


def canonical_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``mask`` as (N, 1, *S).

    Raises:
        ValueError: the mask is not boolean, or not of shape (N, *S) or (N, 1, *S).
    """
    n, spatial = x.shape[0], x.shape[2:]
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True where data is), got {mask.dtype}; compare it first, as in `mask > 0`")
    if mask.shape == (n, *spatial):
        return mask.unsqueeze(1)
    if mask.shape == (n, 1, *spatial):
        return mask
    raise ValueError(
        f"mask must have shape {(n, *spatial)} or {(n, 1, *spatial)} (samples and positions of the input {tuple(x.shape)}), "
        f"got {tuple(mask.shape)}"
    )


def _plain(
    x: Tensor, rule: Rule, tensors: tuple[Tensor | None, ...], per: Per | None, mask: Tensor | None, then: Activation | None
) -> tuple[Tensor, Moments | None]:
    """The definition."""
    affine, seen = split(rule(None if per is None else defined(x, per, mask), *tensors))
    center, scale, shift = (part.reshape(*part.shape, *[1] * (x.ndim - 2)) for part in affine)
    zero = x.new_zeros(())
    y = reference.affine(reference.wide(x if mask is None else torch.where(mask, x, zero)), center, scale, shift)
    y = (y if then is None else then.function(y)).to(x.dtype)
    return (y if mask is None else torch.where(mask, y, zero)), seen


def _apply(kernels: Any, x: Tensor, affine: Affine, then: Activation | None) -> Tensor:
    if fused := kernels.fused(then):
        return kernels.affine(x, *affine, fused)
    if then is None:
        return kernels.affine(x, *affine)
    return then.function(kernels.affine(reference.wide(x), *affine)).to(x.dtype)  # rounded once, behind the activation


def _measure(kernels: Any, x: Tensor, per: Per | None) -> Moments | None:
    return None if per is None else fused(kernels, x, per)


def split(result: Affine | tuple[Affine, Moments]) -> tuple[Affine, Moments | None]:
    """What a rule returned, as the map, each part (N | 1, C | 1), and the moments to learn from."""
    affine, seen = (result, None) if isinstance(result, Affine) else result
    return Affine(*(part if part.ndim == 2 else part.reshape(1, -1) for part in affine)), seen


def _without_gradient(x: Moments) -> Moments:
    return Moments(x.mean.detach(), x.var.detach(), x.count)


class _Fused(torch.autograd.Function):
    """One read for the moments, one read and write to apply; backward in one reducing and one writing pass."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        rule: Rule,
        per: Per | None,
        then: Activation | None,
        box: list[Moments | None],
        x: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[5:]
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, wanted[1:], strict=True)]
        moments = _measure(kernels, x, per)
        if moments is not None and wanted[0]:
            moments.mean.requires_grad_()
            moments.var.requires_grad_()
        with torch.enable_grad(), unhooked(), Remembering() as ctx.exchanges:
            affine, seen = split(rule(moments, *leaves))
        box.append(seen and _without_gradient(seen))
        ctx.save_for_backward(x, *tensors)
        ctx.kernels, ctx.rule, ctx.per, ctx.then = kernels, rule, per, then
        ctx.small = moments, leaves, affine
        return _apply(kernels, x, Affine(*(part.detach() for part in affine)), then)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors  # once: checkpointing unpacks no tensor twice
        dtype, wanted = x.dtype, ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():
            return (None,) * 5 + _recorded(ctx, x, tensors, wanted, dy)
        moments, leaves, affine = ctx.small
        kernels = ctx.kernels
        dy = like(dy, x)
        center, scale, shift = (part.detach() for part in affine)
        activated = ()  # what the kernels need to pull the gradient back through the activation
        if fused := kernels.fused(ctx.then):
            activated = (center, scale, shift), fused
        elif ctx.then is not None:
            x, dy = reference.wide(x), reference.wide(dy)
            dy = ctx.then.pulled(kernels.affine(x, center, scale, shift), dy)
        sources = [t for t in (*(moments[:2] if moments and wanted[0] else ()), *leaves) if t is not None and t.requires_grad]
        results = [i for i in range(3) if affine[i].requires_grad]
        grads: dict[int, Tensor | None] = {}
        if results:
            finest = "sample" if any(part.shape[0] != 1 for part in affine) else "batch"
            sum_dy, sum_dy_x = kernels.reduce(dy, x, center, finest, *activated)
            of_affine = (-scale * sum_dy if 0 in results else sum_dy, sum_dy_x, sum_dy)  # what center, scale and shift receive
            received = _differentiate([affine[i] for i in results], sources, [_summed(of_affine[i], affine[i].shape) for i in results])
            grads = {id(source): grad for source, grad in zip(sources, received, strict=True)}
        dx = None
        if wanted[0]:
            to_mean, to_var = (grads.get(id(part)) for part in moments[:2]) if moments else (None, None)
            zero = scale.new_zeros(1, 1)
            if to_mean is None and to_var is None and not activated:
                dx = kernels.affine(dy, zero, scale, zero)
            else:
                count = max(moments.count, 1) if moments else 1
                slope = zero if to_var is None else to_var * (2 / count)
                offset = zero if to_mean is None else to_mean / count
                dx = kernels.backward(dy, x, moments.mean.detach() if moments else center, scale, slope, offset, *activated)
            dx = dx.to(dtype)
        return (None, None, None, None, None, dx, *(t if t is None else grads.get(id(t)) for t in leaves))


def _recorded(ctx: Any, x: Tensor, tensors: list[Tensor | None], wanted: tuple[bool, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients through the plain path, with their own graph recorded."""
    with recalling(ctx.exchanges):
        y, _ = _plain(x, ctx.rule, tuple(tensors), ctx.per, None, ctx.then)
    sources = [t for t, need in zip((x, *tensors), wanted, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(y, sources, dy, create_graph=True, allow_unused=True))
    return tuple(next(grads) if need and t is not None else None for t, need in zip((x, *tensors), wanted, strict=True))


def _summed(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a small tensor that was broadcast to that of ``grad``; 0 from a batch without samples."""
    if grad.shape == shape:
        return grad
    return grad.sum_to_size(shape) if grad.numel() else grad.new_zeros(shape)


def _differentiate(results: list[Tensor], sources: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of the small graph, which stays for a second backward.

    ``torch.autograd.grad`` would do; its checks of shapes known to agree cost as much as the graph itself.
    """
    return Variable._execution_engine.run_backward(tuple(results), tuple(grads), True, False, tuple(sources), True, False)


def unhooked() -> Any:
    """Keep the small graph out of hooks on saved tensors: under activation checkpointing each of them would trigger a recomputation."""
    if top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return saved_tensors_hooks(lambda t: t, lambda t: t)
