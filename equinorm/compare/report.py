"""One HTML file that shows a comparison, or several: no network, no scripts, light and dark, wide and narrow."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from equinorm.compare import charts
from equinorm.compare.cells import Cell
from equinorm.compare.environment import versions
from equinorm.compare.findings import findings, interval_statement, label, number, progress
from equinorm.compare.outcomes import FAILURES, Failed, FailureKind
from equinorm.compare.results import Comparison, Row, at_edge
from equinorm.page.templates import templates


def write_report(comparisons: Sequence[Comparison], path: Path) -> Path:
    """Write the report of one or more comparisons.

    Args:
        comparisons: shown one after the other.
        path: of the HTML file.

    Returns:
        The path.
    """
    environment = templates("equinorm.compare")
    environment.filters.update(label=label, breakable=_breakable)
    template = environment.get_template("report.html.j2")
    sections = [_section(comparison, f"c{index}") for index, comparison in enumerate(comparisons)]
    html = template.render(sections=sections, written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), versions=versions("compare"))
    path.write_text(html, encoding="utf-8")
    return path


def _section(comparison: Comparison, name: str) -> dict[str, Any]:
    plan = comparison.plan
    sizes = sorted(plan.batch_sizes)
    has_memory = any(row.peak_memory is not None for row in comparison.rows)
    return {
        "name": name,
        "plan": plan,
        "sizes": sizes,
        "comparison": comparison,
        "metric": label(comparison.metric_key),
        "curve": label(charts.curve_key(comparison)),
        "direction": "higher is better" if comparison.higher_is_better else "lower is better",
        "shown": {row.norm for row in comparison.rows if row.interval},
        "styles": charts.styles(plan.norms),
        "progress": progress(comparison),
        "findings": findings(comparison),
        "intervals": interval_statement(comparison),
        "main": _figure(comparison, f"{name}-main"),
        "close_up": _figure(comparison, f"{name}-close", limits) if (limits := charts.close_up(comparison)) else None,
        "curves": {size: charts.learning_curves(comparison, f"{name}-curve{size}", size) for size in sizes},
        "time": charts.step_time(comparison, f"{name}-time"),
        "memory": charts.memory(comparison, f"{name}-memory") if has_memory else None,
        "steps": charts.measures_steps(comparison),
        "rows": {norm: [_cell(comparison.row(norm, size), len(plan.seeds)) for size in sizes] for norm in plan.norms},
        "costs": {norm: [_cost(comparison.row(norm, size), charts.measures_steps(comparison)) for size in sizes] for norm in plan.norms},
        "rates": {norm: [_rate(comparison, norm, size) for size in sizes] for norm in plan.norms} if len(plan.learning_rates) > 1 else None,
        "failures": _grouped_failures(comparison),
        "plan_json": json.dumps(plan.to_json(), indent=2),
    }


def _figure(comparison: Comparison, name: str, limits: tuple[float, float] | None = None) -> dict[str, Markup]:
    return {
        "wide": charts.by_batch_size(comparison, name, limits),
        "narrow": charts.by_batch_size(comparison, f"{name}-narrow", limits, narrow=True),
    }


def _breakable(text: str) -> Markup:
    """A norm's name that a narrow table may break where its parts end."""
    return Markup(re.sub(r"([:,+_])", r"\1<wbr>", str(escape(text))))


def _cell(row: Row, seeds: int) -> dict[str, str]:
    if row.interval is None:
        kinds = sorted({outcome.kind for outcome in row.cells.values() if isinstance(outcome, Failed)})
        return {"value": ", ".join(kinds) or "not finished", "interval": "", "note": ""}
    return {
        "value": number(row.interval.median),
        "interval": f"{number(row.interval.low)}–{number(row.interval.high)}" if row.interval.count > 1 else "",
        "note": "" if row.interval.count == seeds else f"{row.interval.count} of {seeds} seeds",
    }


def _cost(row: Row, steps: bool) -> dict[str, str]:
    seconds = row.seconds_per_step if steps else row.seconds_per_epoch
    return {
        "time": "" if seconds is None else f"{seconds * (1000 if steps else 1):.3g}",
        "memory": "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.3g}",
    }


def _rate(comparison: Comparison, norm: str, size: int) -> str:
    row = comparison.row(norm, size)
    if row.lr is None or row.interval is None:
        return ""
    return f"{row.lr:g}" + ("*" if at_edge(row.lr, comparison.plan.learning_rates) else "")


def _grouped_failures(comparison: Comparison) -> list[dict[str, Any]]:
    """The failed cells of a norm that failed in the same way, together."""
    groups: dict[tuple[str, FailureKind], dict[Cell, Failed]] = defaultdict(dict)
    for cell, failed in comparison.failures.items():
        groups[cell.norm, failed.kind][cell] = failed
    return [
        {
            "norm": norm,
            "kind": kind,
            "meaning": FAILURES[kind],
            "reasons": {cell.key.removeprefix(f"{norm} "): failed.reason for cell, failed in members.items()},
            "details": next(iter(members.values())).details,
        }
        for (norm, kind), members in groups.items()
    ]
