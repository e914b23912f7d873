"""Any norm for any norm, with what the model has learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.surgery.calling import Forward, batches_of, call, difference, floating
from equinorm.surgery.kinds import Norm, Where, chosen, norms
from equinorm.surgery.optimizers import exchange, named
from equinorm.surgery.places import evaluating, owners, replace
from equinorm.surgery.plan import Change, Plan, Refusal
from equinorm.surgery.population import moments_along
from equinorm.surgery.record import attach
from equinorm.surgery.replacement import (
    BY_DATA,
    BY_ESTIMATES,
    Replacement,
    fill,
    give_affine,
    give_moments,
    is_affine_last,
    learns_by_running,
)
from equinorm.surgery.target import Target, To


def swap(
    model: nn.Module,
    to: To,
    *,
    where: Where = None,
    calibrate: Any = None,
    forward: Forward = call,
    optimizer: torch.optim.Optimizer | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Plan:
    r"""Replace norms by another norm, in place, so that the model's outputs change as little as can be.

    What the new norm can hold is carried over as it is: between batch norms everything, else factor and summand per channel. Where the two
    divide by different statistics, factor and summand are fitted:

    - with ``calibrate``, by least squares between the new norm's normalized value and the old norm's output, channel by channel, on the
      activations of the model as it was; running estimates that the old norm did not have are measured there, too. Where the old norm
      has them, the formula below is tried as well, and what changes the outputs less stays;
    - without, from running estimates (mean m_c and variance v_c of each channel): a group of channels is expected to have the mean
      M = mean(m_c) and the variance V = mean(v_c) + var(m_c), so that weight' = weight sqrt(V + eps') / sqrt(v_c + eps) and
      bias' = bias + weight (M - m_c) / sqrt(v_c + eps).

    The new norm remembers the old one in the attribute ``replaced_norm``, which is copied and pickled with it but is no part of the state
    dict. Swapping back restores parameters and estimates exactly, unless the new norm has been trained since: then the trained values are
    carried over by the same formula.

    Args:
        model: any module that contains norms; not a norm itself.
        to: name in the catalogue ("group"), class (ours, torch's or another's), or a function of the number of channels.
        where: which norms: a type or a tuple of types, a pattern of names ("layer3.*"), or ``where(name, module)``; None for all.
        calibrate: a batch (tensor or mapping) or an iterable of batches; the more like the training data, the better.
        forward: ``forward(model, batch)``; the default passes a mapping as keywords, and of a tuple or list the first entry.
        optimizer: its groups get the new parameters where the old ones were; settings of groups stay.
        dry_run: work the plan out and change nothing.
        options: settings of the new norm, as ``num_groups=16``; the nearest divisor of the channels is taken.

    Returns:
        The plan, applied unless ``dry_run``. With ``calibrate`` its ``error`` is the difference of the outputs before and after.

    Raises:
        ValueError: unknown name, nothing matches ``where``, the model is itself a norm, an empty ``calibrate``, settings out of range.
        TypeError: ``to`` or ``calibrate`` is of no known kind, or an option that the class does not have.
        Exception: whatever the model raises on a batch. After any error the model is as it was.

    Example:
        >>> import torch, equinorm
        >>> from equinorm.surgery import swap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> print(swap(model, "group", num_groups=3))
        swap (done): 1 change, 0 refusals
          1: BatchNorm2d(8) -> GroupNorm(8, 2 groups)
              keeps 2 groups, the nearest to 3 that divides 8 channels
              keeps the output in expectation: weight and bias fitted to the running estimates
              keeps the old norm in the attribute replaced_norm, for swapping back
    """
    target = Target(to, options)
    found = chosen("swap", norms(model), where)
    batches = None if calibrate is None else batches_of(calibrate)
    if any("" in names for names in found.values()):
        raise ValueError(f"swap: the model is itself a norm, {type(model).__name__}, and has no place in another; construct the new norm")
    plan = Plan("swap")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
        shapes = {} if batches is None else _shapes(model, found, forward, batches[0])
        replacements = [r for norm, names in found.items() if (r := _planned(target, norm, names, shapes, plan)) is not None]
        before = [] if batches is None else _calibrated(model, replacements, forward, batches)
        for replacement in replacements:
            fill(replacement, calibrated=batches is not None)
        if batches is not None:
            plan.error = _tried(model, replacements, lambda: [floating(forward(model, batch)) for batch in batches], before)
    for replacement in replacements:
        if replacement.origin is not None and replacement.origin.state:
            attach(replacement.origin, replacement.inner)
            replacement.kept.append("the old norm in the attribute replaced_norm, for swapping back")
    _share(model, replacements)
    plan.changes = [_change(r) for r in replacements]
    if dry_run or not replacements:
        return plan
    exchanges = [(named(r.source.module), named(r.place)) for r in replacements]
    replace(model, {r.source.module: r.place for r in replacements})
    if optimizer is not None:
        plan.remarks += exchange(optimizer, exchanges, set(model.parameters()))
    plan.applied = True
    return plan


def _planned(target: Target, norm: Norm, names: tuple[str, ...], shapes: dict[nn.Module, torch.Size], plan: Plan) -> Replacement | None:
    """The replacement of one norm; None, with the reason in the plan, where there is none."""
    channels, shape = norm.channels, getattr(norm.inner, "normalized_shape", None)
    if target.is_met_by(norm):
        reason = "is one already"
    elif isinstance(shape, tuple) and len(shape) > 1:
        reason = f"normalizes {len(shape)} dimensions with a weight for each of their elements {tuple(shape)}, which no other norm has"
    elif channels is None and norm.module not in shapes:
        reason = "does not know its number of channels; pass calibrate"
    else:
        channels = channels or shapes[norm.module][norm.axis]
        try:
            new, said = target.build(norm, channels)
        except ValueError as error:
            raise ValueError(f"swap: {target.name} cannot be made for {names[0]!r}, {norm}: {error}") from error
        return Replacement(names, norm, new, said)
    plan.refusals.append(Refusal(names, str(norm), reason))
    return None


def _shapes(model: nn.Module, found: dict[Norm, tuple[str, ...]], forward: Forward, batch: Any) -> dict[nn.Module, torch.Size]:
    """The shape of the input of each norm that runs."""
    shapes: dict[nn.Module, torch.Size] = {}

    def look(module: nn.Module, x: Tensor) -> None:
        shapes[module] = x.shape

    unknown = [norm.module for norm in found if norm.channels is None]
    _watched(model, {module: partial(look, module) for module in unknown}, forward, [batch])
    return shapes


def _calibrated(model: nn.Module, replacements: list[Replacement], forward: Forward, batches: list[Any]) -> list[list[Tensor]]:
    """Let the new norms see what the old ones see: first their running state, then the lines of least squares. Returns the outputs."""

    def feel(r: Replacement, x: Tensor) -> None:
        seen = moments_along(x, r.source.axis)
        r.seen = seen if r.seen is None else r.seen.merge(seen)
        if learns_by_running(r.inner):
            r.new.train()(x.clone())

    def compare(r: Replacement, x: Tensor) -> None:
        z = r.normalized(x)
        if not r.fit.count:
            r.affine_last = is_affine_last(r, x, z)
        r.fit.add(z, r.source.core.forward(x.clone()), r.source.axis)

    outputs = _watched(model, {r.source.module: partial(feel, r) for r in replacements}, forward, batches)
    for r in replacements:
        r.new.eval()
        give_moments(r)
        if r.norm is not None:
            give_affine(r, torch.ones(()), torch.zeros(()))
    _watched(model, {r.source.module: partial(compare, r) for r in replacements}, forward, batches)
    return outputs


def _tried(model: nn.Module, replacements: list[Replacement], run: Callable[[], list[list[Tensor]]], before: list[list[Tensor]]) -> float:
    """The difference of the outputs with the new norms, fitted to data or to running estimates, whichever is less. The model stays."""

    def error() -> float:
        replace(model, {r.source.module: r.place for r in replacements})
        try:
            return max(difference(old, new) for old, new in zip(before, run(), strict=True))
        finally:
            replace(model, {r.place: r.source.module for r in replacements})

    by_data = error()
    both = [r for r in replacements if r.fitted is not None and r.expected is not None]
    for r in both:
        give_affine(r, *r.expected)  # type: ignore[misc]
    by_estimates = error() if both else float("inf")
    for r in replacements:
        if r.fitted is None:
            continue
        if r.expected is not None and by_estimates < by_data:
            r.kept.append(BY_ESTIMATES + ", which is nearer on the calibration data than least squares layer by layer")
        else:
            give_affine(r, *r.fitted)
            r.kept.append(BY_DATA)
    return min(by_data, by_estimates)


def _watched(
    model: nn.Module, watchers: dict[nn.Module, Callable[[Tensor], None]], forward: Forward, batches: list[Any]
) -> list[list[Tensor]]:
    """Run the batches while each watcher sees the inputs of its module; the outputs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watchers[module](args[0] if args else next(iter(kwargs.values())))

    handles = [module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for module in watchers]
    try:
        return [floating(forward(model, batch)) for batch in batches]
    finally:
        for handle in handles:
            handle.remove()


def _share(model: nn.Module, replacements: list[Replacement]) -> None:
    """Keep parameters themselves where their values stay; keep ties where both ends change to the same value."""
    held = owners(model)
    first: dict[nn.Parameter, list[tuple[Replacement, str, nn.Parameter]]] = {}
    for r in replacements:
        for name in ("weight", "bias"):
            old, new = r.source.inner._parameters.get(name), r.inner._parameters.get(name)
            if old is None or new is None:
                continue
            new.requires_grad_(old.requires_grad)
            if old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new):
                r.inner._parameters[name] = old
            elif len(held.get(old, ())) > 1:
                first.setdefault(old, []).append((r, name, new))
    for old, ends in first.items():
        values = [new for _, _, new in ends]
        if len(ends) == len(held[old]) and all(torch.equal(value, values[0]) for value in values):
            for r, name, _ in ends:
                r.inner._parameters[name] = values[0]
        else:
            for r, name, _ in ends:
                r.lost.append(f"the tie of its {name} with others, whose value is no longer the same")


def _change(r: Replacement) -> Change:
    new = str(r.norm) if r.norm is not None else type(r.new).__name__
    after = "".join(f" + {type(part).__name__}" for part in r.source.after)
    return Change(r.names, f"{r.source} -> {new}{after}", tuple(r.kept), tuple(dict.fromkeys(r.lost)))
