"""The results on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from equinorm.compare.findings import findings, interval_statement, label, number, progress
from equinorm.compare.outcomes import Failed
from equinorm.compare.results import Comparison, Row

WIDTH_OF_A_FILE = 120


def print_results(comparison: Comparison) -> None:
    """Print a table, norms by batch sizes, and what it says."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False)
    table = Table(title=f"{comparison.plan.task}: {label(comparison.metric_key)} by batch size", title_justify="left")
    table.add_column("norm", no_wrap=True)
    for batch_size in comparison.plan.batch_sizes:
        table.add_column(str(batch_size), justify="right")
    for norm in comparison.plan.norms:
        table.add_row(norm, *(text(comparison.row(norm, size), len(comparison.plan.seeds)) for size in comparison.plan.batch_sizes))
    console.print(table)
    console.print(interval_statement(comparison), markup=False)
    console.print()
    for sentence in [progress(comparison), *findings(comparison)]:
        console.print(f"- {sentence}", markup=False)


def text(row: Row, seeds: int) -> str:
    """Median, interval, and how many seeds are behind it if not all."""
    if row.interval is None:
        kinds = sorted({outcome.kind for outcome in row.cells.values() if isinstance(outcome, Failed)})
        return ", ".join(kinds) or "not finished"
    shown = number(row.interval.median)
    if row.interval.count > 1:
        shown += f"\n{number(row.interval.low)}–{number(row.interval.high)}"
    return shown if row.interval.count == seeds else f"{shown}\n{row.interval.count} of {seeds} seeds"
