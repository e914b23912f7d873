"""The few numbers that tell one report from another, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from equinorm.probe.record import Call, Report, Stats


def short(value: float | None) -> str:
    """Three digits: 0.0123, 12.3, 4.5e6; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(share: float | None) -> str:
    """A share as a percentage; a dash for None."""
    return "–" if share is None else "0" if share == 0 else "<1 %" if share < 0.005 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Range:
    """The smallest and the largest size of a signal over the layers, NaN where there is none.

    Attributes:
        low, high: root mean squares.
        low_at, high_at: the calls.
    """

    low: float = math.nan
    high: float = math.nan
    low_at: Call | None = None
    high_at: Call | None = None

    @property
    def ratio(self) -> float:
        """Largest over smallest: 1 is flat."""
        return self.high / self.low if self.low else math.inf

    @classmethod
    def of(cls, sized: Iterable[tuple[Call, float]]) -> Range:
        """Over the calls with a positive size."""
        known = [(size, call) for call, size in sized if size > 0 and math.isfinite(size)]
        if not known:
            return cls()
        (low, low_at), (high, high_at) = min(known, key=lambda k: k[0]), max(known, key=lambda k: k[0])
        return cls(low, high, low_at, high_at)


@dataclass(frozen=True)
class Numbers:
    """A report in a few numbers.

    Attributes:
        severe, warnings, notes: how many findings.
        forward, backward: the size of outputs and of their gradients, over the layers.
        broken: calls whose output or gradient is not finite.
        dead: dead channels, over all calls of activations.
        gap: relative difference between training and evaluation; None where not measured.
        loss: its value; None without one.
    """

    severe: int
    warnings: int
    notes: int
    forward: Range
    backward: Range
    broken: int
    dead: int
    gap: float | None
    loss: float | None

    @classmethod
    def of(cls, report: Report) -> Numbers:
        """Those of a report."""
        count = {severity: sum(f.severity == severity for f in report.findings) for severity in ("severe", "warning", "note")}
        leaves = list(profiled(report))
        return cls(
            severe=count["severe"],
            warnings=count["warning"],
            notes=count["note"],
            forward=Range.of((call, call.forward.rms) for call in leaves if call.forward),
            backward=Range.of((call, call.gradient.rms) for call in leaves if call.gradient),
            broken=sum(not finite(call.forward) or not finite(call.gradient) for call in leaves),
            dead=sum(call.channels.dead for call in leaves if call.channels and call.role == "activation"),
            gap=report.gap.difference if report.gap else None,
            loss=report.loss_value,
        )

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for tables."""
        rows = [
            ("findings", f"{self.severe} severe, {counted(self.warnings, 'warning')}, {counted(self.notes, 'note')}"),
            ("signal, rms over layers", f"{short(self.forward.low)} to {short(self.forward.high)} (factor {short(self.forward.ratio)})"),
            (
                "gradient, rms over layers",
                f"{short(self.backward.low)} to {short(self.backward.high)} (factor {short(self.backward.ratio)})",
            ),
        ]
        if self.broken:
            rows.append(("layers with NaN or infinity", str(self.broken)))
        if self.dead:
            rows.append(("dead channels", str(self.dead)))
        if self.gap is not None:
            rows.append(("training against evaluation", percent(self.gap)))
        if self.loss is not None:
            rows.append(("loss", short(self.loss)))
        return rows


def counted(count: int, noun: str) -> str:
    """1 warning, 2 warnings."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def finite(stats: Stats | None) -> bool:
    """Whether there is nothing broken in what was measured."""
    return stats is None or stats.finite


def profiled(report: Report) -> Iterable[Call]:
    """The calls that a profile over depth shows: leaves that returned floating-point numbers."""
    return (call for call in report.leaves() if call.forward is not None)
