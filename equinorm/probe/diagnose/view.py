"""A report as the rules read it: who consumes whom, and the thresholds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from equinorm.probe.findings import Severity
from equinorm.probe.hunt import Origin
from equinorm.probe.record import Call, Report


@dataclass(kw_only=True)
class Seen:
    """What a probe learned beside the report.

    Attributes:
        dropout: rate of every dropout module that was active, by name.
        origin: the function that made the first value that is not finite.
    """

    dropout: dict[str, float] = field(default_factory=dict)
    origin: Origin | None = None


class View:
    """A report with its graph of calls."""

    def __init__(self, report: Report, seen: Seen) -> None:
        self.report, self.seen, self.t = report, seen, report.thresholds
        self.calls = report.calls
        self.leaves = [call for call in self.calls if call.leaf]

    @cached_property
    def consumers(self) -> dict[int, list[Call]]:
        """Leaf calls that read the output of each call."""
        result: dict[int, list[Call]] = {}
        for call in self.leaves:
            for index in call.inputs:
                result.setdefault(index, []).append(call)
        return result

    @cached_property
    def last(self) -> Call | None:
        """The last leaf call of the forward pass."""
        return self.leaves[-1] if self.leaves else None

    def producers(self, call: Call) -> list[Call]:
        """The calls whose outputs a call read."""
        return [self.calls[index] for index in call.inputs if index < len(self.calls)]

    def before_norm(self, call: Call) -> bool:
        """Whether norms alone read a call's output, perhaps behind dropout or an identity: its scale then does not matter."""
        readers = self.consumers.get(call.index, [])
        return bool(readers) and all(
            reader.role == "norm" or (reader.role in ("dropout", "shape") and self.before_norm(reader)) for reader in readers
        )  # fmt: skip

    def severity(self, value: float, name: str) -> Severity | None:
        """Judge a value by the thresholds ``name``_warning and ``name``_severe, both inclusive."""
        if value >= self.t[f"{name}_severe"]:
            return "severe"
        return "warning" if value >= self.t[f"{name}_warning"] else None


def slope(values: Sequence[float]) -> float:
    """Robust slope of values at 0, 1, 2 ... (Theil and Sen): the median of the slopes of all pairs, of some pairs when there are many."""
    n = len(values)
    stride = max(1, n // 200)
    pairs = [(values[j] - values[i]) / (j - i) for i in range(0, n, stride) for j in range(i + 1, n, stride)]
    return statistics.median(pairs) if pairs else 0.0


def number(value: float) -> str:
    """Two or three significant digits, as one would say them."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 0.01 <= abs(value) < 10000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def names(labels: Sequence[str], most: int = 3) -> str:
    """Quoted names in a row, the first few of many."""
    shown = [f"'{label}'" if label else "the model" for label in labels[:most]]
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(shown) + more


def owner(call: Call) -> str:
    """The module that a call belongs to: for functions the one that calls it."""
    return call.name.partition(":")[0] if call.kind == "function" else call.name


def unique(items: Sequence[str]) -> tuple[str, ...]:
    """Each once, in order."""
    return tuple(dict.fromkeys(items))
