"""The results of a comparison: per norm and batch size, the seeds together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equinorm.compare.cells import Cell
from equinorm.compare.intervals import Interval, median_interval
from equinorm.compare.metrics import STEP_TIME, choosing_key, reported_key
from equinorm.compare.outcomes import Failed, Measured, Outcome
from equinorm.compare.plan import Plan


@dataclass(frozen=True)
class Row:
    """One norm at one batch size.

    Attributes:
        norm, batch_size: which.
        lr: the learning rate; the one chosen by validation if there was a grid, None if the task used its own.
        cells: the cells at that learning rate that are finished, one per seed.
    """

    norm: str
    batch_size: int
    lr: float | None
    cells: Mapping[Cell, Outcome]
    metric: str

    @property
    def measured(self) -> list[Measured]:
        """The seeds that finished."""
        return [outcome for outcome in self.cells.values() if isinstance(outcome, Measured)]

    @property
    def scores(self) -> list[float]:
        """The reported metric after the last epoch, by seed."""
        return [outcome.score(self.metric) for outcome in self.measured]

    @property
    def interval(self) -> Interval | None:
        """Median over seeds and its interval; None if no seed finished."""
        return median_interval(self.scores) if self.scores else None

    @property
    def seconds_per_step(self) -> float | None:
        """Median over seeds and epochs; None if the task does not measure it."""
        values = [value for outcome in self.measured for value in outcome.history.get(STEP_TIME, []) if value is not None]
        return statistics.median(values) if values else None

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median over seeds, evaluation included."""
        return statistics.median(outcome.seconds_per_epoch for outcome in self.measured) if self.measured else None

    @property
    def peak_memory(self) -> int | None:
        """Bytes, median over seeds."""
        values = [outcome.peak_memory for outcome in self.measured if outcome.peak_memory is not None]
        return round(statistics.median(values)) if values else None


@dataclass(frozen=True)
class Comparison:
    """A comparison as far as it has been measured.

    Attributes:
        plan: what was asked for.
        outcomes: what became of each finished cell, failed ones included.
        description: what the task says about itself.
        command: how to run it again.
        workers: cells measured side by side by the command that made this.
    """

    plan: Plan
    outcomes: Mapping[Cell, Outcome]
    description: str = ""
    command: str = ""
    workers: int = 1
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        rows = [self._row(norm, batch_size) for norm in self.plan.norms for batch_size in self.plan.batch_sizes]
        object.__setattr__(self, "rows", rows)

    @property
    def failures(self) -> dict[Cell, Failed]:
        """The cells that failed, at any learning rate."""
        return {cell: outcome for cell, outcome in self.outcomes.items() if isinstance(outcome, Failed)}

    @property
    def missing(self) -> int:
        """How many cells are not finished."""
        return len(self.plan.cells()) - len(self.outcomes)

    @property
    def machines(self) -> list[dict[str, Any]]:
        """The different machines and versions that took part."""
        distinct: list[dict[str, Any]] = []
        for outcome in self.outcomes.values():
            if outcome.machine not in distinct:
                distinct.append(outcome.machine)
        return distinct

    @property
    def metric_key(self) -> str:
        """The name under which the task yields the reported metric."""
        measured = [outcome for outcome in self.outcomes.values() if isinstance(outcome, Measured)]
        return reported_key(measured[0].history, self.metric) if measured else self.metric

    @property
    def metric(self) -> str:
        """The metric compared."""
        return self.plan.metric

    @property
    def higher_is_better(self) -> bool:
        """Which way."""
        return self.plan.direction == "maximize"

    def row(self, norm: str, batch_size: int) -> Row:
        """The row of a norm at a batch size."""
        return next(row for row in self.rows if (row.norm, row.batch_size) == (norm, batch_size))

    def _row(self, norm: str, batch_size: int) -> Row:
        here = {cell: outcome for cell, outcome in self.outcomes.items() if (cell.norm, cell.batch_size) == (norm, batch_size)}
        rate = best_rate(here, self.plan, self.metric) if len(self.plan.learning_rates) > 1 else next(iter(self.plan.learning_rates), None)
        return Row(norm, batch_size, rate, {cell: outcome for cell, outcome in here.items() if cell.lr == rate}, self.metric)


def best_rate(cells: Mapping[Cell, Outcome], plan: Plan, metric: str) -> float:
    """The learning rate whose median validation metric over seeds is best; rates at which a seed failed or is missing come last."""

    def rank(rate: float) -> tuple[int, float]:
        finished = [outcome for cell, outcome in cells.items() if cell.lr == rate and isinstance(outcome, Measured)]
        finals = [final for outcome in finished if (final := outcome.final(choosing_key(outcome.history, metric))) is not None]
        if not finals:
            return len(plan.seeds), 0.0
        middle = statistics.median(finals)
        return len(plan.seeds) - len(finals), -middle if plan.direction == "maximize" else middle

    return min(plan.learning_rates, key=rank)


def at_edge(rate: float | None, rates: Sequence[float]) -> bool:
    """Whether a chosen learning rate is the smallest or largest of a grid, so that a better one may lie outside."""
    return len(rates) > 1 and rate in (min(rates), max(rates))
