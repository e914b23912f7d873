"""Cells: the combinations to measure, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        norm: the norm's specification in its canonical text, see :class:`equinorm.compare.norms.NormSpec`.
        batch_size: samples per optimizer step.
        seed: fixes initial weights and the order of the data.
        lr: learning rate, or None for the task's own.
    """

    norm: str
    batch_size: int
    seed: int
    lr: float | None = None

    @property
    def key(self) -> str:
        """The cell's identity in the study and in results."""
        rate = "" if self.lr is None else f" lr={self.lr!r}"
        return f"{self.norm} batch_size={self.batch_size} seed={self.seed}{rate}"


def grid(norms: Sequence[str], batch_sizes: Sequence[int], seeds: Sequence[int], rates: Sequence[float]) -> list[Cell]:
    """All combinations. Seed by seed, so that a run cut short compares all norms; small batches, which take longest, first."""
    order = product(seeds, sorted(batch_sizes), norms, rates or [None])
    return [Cell(norm, batch_size, seed, lr) for seed, batch_size, norm, lr in order]
