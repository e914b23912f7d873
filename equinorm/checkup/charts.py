"""The figures of the page: the signal over depth, forward and backward, before and after; channels; residual sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from equinorm.checkup.numbers import profiled, short
from equinorm.page.svg import INK, MUTED, drawing, markup, series
from equinorm.probe.record import Call, Report

WIDE, NARROW = (10.8, 3.4), (4.9, 3.2)  # inches of 72 units each; a unit is about a pixel on the page
DOTTED = 60  # up to so many layers each gets a dot
MARKED = 9  # at most so many findings get a number in a figure
ROWS = 64  # of the heat map
DECADES = 2.0  # of the heat map's colours, up and down

BEFORE, AFTER = series(1), series(2)
SQUARED_MEAN, VARIANCE, BRANCH = series(2), series(1), series(3)


@dataclass(frozen=True)
class Mark:
    """A finding's number and the call where it stands in a figure."""

    number: int
    call: int


def signal(report: Report, name: str, marks: Sequence[Mark] = (), after: Report | None = None, *, narrow: bool = False) -> Markup:
    """Root mean square of every layer's output over depth, on a log scale."""
    return _profile(report, name, marks, after, "output, rms", lambda call: call.forward.rms if call.forward else math.nan, narrow)


def gradient(report: Report, name: str, marks: Sequence[Mark] = (), after: Report | None = None, *, narrow: bool = False) -> Markup:
    """Root mean square of the loss's gradient with respect to every layer's output, over depth, on a log scale."""
    return _profile(report, name, marks, after, "gradient, rms", lambda call: call.gradient.rms if call.gradient else math.nan, narrow)


def has_gradient(report: Report) -> bool:
    """Whether there was a backward pass to draw."""
    return any(call.gradient is not None for call in profiled(report))


def differ(report: Report, after: Report, what: str) -> bool:
    """Whether the profile of the "signal" or the "gradient" changed by more than a thousandth anywhere, so that both are worth drawing."""

    def sizes(run: Report) -> list[float]:
        measured = ((call.forward if what == "signal" else call.gradient) for call in profiled(run))
        return [_drawable(stats.rms) for stats in measured if stats is not None]

    before, now = sizes(report), sizes(after)
    return len(before) != len(now) or not np.allclose(before, now, rtol=1e-3, atol=0, equal_nan=True)


def _profile(
    report: Report, name: str, marks: Sequence[Mark], after: Report | None, what: str, value: Callable[[Call], float], narrow: bool
) -> Markup:
    with drawing(name, NARROW if narrow else WIDE) as (figure, axes):
        runs = [(report, BEFORE, "solid"), *([(after, AFTER, (0, (5, 2)))] if after is not None else [])]
        for run, colour, dash in runs:
            calls = list(profiled(run))
            x = [call.position for call in calls]
            y = [_drawable(value(call)) for call in calls]
            axes.plot(x, y, color=colour, lw=1.6, ls=dash)
            linear = [(px, py) for call, px, py in zip(calls, x, y, strict=True) if call.role == "linear"]
            if linear and len(linear) <= DOTTED:
                axes.plot(*zip(*linear, strict=True), color=colour, ls="none", marker="o", ms=3.5)
        log_scale(axes, headroom=1.15 if marks else 1.0)
        place = {call.index: (call.position, _drawable(value(call))) for call in profiled(report)}
        taken: set[float] = set()
        for mark in marks:
            position, height = place.get(mark.call, (math.nan, math.nan))
            if math.isnan(height) or position in taken or len(taken) == MARKED:
                continue
            taken.add(position)
            axes.annotate(
                str(mark.number),
                (position, height),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                color=INK,
                fontsize=11,
                weight="bold",
            )
            axes.plot([position], [height], marker="o", ms=8, mfc="none", mec=INK, mew=1.3)
        _depth(axes)
        axes.set_ylabel(what)
    return markup(figure, name, f"{what} over depth, on a log scale")


def propagation(report: Report, name: str, *, narrow: bool = False) -> Markup | None:
    """Brock's signal propagation plot: average channel squared mean and average channel variance, over depth.

    At residual sums where the network has several, with the variance at the end of each branch; else at every layer. None without channels.
    """
    sums = [call for call in report.calls if call.residual is not None and call.channels is not None]
    calls = sums if len(sums) > 1 else [call for call in profiled(report) if call.channels is not None]
    if len(calls) < 2:
        return None
    with drawing(name, NARROW if narrow else WIDE) as (figure, axes):
        x = [call.position for call in calls]
        for colour, what in ((SQUARED_MEAN, "squared_mean"), (VARIANCE, "variance")):
            axes.plot(x, [_drawable(getattr(call.channels, what)) for call in calls], color=colour, lw=1.6)
        if calls is sums:
            ends = [(call.position, _variance(report, call.residual.branch_from)) for call in sums if call.residual]
            axes.plot(*zip(*ends, strict=True), color=BRANCH, lw=1.2, ls=(0, (5, 2)))
        log_scale(axes)
        _depth(axes)
        axes.set_ylabel("average over channels")
    return markup(figure, name, "average channel squared mean and variance over depth, on a log scale")


def has_sums(report: Report) -> bool:
    """Whether the network has residual sums to draw."""
    return sum(call.residual is not None for call in report.calls) > 1


def residuals(report: Report, name: str, *, narrow: bool = False) -> Markup:
    """Size of the residual branch over that of the skip at every sum, over depth."""
    calls = [call for call in report.calls if call.residual is not None]
    with drawing(name, NARROW if narrow else WIDE) as (figure, axes):
        axes.axhline(1, color=MUTED, lw=1)
        y = [_drawable(call.residual.share) for call in calls if call.residual]
        style = {"marker": "o", "ms": 3.5} if len(calls) <= DOTTED else {}
        axes.plot([call.position for call in calls], y, color=BRANCH, lw=1.6, **style)
        log_scale(axes)
        _depth(axes)
        axes.set_ylabel("branch / skip, rms")
    return markup(figure, name, "size of the residual branch over that of the skip, over depth, on a log scale")


def channels(report: Report, name: str, *, narrow: bool = False) -> Markup | None:
    """A column per layer, a row per channel or run of channels: its size over the layer's typical one, as colour. None without channels.

    The colours are drawn with transparency, so that a typical channel is the paper's colour, light or dark.
    """
    calls = [call for call in profiled(report) if call.channels is not None and len(call.channels.rms) > 1]
    if len(calls) < 2:
        return None
    image = np.zeros((ROWS, len(calls), 4))
    for column, call in enumerate(calls):
        assert call.channels is not None
        rms = np.asarray(call.channels.rms, dtype=float)
        rms = rms[np.arange(ROWS) * len(rms) // ROWS]  # stretched to the same height
        alive = rms[rms > 0]
        with np.errstate(divide="ignore"):
            ratio = np.log10(rms / (np.median(alive) if len(alive) else 1.0))
        image[:, column, :3] = np.where(ratio[:, None] > 0, (0.85, 0.35, 0.05), (0.10, 0.45, 0.85))
        image[:, column, 3] = np.clip(np.abs(ratio) / DECADES, 0, 1)
        image[rms == 0, column] = (0.70, 0.10, 0.55, 1.0)
    with drawing(name, NARROW if narrow else WIDE) as (figure, axes):
        axes.imshow(image, aspect="auto", interpolation="none", extent=(-0.5, len(calls) - 0.5, 100, 0))
        axes.grid(visible=False)
        axes.set_xlabel("layers with channels, in the order of the calls")
        axes.set_ylabel("channels")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.yaxis.set_major_locator(NullLocator())
    return markup(figure, name, "size of every channel relative to the typical one of its layer, a column per layer")


def log_scale(axes: Axes, headroom: float = 1.0) -> None:
    """A log scale with few, readable ticks, at least a factor of ten high; ``headroom`` stretches it upwards, for what is written there."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if not (math.isfinite(low) and math.isfinite(high)) or low <= 0:
        low, high = 0.1, 10
    if high < 10 * low:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    high = low * (high / low) ** headroom
    axes.set_ylim(low, high)
    few = math.log10(high / low) < 1.6
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _depth(axes: Axes) -> None:
    axes.set_xlabel("depth: layers passed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _drawable(value: float) -> float:
    """A positive number, or a gap in the line."""
    return value if value > 0 and math.isfinite(value) else math.nan


def _variance(report: Report, call: int) -> float:
    summary = report.calls[call].channels if call >= 0 else None
    return math.nan if summary is None else _drawable(summary.variance)
