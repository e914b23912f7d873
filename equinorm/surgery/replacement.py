"""One norm on its way to becoming another: what it was, what takes its place, and the values that go across."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.core import Moments
from equinorm.surgery.calling import difference
from equinorm.surgery.kinds import Norm, offset, parametrized, read
from equinorm.surgery.population import Regression
from equinorm.surgery.record import Replaced, record_of, remember
from equinorm.surgery.target import pooled

AffineMap = tuple[Tensor | None, Tensor | None]
BY_DATA = "the output on the calibration data: weight and bias fitted by least squares"
BY_ESTIMATES = "the output in expectation: weight and bias fitted to the running estimates"
SAME_STATE = ("batch", "sync_batch", "ghost_batch")  # one meaning of weight, bias and running estimates


@dataclass
class Replacement:
    """One norm, what takes its place, and what is learned on the way."""

    names: tuple[str, ...]
    source: Norm
    new: nn.Module  # the norm, with a change of layout where it needs one
    kept: list[str]
    lost: list[str] = field(default_factory=list)
    seen: Moments | None = None
    fit: Regression = field(default_factory=Regression)
    affine_last: bool = True  # whether weight and bias come last in the new norm, so that a line can be fitted
    fitted: AffineMap | None = None
    expected: AffineMap | None = None
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


def is_affine_last(r: Replacement, x: Tensor, z: Tensor) -> bool:
    """Whether weight 2 and bias 1 give 2 z + 1; not so in norms that scale once more, or add their bias first."""
    give_affine(r, torch.full((), 2.0), torch.full((), 1.0))
    expected = z.double() * (2 if _holds(r, "weight") else 1) + (1 if _holds(r, "bias") else 0)
    moved = r.normalized(x).double()
    give_affine(r, torch.ones(()), torch.zeros(()))
    return not z.numel() or difference([expected], [moved]) < torch.finfo(z.dtype).eps ** 0.5


def learns_by_running(norm: nn.Module) -> bool:
    """Whether a norm has a state that only its own training forward can fill: whitening matrices, a first batch."""
    buffers = {name for name, _ in norm.named_buffers()}
    return bool(buffers) and not {"running_mean", "running_var"} <= buffers


def give_moments(r: Replacement) -> None:
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


def _known_moments(r: Replacement) -> tuple[Tensor, Tensor] | None:
    if (known := r.source.moments()) is not None:
        return known
    record = record_of(r.source.core)
    if record is None or not {"running_mean", "running_var"} <= record.state.keys():
        return None
    return record.state["running_mean"].double().to(_device(r)), record.state["running_var"].double().to(_device(r))


def _device(r: Replacement) -> torch.device:
    return next((t.device for t in (*r.source.core.parameters(), *r.source.core.buffers())), torch.device("cpu"))


def fill(r: Replacement, *, calibrated: bool) -> None:
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


def _same_meaning(r: Replacement) -> bool:
    assert r.source is not None
    if r.norm is None or offset(r.inner) != offset(r.source.inner):
        return False
    return r.norm.kind == r.source.kind or {r.norm.kind, r.source.kind} <= set(SAME_STATE)


def _copied(r: Replacement) -> bool:
    """Copy everything, where the two hold the same."""
    old = remember(r.source.kind, r.source.inner)
    if not old.fits(r.inner) or _group(r.inner) != _group(r.source.inner):
        return False
    old.restore(r.inner)
    r.kept.append("all parameters and buffers")
    return True


def _group(norm: nn.Module) -> Any:
    return getattr(norm, "num_groups", None)


def _carry(r: Replacement, *, calibrated: bool) -> None:
    """Weight and bias per channel: fitted to data, to running estimates, or as they are."""
    if r.norm is None:
        r.lost.append(f"weight and bias: {type(r.new).__name__} is no norm that is known here, and starts as it was made")
        return
    if r.norm.after:
        r.lost.append(f"the output as it was: {type(r.inner).__name__} applies {type(r.norm.after[0]).__name__}, too")
    known = _known_moments(r)
    give_moments(r)
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
    give_affine(r, *new)


def _fitted(r: Replacement, names: set[str]) -> AffineMap:
    """What of the line of least squares the new norm has parameters for."""
    if names == {"weight"}:
        return r.fit.slope_through_zero(), None
    return r.fit.line() if "weight" in names else (None, r.fit.intercept())


def _expected(r: Replacement, known: tuple[Tensor, Tensor], weight: Tensor | None, bias: Tensor | None) -> AffineMap | None:
    """The affine map with which the new norm is expected to give what the old one gave; None where that is not known."""
    assert r.norm is not None
    old, new = pooled(r.source, *known), pooled(r.norm, *known)
    if old is None or new is None:
        return None
    factor = (torch.ones_like(old[0]) if weight is None else weight) / old[1]
    summand = torch.zeros_like(old[0]) if bias is None else bias
    return factor * new[1], summand + factor * (new[0] - old[0])


def _holds(r: Replacement, name: str) -> bool:
    value = getattr(r.inner, name, None)
    return isinstance(value, Tensor) and r.norm is not None and value.numel() == r.norm.channels


def give_affine(r: Replacement, weight: Tensor | None, bias: Tensor | None) -> None:
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
