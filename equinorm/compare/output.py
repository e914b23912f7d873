"""Results for programs: CSV files and JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from equinorm.compare.cells import Cell
from equinorm.compare.metrics import STEP_TIME
from equinorm.compare.outcomes import Failed, Measured, Outcome
from equinorm.compare.results import Comparison, Row

SCHEMA = "equinorm.compare/1"


def write_csv(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``results.csv`` (a line per norm and batch size), ``cells.csv`` (a line per cell) and ``epochs.csv`` (a line per epoch).

    Returns:
        The three paths.
    """
    tables: dict[str, Iterable[Mapping[str, Any]]] = {
        "results.csv": [{**_row(comparison, row), "failed": len(_failed(row))} for row in comparison.rows],
        "cells.csv": [_cell(comparison, cell, outcome) for cell, outcome in comparison.outcomes.items()],
        "epochs.csv": [
            line for cell, outcome in comparison.outcomes.items() if isinstance(outcome, Measured) for line in _epochs(cell, outcome)
        ],
    }
    paths = []
    for name, lines in tables.items():
        columns = list(dict.fromkeys(column for line in lines for column in line))
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(lines)
        paths.append(folder / name)
    return paths


def to_json(comparison: Comparison, files: Mapping[str, str]) -> dict[str, Any]:
    """The results as JSON.

    Args:
        comparison: the results.
        files: what was written, by kind.

    Returns:
        ``schema``, ``plan``, ``metric`` (the yielded name), ``cells`` (their numbers by state), ``results`` (a dict per norm and batch
        size), ``failures`` (a dict per failed cell), ``machines``, ``command`` and ``files``.
    """
    failures = comparison.failures
    return {
        "schema": SCHEMA,
        "plan": comparison.plan.to_json(),
        "metric": comparison.metric_key,
        "cells": {
            "asked": len(comparison.plan.cells()),
            "measured": len(comparison.outcomes) - len(failures),
            "failed": len(failures),
            "missing": comparison.missing,
        },
        "results": [
            {
                **_row(comparison, row),
                "scores": row.scores,
                "failed": {str(cell.seed): failed.reason for cell, failed in _failed(row).items()},
            }
            for row in comparison.rows
        ],
        "failures": [_cell(comparison, cell, failed) for cell, failed in failures.items()],
        "machines": comparison.machines,
        "command": comparison.command,
        "files": dict(files),
    }


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    interval = row.interval
    return {
        "norm": row.norm,
        "batch_size": row.batch_size,
        "lr": row.lr,
        "metric": comparison.metric_key,
        "median": interval and interval.median,
        "low": interval and interval.low,
        "high": interval and interval.high,
        "confidence": interval and interval.confidence,
        "seeds": len(row.scores),
        "seconds_per_step": row.seconds_per_step,
        "seconds_per_epoch": row.seconds_per_epoch,
        "peak_memory_bytes": row.peak_memory,
    }


def _cell(comparison: Comparison, cell: Cell, outcome: Outcome) -> dict[str, Any]:
    line: dict[str, Any] = {"norm": cell.norm, "batch_size": cell.batch_size, "seed": cell.seed, "lr": cell.lr}
    if isinstance(outcome, Failed):
        return {**line, "state": outcome.kind, "reason": outcome.reason, "epochs": outcome.epoch}
    finals = {name: outcome.final(name) for name in outcome.history if name != STEP_TIME}
    return {
        **line,
        "state": "measured",
        "reason": "",
        "epochs": len(next(iter(outcome.history.values()))),
        "seconds": outcome.seconds,
        "peak_memory_bytes": outcome.peak_memory,
        **finals,
    }


def _epochs(cell: Cell, outcome: Measured) -> Iterable[dict[str, Any]]:
    for epoch, values in enumerate(zip(*outcome.history.values(), strict=True), 1):
        metrics = dict(zip(outcome.history, values, strict=True))
        yield {"norm": cell.norm, "batch_size": cell.batch_size, "seed": cell.seed, "lr": cell.lr, "epoch": epoch, **metrics}


def _failed(row: Row) -> dict[Cell, Failed]:
    return {cell: outcome for cell, outcome in row.cells.items() if isinstance(outcome, Failed)}
