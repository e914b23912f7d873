"""What an operation is going to do to a model: worked out before anything changes, and printed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """One thing that changes.

    Attributes:
        where: names of the places in the model; several where a module is shared.
        what: "BatchNorm2d(64) -> GroupNorm(32 groups of 2)".
        kept: what stays as it was, one phrase each.
        lost: what cannot stay, and why, one sentence each.
    """

    where: tuple[str, ...]
    what: str
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """One thing that was looked at and stays as it is.

    Attributes:
        where: names of the places in the model.
        what: the module, as "BatchNorm2d".
        reason: why it cannot change.
    """

    where: tuple[str, ...]
    what: str
    reason: str


@dataclass
class Plan:
    """What changes, what is kept, what cannot be and why; ``print(plan)`` shows it.

    Attributes:
        operation: "swap", "fold", "recalibrate", "freeze", "unfreeze", "sync" or "unsync".
        changes: what changes, in the order of the model.
        refusals: what was looked at and cannot change.
        remarks: about the model as a whole: how neighbours were found, what became of the optimizer.
        applied: whether the model has been changed; False after ``dry_run=True``.
        error: largest difference between the model's outputs before and after, over the largest output before, where both were computed.
    """

    operation: str
    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    applied: bool = False
    error: float | None = None

    def __str__(self) -> str:
        done = "done" if self.applied else "not applied"
        lines = [f"{self.operation} ({done}): {_counted(len(self.changes), 'change')}, {_counted(len(self.refusals), 'refusal')}"]
        for change in self.changes:
            lines.append(f"  {_places(change.where)}: {change.what}")
            lines += [f"      keeps {phrase}" for phrase in change.kept]
            lines += [f"      loses {phrase}" for phrase in change.lost]
        if self.refusals:
            lines.append("  unchanged:")
            lines += [f"    {_places(refusal.where)}: {refusal.what}: {refusal.reason}" for refusal in self.refusals]
        lines += [f"  {remark}" for remark in self.remarks]
        if self.error is not None:
            lines.append(f"  outputs before and after differ by {self.error:.2g} of the largest")
        return "\n".join(lines)


def _places(names: tuple[str, ...]) -> str:
    return " = ".join(name or "(the model)" for name in names)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)
