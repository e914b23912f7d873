"""How far a comparison is: a bar with the time left on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

from equinorm.compare.cells import Cell
from equinorm.compare.outcomes import Failed, Measured, Outcome


class TimeLeft:
    """Estimates the time left from the cells measured so far.

    Args:
        workers: cells measured side by side.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._seconds: dict[int, list[float]] = defaultdict(list)
        self._since = time.monotonic()

    def add(self, cell: Cell, seconds: float) -> None:
        """Learn how long a cell took."""
        self._seconds[cell.batch_size].append(seconds)
        self._since = time.monotonic()

    def seconds(self, left: Collection[Cell]) -> float | None:
        """Seconds until the cells in ``left`` are measured; None before the first is."""
        if not self._seconds:
            return None
        total = sum(self._cell(cell.batch_size) for cell in left)
        return max(0.0, total / self._workers - (time.monotonic() - self._since))

    def _cell(self, batch_size: int) -> float:
        nearest = min(self._seconds, key=lambda known: abs(known - batch_size))
        # The number of samples is the same in every cell, so the number of steps goes with 1 / batch size.
        return statistics.mean(self._seconds[nearest]) * nearest / batch_size


class FailureNews:
    """Says why a norm fails, once: the same norm usually fails in the same way in every cell, and the report lists them all."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def lines(self, cell: Cell, failed: Failed) -> list[str]:
        """What to print about a failed cell: one line or none."""
        if (cell.norm, failed.kind) in self._told:
            return []
        self._told.add((cell.norm, failed.kind))
        return [f"{cell.key}: {failed.kind}: {failed.reason}"]


class Progress(Protocol):
    """What a comparison reports while it runs."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def begin(self, cells: Collection[Cell], left: Collection[Cell]) -> None:
        """All cells, and those still to measure."""

    def update(self, left: Collection[Cell], elsewhere: int) -> None:
        """Those still to measure; how many of them other commands are measuring."""

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        """A cell is done."""


class Bar:
    """A progress bar on a terminal."""

    def __init__(self, workers: int, stream: TextIO) -> None:
        self._time = TimeLeft(workers)
        self._news = FailureNews()
        self._console = Console(file=stream)
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("cells"), _Left(self), console=self._console
        )
        self._left: Collection[Cell] = ()
        self._elsewhere = 0
        self._task = self._bar.add_task("comparing", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, cells: Collection[Cell], left: Collection[Cell]) -> None:
        self._left = left
        self._bar.update(self._task, total=len(cells), completed=len(cells) - len(left))

    def update(self, left: Collection[Cell], elsewhere: int) -> None:
        self._left, self._elsewhere = left, elsewhere
        total = self._bar.tasks[0].total or 0
        self._bar.update(self._task, completed=total - len(left))

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        if isinstance(outcome, Measured):
            self._time.add(cell, outcome.seconds)
        if isinstance(outcome, Failed):
            for line in self._news.lines(cell, outcome):
                self._console.print(line, style="yellow", markup=False, highlight=False)

    def note(self) -> str:
        """Time left, and what others are doing."""
        if not self._left:
            return ""
        seconds = self._time.seconds(self._left)
        parts = ["" if seconds is None else f"about {duration(seconds)} left", f"{self._elsewhere} elsewhere" if self._elsewhere else ""]
        return ", ".join(filter(None, parts))


class _Left(ProgressColumn):
    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: RichTask) -> Text:
        return Text(self._bar.note(), style="progress.remaining")


class Lines:
    """A line per quarter of the work."""

    def __init__(self, workers: int, stream: TextIO | None = None) -> None:
        self._time = TimeLeft(workers)
        self._news = FailureNews()
        self._stream = stream or sys.stderr
        self._total = self._quarter = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def begin(self, cells: Collection[Cell], left: Collection[Cell]) -> None:
        self._total = len(left)
        self._say(f"{len(cells)} cells: {len(cells) - len(left)} finished before, {len(left)} to measure")

    def update(self, left: Collection[Cell], elsewhere: int) -> None:
        quarter = 4 * (self._total - len(left)) // max(1, self._total)
        if quarter > self._quarter and left:
            self._quarter = quarter
            seconds = self._time.seconds(left)
            estimate = "" if seconds is None else f", about {duration(seconds)} left"
            self._say(f"{self._total - len(left)} of {self._total} cells measured{estimate}")

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        if isinstance(outcome, Measured):
            self._time.add(cell, outcome.seconds)
        if isinstance(outcome, Failed):
            for line in self._news.lines(cell, outcome):
                self._say(line)

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A time span to read.

    Example:
        >>> duration(42), duration(200), duration(9000)
        ('42 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress_on(stream: TextIO, workers: int) -> Progress:
    """A bar if the stream is a terminal, else lines."""
    return Bar(workers, stream) if stream.isatty() else Lines(workers, stream)
