"""Rules on the scale of the signal over depth and time."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from equinorm.probe.diagnose.view import View, names, number, owner, slope, unique
from equinorm.probe.findings import Finding, Severity
from equinorm.probe.record import Call, Stats

LONG = 8  # calls of one module from which they count as steps in time


class Run(NamedTuple):
    """A stretch of a profile over which it grows or shrinks step by step.

    Attributes:
        first, last: indices of its ends.
        log_factor: signed logarithm of the change from one end to the other, single steps counted up to a bound.
        rate: signed robust slope per step.
    """

    first: int
    last: int
    log_factor: float
    rate: float


def longest_growth(profile: Sequence[float], bound: float) -> Run | None:
    """The stretch of the largest change in a profile of logarithms, if several steps share in it.

    A median of three takes single outliers away; a step counts with ``bound`` at most, because what happens in one step is a jump, not
    growth.
    """
    n = len(profile)
    if n < 4:
        return None
    medians = [profile[0], *(statistics.median(profile[i - 1 : i + 2]) for i in range(1, n - 1)), profile[-1]]
    smooth = [0.0]
    for before, after in pairwise(medians):
        smooth.append(smooth[-1] + min(max(after - before, -bound), bound))
    best: tuple[float, int, int] = (0.0, 0, 0)
    for sign in (1, -1):
        lowest = 0
        for j in range(1, n):
            if sign * (smooth[j] - smooth[lowest]) > abs(best[0]):
                best = (smooth[j] - smooth[lowest], lowest, j)
            if sign * (smooth[j] - smooth[lowest]) < 0:
                lowest = j
    change, first, last = best
    if last - first < 3 or max(abs(b - a) for a, b in pairwise(smooth[first : last + 1])) > abs(change) / 2:
        return None
    first = _elbow(smooth, first, last)
    change, rate = smooth[last] - smooth[first], slope(smooth[first : last + 1])
    return Run(first, last, change, rate) if rate * change > 0 else None


def _elbow(profile: Sequence[float], first: int, last: int) -> int:
    """Where a stretch stops being level and begins to rise or fall: the corner of the best fit by a level and a straight line.

    The earliest corner is taken whose residual is within 0.1 (10 % of the signal) of the best one's.
    """
    values = profile[first : last + 1]
    n = len(values)
    mean = sum(values) / n
    residuals: list[tuple[int, float]] = []
    for corner in range(0, n - 3, max(1, n // 200)):
        ramp = [max(0, i - corner) for i in range(n)]
        middle = sum(ramp) / n
        spread = sum((u - middle) ** 2 for u in ramp)
        rise = sum((u - middle) * (v - mean) for u, v in zip(ramp, values, strict=True)) / spread
        error = sum((v - mean - rise * (u - middle)) ** 2 for u, v in zip(ramp, values, strict=True))
        residuals.append((corner, math.sqrt(error / n)))
    best = min(error for _, error in residuals)
    return first + next(corner for corner, error in residuals if error <= best + 0.1)


def _logs(stats: Sequence[Stats | None], *, total: bool = False) -> list[float] | None:
    """Logarithms of rms, or of norms; None if one is missing, 0 or not finite."""
    result = []
    for one in stats:
        if one is None or not one.finite or one.rms <= 0:
            return None
        result.append(math.log(one.rms) + (math.log(one.count) / 2 if total else 0.0))
    return result


def _points(view: View) -> list[Call]:
    """The calls that stand for depth: the first calls of linear layers, on the path of the signal."""
    return [c for c in view.leaves if c.role in ("linear", "recurrent") and c.number == 0 and c.forward is not None and c.forward.count > 0]


def gains(view: View) -> list[tuple[Call, float]]:
    """Every linear layer with the logarithm of its gain, output rms / input rms."""
    found = []
    for call in _points(view):
        before, after = call.input, call.forward
        if call.role == "linear" and before and after and before.finite and after.finite and before.rms > 0 and after.rms > 0:
            found.append((call, math.log(after.rms / before.rms)))
    return found


def scale_jump(view: View) -> Iterator[Finding]:
    """One layer whose gain is far from that of the others, and no norm behind it."""
    measured = gains(view)
    if len(measured) < 4:
        return
    middle = statistics.median(log for _, log in measured)
    for call, log in measured:
        factor = math.exp(log - middle)
        apart = max(factor, 1 / factor)
        if apart < view.t["jump"] or view.before_norm(call):
            continue
        assert call.input is not None
        assert call.forward is not None
        severity: Severity = "severe" if apart >= view.t["growth_severe"] else "warning"
        way = "multiplies the signal by" if log > 0 else "shrinks the signal to"
        yield Finding(
            kind="scale_jump", severity=severity, layers=(call.name,), calls=(call.index,),
            sentence=f"{names([call.name])} {way} {number(math.exp(log))} times its size (rms {number(call.input.rms)} to "
            f"{number(call.forward.rms)}), while the middle one of the {len(measured)} linear layers has a gain of "
            f"{number(math.exp(middle))}: "
            f"it is off by a factor of {number(apart)}.",
            evidence={"gain": math.exp(log), "median_gain": math.exp(middle), "factor": factor},
        )  # fmt: skip


def _sums(view: View) -> list[Call]:
    """Residual sums in a row, each built on the one before."""
    chain: list[Call] = []
    reach: dict[int, set[int]] = {}
    for call in view.leaves:
        above: set[int] = set()
        for index in call.inputs:
            above |= reach.get(index, set())
        if call.role == "residual" and call.forward is not None and call.forward.finite and call.forward.rms > 0:
            if not chain or chain[-1].index in above:
                chain.append(call)
            above = {*above, call.index}
        reach[call.index] = above
    return chain


def residual_growth(view: View) -> Iterator[Finding]:
    """The residual stream is multiplied at every sum."""
    chain = _sums(view)
    if len(chain) < 4:
        return
    sizes = [math.log(call.forward.rms) for call in chain if call.forward is not None]
    run = longest_growth(sizes, math.log(view.t["jump"]))
    if run is None or run.log_factor <= 0:
        return
    count = run.last - run.first + 1
    excess = math.exp(run.log_factor) / math.sqrt(count)
    if excess < view.t["residual_excess"]:
        return
    stretch = chain[run.first : run.last + 1]
    factor = math.exp(run.log_factor)
    overtakes = next((call for call in chain if call.residual is not None and call.residual.share >= 1), None)
    shares = statistics.median(call.residual.share for call in stretch if call.residual is not None)
    modules = unique([owner(call) for call in stretch])
    first_of_growth = max(0, run.first)
    layers = unique([owner(call) for call in chain[first_of_growth : run.last + 1]])
    evidence: dict[str, float | int | str] = {
        "factor": factor, "per_sum": math.exp(run.rate), "sums": count, "excess": excess, "branch_to_skip": shares,
    }  # fmt: skip
    if overtakes is not None:
        evidence["overtakes_at"] = overtakes.name
    yield Finding(
        kind="residual_growth", severity="severe" if factor >= view.t["growth_severe"] else "warning", layers=layers,
        calls=tuple(call.index for call in stretch),
        sentence=f"Over {count} residual sums from {names([modules[0]])} to {names([modules[-1]])} the signal grows {number(factor)} "
        "times, "
        f"{math.exp(run.rate):.2f} times at each; equal branches kept in scale would give {number(math.sqrt(count))}. "
        f"A branch has {number(shares)} times the size of its skip.",
        evidence=evidence,
    )  # fmt: skip


def _explained_by_sums(view: View, log_factor: float) -> bool:
    """Whether the residual stream itself grows by most of a change."""
    chain = _sums(view)
    if len(chain) < 4 or not any(True for _ in residual_growth(view)):
        return False
    first, last = chain[0].forward, chain[-1].forward
    assert first is not None
    assert last is not None
    return math.log(last.rms / first.rms) >= log_factor / 2


def _series(points: list[Call]) -> list[list[Call]]:
    """Layers that can be compared: those of one name up to its numbers, such as the second convolution of every block.

    Layers of different kinds in one block have sizes of their own (keys and values, say), which would pass for growth. Where no four
    layers share a name, all of them are one series.
    """
    for numbers in (r"(?<![^.])\d+(?![^.])", r"\d+"):
        groups: dict[str, list[Call]] = {}
        for call in points:
            groups.setdefault(re.sub(numbers, "*", call.name), []).append(call)
        if long := [group for group in groups.values() if len(group) >= 4]:
            return long
    return [points] if len(points) >= 4 else []


class Trend(NamedTuple):
    """The growth of one series.

    Attributes:
        points: the layers of the stretch, the one that starts it first.
        run: the stretch.
        start, end: logarithms of the signal at its ends.
    """

    points: list[Call]
    run: Run
    start: float
    end: float


def _strongest(trends: list[Trend]) -> Trend | None:
    """The series that changes most, from the first layer of all those that change at least half as much in the same direction."""
    if not trends:
        return None
    best = max(trends, key=lambda trend: abs(trend.run.log_factor))
    alike = [trend for trend in trends if trend.run.log_factor / best.run.log_factor >= 0.5]
    starts = [trend.points[0] for trend in alike]
    backward = best.points[0].index > best.points[-1].index
    first = (max if backward else min)(starts, key=lambda call: call.index)
    return best._replace(points=best.points if first is best.points[0] else [first, *best.points])


def _trend(view: View, points: list[Call], profile: list[float], offset: int) -> Trend | None:
    """The growth of a profile that begins ``offset`` entries before the points do."""
    run = longest_growth(profile, math.log(view.t["jump"]))
    if run is None:
        return None
    stretch = points[max(0, run.first - offset + 1) if offset else run.first : run.last - offset + 1]
    return Trend(stretch, run, profile[run.first], profile[run.last])


def forward_growth(view: View) -> Iterator[Finding]:
    """Activations grow exponentially from layer to layer, or what differs between samples and positions shrinks so.

    Growth is judged by the rms. Shrinking is judged by the standard deviation within channels: biases and means keep the rms up while the
    part that depends on the input goes.
    """
    points = [call for call in _points(view) if call.forward is not None and call.forward.finite and call.forward.rms > 0]
    rising, falling = [], []
    for series in _series(points):
        start = series[0].input if not series[0].inputs else None
        fed = int(start is not None and start.finite and start.rms > 0 and start.std > 0)
        sizes = [math.log(call.forward.rms) for call in series if call.forward is not None]
        varied = [call for call in series if call.channels is not None and call.channels.variance > 0]
        spread = [math.log(call.channels.variance) / 2 for call in varied if call.channels is not None]
        if fed and start is not None:
            sizes, spread = [math.log(start.rms), *sizes], [math.log(start.std), *spread]
        if (trend := _trend(view, series, sizes, fed)) and trend.run.log_factor > 0:
            rising.append(trend)
        if len(varied) == len(series) and (trend := _trend(view, series, spread, fed)) and trend.run.log_factor < 0:
            falling.append(trend)
    up, down = _strongest(rising), _strongest(falling)
    if up is not None and (severity := view.severity(math.exp(up.run.log_factor), "growth")):
        if not _explained_by_sums(view, up.run.log_factor):
            yield _growth("exploding_forward", severity, up, "activations")
        return
    if down is not None and (severity := view.severity(math.exp(-down.run.log_factor), "growth")):
        yield _growth("vanishing_forward", severity, down, "the differences between samples")


def backward_growth(view: View) -> Iterator[Finding]:
    """Gradients grow or shrink exponentially from the last layers to the first ones."""
    points = [call for call in _points(view) if call.gradient is not None and call.gradient.finite and call.gradient.rms > 0]
    trends = []
    for series in _series(points[::-1]):
        profile = _logs([call.gradient for call in series], total=True)
        if profile is not None and (trend := _trend(view, series, profile, 0)):
            trends.append(trend)
    trend = _strongest(trends)
    if trend is not None and (severity := view.severity(math.exp(abs(trend.run.log_factor)), "growth")):
        kind = "exploding_backward" if trend.run.log_factor > 0 else "vanishing_backward"
        yield _growth(kind, severity, trend, "gradients")


def _growth(kind: str, severity: Severity, trend: Trend, what: str) -> Finding:
    grows, rate, steps = trend.run.log_factor > 0, math.exp(trend.run.rate), trend.run.last - trend.run.first
    factor = math.exp(trend.end - trend.start)
    return Finding(
        kind=kind, severity=severity, layers=unique([call.name for call in trend.points]), calls=tuple(call.index for call in trend.points),
        sentence=f"Starting at {names([trend.points[0].name])}, {what} {'grow' if grows else 'shrink'} by a factor of "
        f"{number(max(factor, 1 / factor))} over {steps} layers, from {number(math.exp(trend.start))} to {number(math.exp(trend.end))}: "
        f"{'' if grows else 'to '}{number(rate)} {'times' if grows else 'of their size'} at each.",
        evidence={
            "factor": factor, "rate": rate, "layers": steps, "start": trend.points[0].name, "end": trend.points[-1].name,
        },
    )  # fmt: skip


def over_time(view: View) -> Iterator[Finding]:
    """The same over the time steps of a recurrent layer, or over the calls of a module that is called again and again."""
    for call in view.leaves:
        if call.steps is None:
            continue
        if finding := _steps(view, call, list(call.steps.forward), "activations"):
            yield finding
        if finding := _steps(view, call, list(reversed(call.steps.gradient)), "gradients"):
            yield finding
    repeated: dict[str, list[Call]] = {}
    for call in view.leaves:
        if call.kind == "module" and call.role in ("linear", "recurrent") and call.forward is not None:
            repeated.setdefault(call.name, []).append(call)
    for calls in repeated.values():
        if len(calls) < LONG:
            continue
        if finding := _steps(
            view, calls[0], [c.forward.rms if c.forward is not None and c.forward.finite else 0.0 for c in calls], "activations"
        ):
            yield finding
        backwards = [c.gradient.rms if c.gradient is not None and c.gradient.finite else 0.0 for c in reversed(calls)]
        if finding := _steps(view, calls[0], backwards, "gradients"):
            yield finding


def _steps(view: View, call: Call, sizes: list[float], what: str) -> Finding | None:
    """Growth over steps; a gradient that becomes exactly 0 on the way has vanished there."""
    while sizes and sizes[-1] == 0:
        sizes.pop()
    if len(sizes) < 4 or any(size <= 0 or not math.isfinite(size) for size in sizes):
        return None
    run = longest_growth([math.log(size) for size in sizes], math.log(view.t["jump"]))
    if run is None:
        return None
    severity = view.severity(math.exp(abs(run.log_factor)), "growth")
    if severity is None:
        return None
    gated = call.type in ("LSTM", "GRU", "LSTMCell", "GRUCell")
    shrinks = run.log_factor < 0
    if shrinks and what == "activations":
        return None  # the state forgets its beginning, as it may
    if shrinks and gated:
        severity = "warning"  # gates learn to stay open
    verb = "shrink" if shrinks else "grow"
    where = "back through" if what == "gradients" else "over"
    kind = ("vanishing" if shrinks else "exploding") + ("_backward" if what == "gradients" else "_forward")
    return Finding(
        kind=kind, severity=severity, layers=(call.name,), calls=(call.index,),
        sentence=f"{names([call.name])}: {what} {verb} by a factor of {number(math.exp(abs(run.log_factor)))} {where} "
        f"{run.last - run.first} time "
        f"steps, {number(math.exp(run.rate))} times at each.",
        evidence={"factor": math.exp(run.log_factor), "rate": math.exp(run.rate), "steps": run.last - run.first},
        suggestion="gated_cell" if shrinks and not gated else "clip_gradient",
    )  # fmt: skip
