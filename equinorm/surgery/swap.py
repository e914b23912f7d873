"""Any norm for any norm, with what the model has learned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.core import Moments
from equinorm.surgery.calling import Forward, batches_of, call, difference, floating
from equinorm.surgery.kinds import Norm, Where, chosen, norms, offset, parametrized, read
from equinorm.surgery.optimizers import exchange, named
from equinorm.surgery.places import evaluating, owners, replace
from equinorm.surgery.plan import Change, Plan, Refusal
from equinorm.surgery.population import Regression, moments_along
from equinorm.surgery.record import Replaced, attach, record_of, remember
from equinorm.surgery.target import Target, To, pooled

_Affine = tuple[Tensor | None, Tensor | None]
BY_DATA = "the output on the calibration data: weight and bias fitted by least squares"
BY_ESTIMATES = "the output in expectation: weight and bias fitted to the running estimates"
SAME_STATE = ("batch", "sync_batch", "ghost_batch")  # one meaning of weight, bias and running estimates


@dataclass
class _Replacement:
    """One norm, what takes its place, and what is learned on the way."""

    names: tuple[str, ...]
    source: Norm
    new: nn.Module  # the norm, with a change of layout where it needs one
    kept: list[str]
    lost: list[str] = field(default_factory=list)
    seen: Moments | None = None
    fit: Regression = field(default_factory=Regression)
    affine_last: bool = True  # whether weight and bias come last in the new norm, so that a line can be fitted
    fitted: _Affine | None = None
    expected: _Affine | None = None
    origin: Replaced | None = None

    def __post_init__(self) -> None:
        self.norm = read(self.new)
        self.place = self.new
        if self.source.after:
            parts = ((type(part).__name__.lower(), part) for part in self.source.after)
            self.place = nn.Sequential(OrderedDict([("norm", self.new), *parts]))

    @property
    def inner(self) -> Any:
        """The new norm itself."""
        return self.new if self.norm is None else self.norm.inner

    def normalized(self, x: Tensor) -> Tensor:
        """What the new norm makes of ``x``, without the activation that it may apply. The hooks of a module are not run."""
        return (self.new if self.norm is None else self.norm.core).forward(x.clone())


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
      activations of the model as it was; running estimates that the old norm did not have are measured there, too;
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
            _fill(replacement, calibrated=batches is not None)
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


def _planned(target: Target, norm: Norm, names: tuple[str, ...], shapes: dict[nn.Module, torch.Size], plan: Plan) -> _Replacement | None:
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
        return _Replacement(names, norm, new, said)
    plan.refusals.append(Refusal(names, str(norm), reason))
    return None


def _shapes(model: nn.Module, found: dict[Norm, tuple[str, ...]], forward: Forward, batch: Any) -> dict[nn.Module, torch.Size]:
    """The shape of the input of each norm that runs."""
    shapes: dict[nn.Module, torch.Size] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes[module] = args[0].shape

    _with_hooks(model, {norm.module: look for norm in found if norm.channels is None}, forward, [batch])
    return shapes


def _calibrated(model: nn.Module, replacements: list[_Replacement], forward: Forward, batches: list[Any]) -> list[list[Tensor]]:
    """Let the new norms see what the old ones see: first their running state, then the lines of least squares. Returns the outputs."""

    def feel(r: _Replacement, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen = moments_along(args[0], r.source.axis)
        r.seen = seen if r.seen is None else r.seen.merge(seen)
        if _learns_by_running(r.inner):
            r.new.train()(args[0].clone())

    def compare(r: _Replacement, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        z = r.normalized(args[0])
        if not r.fit.count:
            r.affine_last = _is_affine_last(r, args[0], z)
        r.fit.add(z, r.source.core.forward(args[0].clone()), r.source.axis)

    outputs = _with_hooks(model, {r.source.module: partial(feel, r) for r in replacements}, forward, batches)
    for r in replacements:
        r.new.eval()
        _give_moments(r)
        if r.norm is not None:
            _give_affine(r, torch.ones(()), torch.zeros(()))
    _with_hooks(model, {r.source.module: partial(compare, r) for r in replacements}, forward, batches)
    return outputs


def _tried(model: nn.Module, replacements: list[_Replacement], run: Callable[[], list[list[Tensor]]], before: list[list[Tensor]]) -> float:
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
        _give_affine(r, *r.expected)  # type: ignore[misc]
    by_estimates = error() if both else float("inf")
    for r in replacements:
        if r.fitted is None:
            continue
        if r.expected is not None and by_estimates < by_data:
            r.kept.append(BY_ESTIMATES + ", which is nearer on the calibration data than least squares layer by layer")
        else:
            _give_affine(r, *r.fitted)
            r.kept.append(BY_DATA)
    return min(by_data, by_estimates)


def _with_hooks(model: nn.Module, hooks: dict[nn.Module, Callable[..., None]], forward: Forward, batches: list[Any]) -> list[list[Tensor]]:
    handles = [module.register_forward_pre_hook(hook, prepend=True) for module, hook in hooks.items()]
    try:
        return [floating(forward(model, batch)) for batch in batches]
    finally:
        for handle in handles:
            handle.remove()


def _is_affine_last(r: _Replacement, x: Tensor, z: Tensor) -> bool:
    """Whether weight 2 and bias 1 give 2 z + 1; not so in norms that scale once more, or add their bias first."""
    _give_affine(r, torch.full((), 2.0), torch.full((), 1.0))
    expected = z.double() * (2 if _holds(r, "weight") else 1) + (1 if _holds(r, "bias") else 0)
    moved = r.normalized(x).double()
    _give_affine(r, torch.ones(()), torch.zeros(()))
    return not z.numel() or difference([expected], [moved]) < torch.finfo(z.dtype).eps ** 0.5


def _learns_by_running(norm: nn.Module) -> bool:
    """Whether a norm has a state that only its own training forward can fill: whitening matrices, a first batch."""
    buffers = {name for name, _ in norm.named_buffers()}
    return bool(buffers) and not {"running_mean", "running_var"} <= buffers


def _give_moments(r: _Replacement) -> None:
    """Running estimates for the new norm: those of the old one, of the one before it, or of the calibration data."""
    if r.norm is None:
        return
    known = _known_moments(r)
    batches = getattr(r.source.inner, "num_batches_tracked", None)
    if known is None and r.seen is not None:
        unbiased = r.seen.count / max(r.seen.count - 1, 1)
        known, batches = (r.seen.mean[0], r.seen.var[0] * unbiased), None
    if known is None:
        return
    for name, value in (("mean", known[0]), ("var", known[1]), ("std", known[1].sqrt())):
        buffer = getattr(r.inner, f"running_{name}", None)
        if isinstance(buffer, Tensor) and buffer.shape == value.shape:
            buffer.copy_(value)
    tracked = getattr(r.inner, "num_batches_tracked", None)
    if isinstance(tracked, Tensor):
        tracked.copy_(torch.ones_like(tracked) if batches is None else batches)


def _known_moments(r: _Replacement) -> tuple[Tensor, Tensor] | None:
    if (known := r.source.moments()) is not None:
        return known
    record = record_of(r.source.core)
    if record is None or not {"running_mean", "running_var"} <= record.state.keys():
        return None
    return record.state["running_mean"].double().to(_device(r)), record.state["running_var"].double().to(_device(r))


def _device(r: _Replacement) -> torch.device:
    return next((t.device for t in (*r.source.core.parameters(), *r.source.core.buffers())), torch.device("cpu"))


def _fill(r: _Replacement, *, calibrated: bool) -> None:
    """Give the new norm its values, and say what is kept and what is lost."""
    source, record = r.source, record_of(r.source.core)
    if parametrized(source.inner):
        r.lost.append(f"the parametrization of {', '.join(parametrized(source.inner))}: its present value is taken")
    if hooks := len(source.module._forward_hooks) + len(source.module._forward_pre_hooks):
        r.lost.append(f"{hooks} forward hooks, which stay with the old module")
    untouched = record is not None and record.untouched(source.inner)
    if record is not None and untouched and record.fits(r.inner):
        record.restore(r.inner)
        r.kept.append("parameters and estimates exactly: those of the norm that stood here before the last swap")
        return
    if record is not None and not untouched:
        r.lost.append("the exact way back: the parameters were trained since the last swap, and are carried over")
    if not (_same_meaning(r) and _copied(r)):
        _carry(r, calibrated=calibrated)
    r.origin = record if record is not None and untouched else remember(source.kind, source.inner)


def _same_meaning(r: _Replacement) -> bool:
    assert r.source is not None
    if r.norm is None or offset(r.inner) != offset(r.source.inner):
        return False
    return r.norm.kind == r.source.kind or {r.norm.kind, r.source.kind} <= set(SAME_STATE)


def _copied(r: _Replacement) -> bool:
    """Copy everything, where the two hold the same."""
    old = remember(r.source.kind, r.source.inner)
    if not old.fits(r.inner) or _group(r.inner) != _group(r.source.inner):
        return False
    old.restore(r.inner)
    r.kept.append("all parameters and buffers")
    return True


def _group(norm: nn.Module) -> Any:
    return getattr(norm, "num_groups", None)


def _carry(r: _Replacement, *, calibrated: bool) -> None:
    """Weight and bias per channel: fitted to data, to running estimates, or as they are."""
    if r.norm is None:
        r.lost.append(f"weight and bias: {type(r.new).__name__} is no norm that is known here, and starts as it was made")
        return
    if r.norm.after:
        r.lost.append(f"the output as it was: {type(r.inner).__name__} applies {type(r.norm.after[0]).__name__}, too")
    known = _known_moments(r)
    _give_moments(r)
    if r.norm.moments() is not None:
        if known is not None:
            r.kept.append("the running mean and variance")
        elif r.seen is not None:
            r.kept.append("running estimates measured on the calibration data")
        else:
            r.lost.append("sense in evaluation: its running estimates start at 0 and 1; pass calibrate, or recalibrate before use")
    weight, bias = r.source.affine()
    names = {name for name in ("weight", "bias") if _holds(r, name)}
    if not names:
        if weight is not None or bias is not None:
            r.lost.append(f"weight and bias: {type(r.inner).__name__} has none per channel")
        return
    if calibrated and r.fit.count and r.affine_last:
        r.fitted = _fitted(r, names)
    elif calibrated:
        reason = "its weight and bias do not come last" if r.fit.count else "no batch reached it"
        r.lost.append(f"the fit to the calibration data: {reason}")
    if known is not None:
        r.expected = _expected(r, known, weight, bias)
    new = r.fitted or r.expected or (weight, bias)
    if r.fitted is None:
        unfitted = "weight and bias as they are; the output changes as far as the statistics differ"
        r.kept.append(unfitted if r.expected is None else BY_ESTIMATES)
    for name, value, neutral in (("weight", new[0], 1), ("bias", new[1], 0)):
        if name not in names and value is not None and bool((value != neutral).any()):
            r.lost.append(f"the {name}, which {type(r.inner).__name__} does not have")
    _give_affine(r, *new)


def _fitted(r: _Replacement, names: set[str]) -> _Affine:
    """What of the line of least squares the new norm has parameters for."""
    if names == {"weight"}:
        return r.fit.slope_through_zero(), None
    return r.fit.line() if "weight" in names else (None, r.fit.intercept())


def _expected(r: _Replacement, known: tuple[Tensor, Tensor], weight: Tensor | None, bias: Tensor | None) -> _Affine | None:
    """The affine map with which the new norm is expected to give what the old one gave; None where that is not known."""
    assert r.norm is not None
    old, new = pooled(r.source, *known), pooled(r.norm, *known)
    if old is None or new is None:
        return None
    factor = (torch.ones_like(old[0]) if weight is None else weight) / old[1]
    summand = torch.zeros_like(old[0]) if bias is None else bias
    return factor * new[1], summand + factor * (new[0] - old[0])


def _holds(r: _Replacement, name: str) -> bool:
    value = getattr(r.inner, name, None)
    return isinstance(value, Tensor) and r.norm is not None and value.numel() == r.norm.channels


def _give_affine(r: _Replacement, weight: Tensor | None, bias: Tensor | None) -> None:
    """Set factor and summand of the new norm, where it has them."""
    if weight is not None and _holds(r, "weight"):
        raw = weight - offset(r.inner)
        if getattr(r.inner, "weight_mode", None) == "abs":
            if bool((weight < 0).any()):
                r.lost.append(f"the sign of {int((weight < 0).sum())} factors; pass weight_mode='signed'")
            raw = weight.abs() - r.inner.eps
        _set(r.inner.weight, raw)
    if bias is not None and _holds(r, "bias"):
        _set(r.inner.bias, bias)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.reshape(-1).expand(parameter.numel()).reshape(parameter.shape))


def _share(model: nn.Module, replacements: list[_Replacement]) -> None:
    """Keep parameters themselves where their values stay; keep ties where both ends change to the same value."""
    held = owners(model)
    first: dict[nn.Parameter, list[tuple[_Replacement, str, nn.Parameter]]] = {}
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


def _change(r: _Replacement) -> Change:
    new = str(r.norm) if r.norm is not None else type(r.new).__name__
    after = "".join(f" + {type(part).__name__}" for part in r.source.after)
    return Change(r.names, f"{r.source} -> {new}{after}", tuple(r.kept), tuple(dict.fromkeys(r.lost)))
