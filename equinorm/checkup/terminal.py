"""A report in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equinorm.checkup.numbers import Numbers, profiled, short
from equinorm.probe.findings import SUGGESTIONS
from equinorm.probe.record import Call, Report

if TYPE_CHECKING:
    from equinorm.checkup.prescribe import Prescription

COLOURS = {"severe": "bold red", "warning": "yellow", "note": "dim"}
LINES = 24  # of the profile
WIDTH = 16  # of its bars, in characters
EIGHTHS = " ▏▎▍▌▋▊▉█"


def show(report: Report, prescriptions: Sequence[Prescription] = (), console: Console | None = None) -> None:
    """Print a report: the key numbers, the profile over depth, the findings, and what was tried against them.

    Args:
        report: of :func:`equinorm.probe`.
        prescriptions: of :meth:`equinorm.probe.Report.prescribe`.
        console: rich's; default: the standard output.
    """
    console = console or Console(highlight=False)
    console.print(Text(f"{report.model}, probed", style="bold"))
    console.print(_numbers(report))
    if (profile := _profile(report)) is not None:
        console.print(profile)
    if report.failure:
        console.print(Text(f"The model raised: {report.failure}", style="bold red"))
    for number, finding in enumerate(report.findings, 1):
        head = Text.assemble((f"{number}. {finding.severity}: ", COLOURS[finding.severity]), (finding.title, "bold"))
        advice = Text(f"What helps: {SUGGESTIONS[finding.suggestion]}.", style="dim")
        console.print(head)
        console.print(Padding(Group(Text(finding.sentence), advice), (0, 0, 1, 3)))
    if not report.findings and not report.failure:
        console.print(Text("No findings.", style="green"))
    for prescription in prescriptions:
        console.print(Text(f"Prescription {prescription.number}: {prescription.title}", style="bold"))
        console.print(Padding(_tried(report, prescription), (0, 0, 1, 3)))
    for note in report.notes:
        console.print(Text(note, style="dim"))


def _numbers(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in Numbers.of(report).rows():
        table.add_row(Text(name, style="dim"), value)
    for name, stats in report.input.items():
        table.add_row(Text(f"input {name}".strip(), style="dim"), f"mean {short(stats.mean)}, standard deviation {short(stats.std)}")
    return table


def _profile(report: Report) -> Table | None:
    """A line per layer, of deep networks per run of layers: the size of the signal and of the gradient as bars on one log scale each."""
    calls = list(profiled(report))
    if not calls:
        return None
    runs = (
        [calls[len(calls) * i // LINES : len(calls) * (i + 1) // LINES] for i in range(LINES)]
        if len(calls) > LINES
        else [[c] for c in calls]
    )
    forward = [_middle([c.forward.rms for c in run if c.forward]) for run in runs]
    backward = [_middle([c.gradient.rms for c in run if c.gradient]) for run in runs]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layer", overflow="ellipsis", max_width=22, no_wrap=True)
    table.add_column("output", justify="right", no_wrap=True, min_width=7)
    table.add_column("", no_wrap=True, style="blue")
    shown = any(not math.isnan(value) for value in backward)
    if shown:
        table.add_column("gradient", justify="right", no_wrap=True, min_width=8)
        table.add_column("", no_wrap=True, style="magenta")
    for run, size, slope, bar, back in zip(runs, forward, backward, _bars(forward), _bars(backward), strict=True):
        cells = [_name(run), short(size), bar]
        table.add_row(*cells, *([short(slope), back] if shown else []))
    return table


def _name(run: list[Call]) -> str:
    return run[0].label if len(run) == 1 else f"{run[0].label} … {run[-1].label}"


def _middle(values: list[float]) -> float:
    """The geometric mean of the positive ones."""
    logs = [math.log(value) for value in values if value > 0 and math.isfinite(value)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def _bars(values: Sequence[float]) -> list[str]:
    """Bars on a log scale from the smallest value to the largest, at least two decades."""
    known = [math.log10(value) for value in values if not math.isnan(value)]
    if not known:
        return [""] * len(values)
    low, high = min(known), max(known)
    low = min(low, high - 2) - 0.05 * max(high - low, 2)
    bars = []
    for value in values:
        eighths = 0 if math.isnan(value) else round(8 * WIDTH * (math.log10(value) - low) / (high - low))
        bars.append(EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip())
    return bars


def _tried(report: Report, prescription: Prescription) -> RenderableType:
    parts: list[RenderableType] = [Text(prescription.sentence), Text(prescription.outcome, style="green" if prescription.helps else "dim")]
    if prescription.cost:
        parts.append(Text(prescription.cost, style="dim"))
    if prescription.after is not None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("", "before", "after"):
            table.add_column(title)
        before, after = dict(Numbers.of(report).rows()), dict(Numbers.of(prescription.after).rows())
        for name in {**before, **after}:
            table.add_row(Text(name, style="dim"), before.get(name, "–"), after.get(name, "–"))
        parts.append(table)
    return Group(*parts)
