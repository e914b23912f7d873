"""The report's figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from equinorm.compare.findings import label
from equinorm.compare.norms import NO_NORM
from equinorm.compare.results import Comparison, Row
from equinorm.page.svg import PAPER, drawing, markup, series

COLOURS = 7  # of --series-1 ... --series-7; --series-0 is for no norm
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))

WIDE, NARROW, PANEL = (10.8, 5.2), (4.9, 4.4), (4.9, 3.5)  # inches of 72 units each; a unit is about a pixel on the page
CROWDED = 4  # a close-up is worth showing where it enlarges this much
DODGE = 0.25  # of the distance between two batch sizes that differ by a factor of two


@dataclass(frozen=True)
class Style:
    """How a norm looks in every figure of a comparison.

    Attributes:
        norm: its specification.
        index: its number in the comparison; elements of the figures are named after it.
        variable: the style sheet's colour.
        placeholder: the colour in matplotlib.
        marker, glyph: the mark in the figure, and the character for it in the legend.
        dash: matplotlib's line style.
    """

    norm: str
    index: int
    variable: str
    placeholder: str
    marker: str
    glyph: str
    dash: str | tuple[int, tuple[float, float]]


def styles(norms: Sequence[str]) -> list[Style]:
    """A style for each norm: seven colours with a mark each, then the same colours with other marks and dashes; grey for no norm."""
    found, used = [], 0
    for index, norm in enumerate(norms):
        if norm == NO_NORM:
            found.append(Style(norm, index, "--series-0", series(0), "o", "○", DASHES[1]))
            continue
        colour, again = used % COLOURS, used // COLOURS
        marker, glyph = MARKERS[(colour + again) % len(MARKERS)]
        found.append(Style(norm, index, f"--series-{colour + 1}", series(colour + 1), marker, glyph, DASHES[again % len(DASHES)]))
        used += 1
    return found


def by_batch_size(comparison: Comparison, name: str, limits: tuple[float, float] | None = None, *, narrow: bool = False) -> Markup:
    """The metric against the batch size, a line per norm, with intervals; of the whole range or within ``limits``."""

    def value(row: Row) -> tuple[float, ...] | None:
        return (row.interval.median, row.interval.low, row.interval.high) if row.interval else None

    with drawing(name, NARROW if narrow else WIDE) as (figure, axes):
        _lines(axes, name, comparison, value)
        axes.set_ylabel(label(comparison.metric_key))
        axes.set_ylim(limits)
    return markup(figure, name, f"{label(comparison.metric_key)} against batch size, one line per norm")


def close_up(comparison: Comparison) -> tuple[float, float] | None:
    """Limits that show the better three quarters of the results; None where the whole range shows them well enough."""
    intervals = [row.interval for row in comparison.rows if row.interval]
    if not intervals:
        return None
    intervals.sort(key=lambda interval: interval.median, reverse=comparison.higher_is_better)
    better = intervals[: math.ceil(3 * len(intervals) / 4)]
    low, high = min(interval.low for interval in better), max(interval.high for interval in better)
    whole = max(interval.high for interval in intervals) - min(interval.low for interval in intervals)
    margin = 0.08 * (high - low)
    return (low - margin, high + margin) if 0 < CROWDED * (high - low) < whole else None


def learning_curves(comparison: Comparison, name: str, batch_size: int) -> Markup:
    """The metric against the epoch at one batch size: the median over seeds thick, each seed thin."""
    key = curve_key(comparison)
    with drawing(name, PANEL) as (figure, axes):
        for style in styles(comparison.plan.norms):
            curves = [_gaps(outcome.history[key]) for outcome in comparison.row(style.norm, batch_size).measured if key in outcome.history]
            for index, curve in enumerate(curves):
                axes.plot(
                    range(1, len(curve) + 1), curve, color=style.placeholder, lw=0.7, alpha=0.45, gid=f"{name}-n{style.index}-seed{index}"
                )
            middle = [statistics.median(v for v in values if v is not None) for values in zip_longest(*curves)]
            if middle:
                axes.plot(
                    range(1, len(middle) + 1), middle, color=style.placeholder, ls=style.dash, lw=2, gid=f"{name}-n{style.index}-median"
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel(label(key))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return markup(figure, name, f"{label(key)} against epoch at batch size {batch_size}, one line per norm")


def step_time(comparison: Comparison, name: str) -> Markup:
    """Milliseconds per optimizer step against the batch size; seconds per epoch where the task does not measure steps."""
    steps = measures_steps(comparison)

    def value(row: Row) -> tuple[float, ...] | None:
        seconds = row.seconds_per_step if steps else row.seconds_per_epoch
        return None if seconds is None else (seconds * (1000 if steps else 1),) * 3

    with drawing(name, PANEL) as (figure, axes):
        _lines(axes, name, comparison, value)
        axes.set_ylabel("ms per step" if steps else "s per epoch")
        axes.set_ylim(bottom=0)
    return markup(figure, name, f"time per {'step' if steps else 'epoch'} against batch size, one line per norm")


def memory(comparison: Comparison, name: str) -> Markup:
    """Peak memory against the batch size."""

    def value(row: Row) -> tuple[float, ...] | None:
        return None if row.peak_memory is None else (row.peak_memory / 2**20,) * 3

    with drawing(name, PANEL) as (figure, axes):
        _lines(axes, name, comparison, value)
        axes.set_ylabel("peak memory, MiB")
        axes.set_ylim(bottom=0)
    return markup(figure, name, "peak memory against batch size, one line per norm")


def curve_key(comparison: Comparison) -> str:
    """The metric whose learning curve is drawn: on validation data if there is one, else the reported one."""
    measured = [outcome for row in comparison.rows for outcome in row.measured]
    wanted = f"validation_{comparison.metric}"
    return wanted if any(wanted in outcome.history for outcome in measured) else comparison.metric_key


def measures_steps(comparison: Comparison) -> bool:
    """Whether the task told the time of a step."""
    return any(row.seconds_per_step is not None for row in comparison.rows)


def _gaps(values: Sequence[float | None]) -> list[float]:
    """Epochs without the metric as NaN, which is a gap in the line."""
    return [math.nan if value is None else value for value in values]


def _lines(axes: Axes, name: str, comparison: Comparison, value: Callable[[Row], tuple[float, ...] | None]) -> None:
    looks, sizes = styles(comparison.plan.norms), sorted(comparison.plan.batch_sizes)
    for style in looks:
        rows = [row for size in sizes if (row := comparison.row(style.norm, size)) and value(row) is not None]
        points = [point for row in rows if (point := value(row)) is not None]
        if not points:
            continue
        shift = DODGE * ((style.index + 0.5) / len(looks) - 0.5)  # side by side, so that intervals do not hide each other
        x = [row.batch_size * 2**shift for row in rows]
        middle, low, high = zip(*points, strict=True)
        axes.vlines(x, low, high, color=style.placeholder, lw=1.6, alpha=0.8, gid=f"{name}-n{style.index}-interval")
        line, marks = f"{name}-n{style.index}-line", f"{name}-n{style.index}-marks"
        axes.plot(x, middle, color=style.placeholder, ls=style.dash, lw=1.6, gid=line)
        face = PAPER if style.norm == NO_NORM else style.placeholder
        axes.plot(x, middle, color=style.placeholder, ls="none", marker=style.marker, ms=6, mfc=face, mew=1.2, gid=marks)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlim(sizes[0] / 2**0.4, sizes[-1] * 2**0.4)
    axes.set_xlabel("batch size")
