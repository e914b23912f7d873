"""The numbers on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from statistics import geometric_mean, median

from equinorm.bench.goals import Goal, SideBySide
from equinorm.bench.grid import written
from equinorm.bench.measure import Timing

WIDTH_OF_A_FILE = 140
HEAD = f"{'norm':<22}{'shape':<16}{'type':<9}{'layout':<14}{'pass':<8}{'ms':>9}{'GB/s':>7}{'of copy':>9}  peers: ms and their time / ours"


def row(one: SideBySide, notes: Iterable[Timing]) -> str:
    """One entry."""
    entry, ours = one.entry, one.ours
    assert ours.seconds is not None
    assert ours.bandwidth is not None
    beside = [f"{who} {seconds * 1e3:.4g} ({seconds / ours.seconds:.2f})" for who, seconds in one.peers.items()]
    beside += [f"{timing.who} {timing.note}" for timing in notes]
    return (
        f"{entry.norm:<22}{written(entry.shape):<16}{entry.dtype:<9}{entry.layout:<14}{entry.of:<8}{ours.seconds * 1e3:>9.4g}"
        f"{ours.bandwidth / 1e9:>7.3g}{ours.of_copy:>9.0%}  {'; '.join(beside) or 'none'}"
    )


def summary(compared: Sequence[SideBySide]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table by norm and pass, of entries that are not small.

    It has the median share of a copy's bandwidth, the geometric mean of best peer / ours, and the worst of each.
    """
    head = ["norm", "pages", "pass", "of copy, median", "worst", "best peer / ours", "worst"]
    groups: dict[tuple[str, str, str], list[SideBySide]] = {}
    for one in compared:
        if not one.entry.small:
            groups.setdefault((one.entry.norm, one.entry.pages, one.entry.of), []).append(one)
    lines = []
    for key, group in groups.items():
        shares = [one.ours.of_copy for one in group if one.ours.of_copy is not None]
        ratios = [ratio for one in group if (ratio := one.ratio()) is not None]
        lines.append(
            [
                *key,
                f"{median(shares):.0%}",
                f"{min(shares):.0%}",
                f"{geometric_mean(ratios):.2f}" if ratios else "",
                f"{min(ratios):.2f}" if ratios else "",
            ]
        )
    return head, lines


def show(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed; the first three columns are text, the others numbers."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        rows = [list(head), *map(list, lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for cells in rows:
            print(
                "  ".join(
                    cell.ljust(width) if k < 3 else cell.rjust(width) for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
                )
            )
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for k, name in enumerate(head):
        table.add_column(name, justify="left" if k < 3 else "right", no_wrap=True)
    for cells in lines:
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False).print(table)


def missed(found: Sequence[Goal]) -> list[str]:
    """The geometric means, and every entry below its goal, the furthest first."""
    lines = [f"{goal.what}, {goal.where}: {goal.value:.2f}, goal {goal.target:g}" for goal in found if goal.what.startswith("geometric")]
    below = sorted((goal for goal in found if not goal.reached), key=lambda goal: goal.value / goal.target)
    lines.append(f"{len(found) - len(below)} of {len(found)} numbers reach their goal" + ("; below it:" if below else ""))
    return lines + [f"  {goal.value:6.2f} of {goal.target:<5.3g}{goal.what}: {goal.where}" for goal in below]
