"""Prescriptions: remedies that were tried on a copy, with what they changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from equinorm.checkup.numbers import Numbers, counted
from equinorm.checkup.remedies import remedies
from equinorm.checkup.remedies.remedy import Remedy
from equinorm.checkup.trial import Case
from equinorm.probe.findings import KINDS, Finding
from equinorm.probe.record import Report

WEIGHTS = {"severe": 100.0, "warning": 10.0, "note": 1.0}  # one severe finding outweighs all the warnings that a report usually has


@dataclass(kw_only=True)
class Prescription:
    """A remedy, tried.

    Attributes:
        number: place in the order of effect, from 1; what :meth:`Prescriptions.apply` takes.
        title, sentence, cost: of the remedy.
        aims: kinds of findings that it is for.
        resolved: findings of before that are gone, or less severe.
        added: findings that were not there before, or not so severe.
        after: the report of the changed copy; None where the remedy failed.
        error: why it failed, "" where it did not.
        score: by how much the findings weigh less (100 for a severe one, 10 for a warning, 1 for a note).
        flatter: by how many factors of ten the ranges of signal and gradient over the layers became smaller. Of equal
            scores the remedy that loses less comes first, then the flatter one.
    """

    number: int = 0
    title: str
    sentence: str
    cost: str
    aims: tuple[str, ...]
    resolved: list[Finding] = field(default_factory=list)
    added: list[Finding] = field(default_factory=list)
    after: Report | None = None
    error: str = ""
    score: float = 0.0
    flatter: float = 0.0
    remedy: Remedy = field(repr=False)
    seed: int = field(repr=False)

    @property
    def helps(self) -> bool:
        """Whether the findings weigh less than before."""
        return self.score > 0

    @property
    def outcome(self) -> str:
        """What came of it, in a sentence."""
        if self.error:
            return f"It could not be tried: {self.error}"
        if not self.resolved and not self.added:
            return "No finding goes away, none is new."
        parts = []
        if self.resolved:
            parts.append(f"Resolved: {_listed(self.resolved)}.")
        if self.added:
            parts.append(f"New: {_listed(self.added)}.")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the remedy itself; ``after`` in a few numbers."""
        numbers = None if self.after is None else Numbers.of(self.after)
        return {
            "number": self.number,
            "title": self.title,
            "sentence": self.sentence,
            "cost": self.cost,
            "aims": list(self.aims),
            "resolved": [finding.kind for finding in self.resolved],
            "added": [finding.kind for finding in self.added],
            "error": self.error,
            "score": self.score,
            "after": None
            if numbers is None
            else {
                "severe": numbers.severe,
                "warnings": numbers.warnings,
                "notes": numbers.notes,
                "signal_factor": _finite(numbers.forward.ratio),
                "gradient_factor": _finite(numbers.backward.ratio),
            },
        }


class Prescriptions(Sequence[Prescription]):
    """What was tried for a report, the most helpful first; ``print`` shows it.

    Args:
        report: what it was prescribed from.
        tried: the prescriptions.
    """

    def __init__(self, report: Report, tried: Sequence[Prescription]) -> None:
        self.report = report
        self._tried = sorted(tried, key=lambda p: (bool(p.error), -p.score, p.remedy.loses, -p.flatter))
        for number, prescription in enumerate(self._tried, 1):
            prescription.number = number

    def __len__(self) -> int:
        return len(self._tried)

    def __getitem__(self, index: Any) -> Any:
        return self._tried[index]

    def __str__(self) -> str:
        if not self._tried:
            return "No prescription: no finding has a remedy that can be tried on the model."
        lines = []
        for p in self._tried:
            lines += [f"{p.number}. {p.title}: {p.sentence}", f"   {p.outcome}", *([f"   {p.cost}"] if p.cost else [])]
        return "\n".join(lines)

    def apply(self, number: int) -> Report:
        """Do to the model itself what number ``number`` did to its copy, with the same random numbers.

        Args:
            number: from 1, as shown.

        Returns:
            A report of the changed model, on the same batch.

        Raises:
            ValueError: no such number, or the prescription could not be tried.
        """
        if not 1 <= number <= len(self):
            raise ValueError(f"apply: number must be one of 1 to {len(self)}, got {number}")
        prescription = self._tried[number - 1]
        if prescription.error:
            raise ValueError(f"apply: number {number} ({prescription.title}) could not be tried: {prescription.error}")
        case = Case.of(self.report)
        _perform(prescription.remedy, case, prescription.seed)
        return case.probed()


def prescribe(report: Report) -> Prescriptions:
    """Try everything that may help against a report's findings, each on a copy of the model, and probe again with the same batch.

    Raises:
        ValueError: the report holds no model.
    """
    Case.of(report)
    before = Numbers.of(report)
    seed = int(torch.randint(2**31, ()).item())
    return Prescriptions(report, [_tried(report, before, remedy, seed + place) for place, remedy in enumerate(remedies(report))])


def _tried(report: Report, before: Numbers, remedy: Remedy, seed: int) -> Prescription:
    prescription = Prescription(title=remedy.title, sentence=remedy.sentence, cost=remedy.cost, aims=remedy.aims, remedy=remedy, seed=seed)
    try:
        case = Case.copied(report)
        _perform(remedy, case, seed)
        after = case.probed()
    except Exception as error:  # noqa: BLE001 - whatever a model refuses is the outcome of this prescription, and the others go on
        prescription.error = f"{type(error).__name__}: {error}"
        return prescription
    after.source = None  # the copy is not needed any more
    prescription.after = after
    prescription.resolved = missing(report.findings, after.findings)
    prescription.added = missing(after.findings, report.findings)
    prescription.score = sum(WEIGHTS[f.severity] for f in report.findings) - sum(WEIGHTS[f.severity] for f in after.findings)
    numbers = Numbers.of(after)
    prescription.flatter = sum(
        min(max(_decades(old) - _decades(new), -30), 30)
        for old, new in ((before.forward.ratio, numbers.forward.ratio), (before.backward.ratio, numbers.backward.ratio))
    )
    return prescription


def _perform(remedy: Remedy, case: Case, seed: int) -> None:
    devices = {p.device.index for p in case.model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device for device in devices if device is not None]):
        torch.manual_seed(seed)
        remedy.perform(case)


def missing(some: Sequence[Finding], others: Sequence[Finding]) -> list[Finding]:
    """Those of ``some`` that have no match among ``others``: of the same kind and severity, if possible with the same culprit."""
    left = list(others)
    unmatched = []
    for finding in sorted(some, key=lambda f: not any(_same(f, other) for other in others)):
        match = next((o for o in left if _same(finding, o)), None) or next((o for o in left if _kind(o) == _kind(finding)), None)
        if match is None:
            unmatched.append(finding)
        else:
            left.remove(match)
    return [finding for finding in some if finding in unmatched]


def _kind(finding: Finding) -> tuple[str, str]:
    return finding.kind, finding.severity


def _same(one: Finding, other: Finding) -> bool:
    return _kind(one) == _kind(other) and one.layers[:1] == other.layers[:1]


def _listed(findings: Sequence[Finding]) -> str:
    counts = Counter((f.kind, f.severity) for f in findings)
    return ", ".join(f"{KINDS[kind].title} ({severity if n == 1 else counted(n, severity)})" for (kind, severity), n in counts.items())


def _decades(ratio: float) -> float:
    return torch.tensor(ratio, dtype=torch.float64).nan_to_num(1e30, 1e30).clamp(1, 1e30).log10().item()


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
