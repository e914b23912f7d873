"""What became of a cell."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from equinorm.compare.metrics import reported_key

FailureKind = Literal["refused", "diverged", "error", "died"]

FAILURES: dict[str, str] = {
    "refused": "the norm cannot be used there",
    "diverged": "a metric was not finite",
    "error": "the task raised an error",
    "died": "the process ended without a result",
}


@dataclass(frozen=True)
class Measured:
    """A cell that was trained to its end.

    Attributes:
        history: each metric's values, one per epoch; None where an epoch did not yield it.
        seconds: time from the task's start to its end.
        seconds_per_epoch: median time between two yields, evaluation included.
        peak_memory: bytes, see :mod:`equinorm.compare.memory`; None where the system does not tell.
        machine: where and with which versions it was measured.
    """

    history: dict[str, list[float | None]]
    seconds: float
    seconds_per_epoch: float
    peak_memory: int | None
    machine: dict[str, Any] = field(default_factory=dict)

    def final(self, metric: str) -> float | None:
        """The metric's last value; None if the task never yielded it."""
        values = [value for value in self.history.get(metric, []) if value is not None]
        return values[-1] if values else None

    def score(self, metric: str) -> float:
        """The value that is reported for a metric: the last one, on test data if there is one."""
        value = self.final(reported_key(self.history, metric))
        assert value is not None  # the first epoch was checked to yield it
        return value

    def to_json(self) -> dict[str, Any]:
        """As stored in the study."""
        return asdict(self)


@dataclass(frozen=True)
class Failed:
    """A cell without a result.

    Attributes:
        kind: one of :data:`FAILURES`.
        reason: one sentence.
        epoch: epochs finished before it failed.
        details: the traceback, where there is one.
        machine: where it was tried.
    """

    kind: FailureKind
    reason: str
    epoch: int = 0
    details: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As stored in the study."""
        return asdict(self)


Outcome = Measured | Failed
