"""What the numbers should be, and which are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean

from equinorm.bench.grid import Entry
from equinorm.bench.measure import BATCH, COPY, OURS, Timing

EAGER = "torch"


@dataclass(frozen=True)
class SideBySide:
    """The timings of one entry.

    Attributes:
        entry: what was timed.
        ours: our timing.
        peers: those with a number, by name.
        batch: our batch norm on the same input, where it is a yardstick.
    """

    entry: Entry
    ours: Timing
    peers: dict[str, float]
    batch: float | None

    @property
    def best(self) -> str | None:
        """The fastest peer."""
        return min(self.peers, key=lambda who: self.peers[who], default=None)

    def ratio(self, peer: str | None = None) -> float | None:
        """The time of a peer, or of the fastest, in units of ours."""
        peer = peer or self.best
        assert self.ours.seconds is not None
        return self.peers[peer] / self.ours.seconds if peer in self.peers else None


@dataclass(frozen=True)
class Goal:
    """A number, and what it should be at least.

    Attributes:
        where: the entry, or what a mean is over.
        what: is measured.
        value, target: both more is better.
    """

    where: str
    what: str
    value: float
    target: float

    @property
    def reached(self) -> bool:
        """Whether the number is what it should be."""
        return self.value >= self.target


def side_by_side(timings: Iterable[Timing]) -> list[SideBySide]:
    """Timings by entry, in their order."""
    groups: dict[Entry, list[Timing]] = {}
    for timing in timings:
        groups.setdefault(timing.entry, []).append(timing)
    found = []
    for entry, group in groups.items():
        numbers = {t.who: t.seconds for t in group if t.seconds is not None}
        ours = next(t for t in group if t.who == OURS)
        peers = {who: seconds for who, seconds in numbers.items() if who not in (OURS, COPY, BATCH)}
        found.append(SideBySide(entry, ours, peers, numbers.get(BATCH)))
    return found


def goals(timings: Iterable[Timing], last_level_cache: int) -> list[Goal]:
    """Every number that has a goal, with it."""
    compared = side_by_side(timings)
    return [*means(compared), *(goal for one in compared for goal in _of_entry(one, last_level_cache))]


def means(compared: list[SideBySide]) -> Iterator[Goal]:
    """Geometric means of best peer / ours over the grid, where torch has the layer."""
    for pages in ("default", "reused"):
        for of, target in (("forward", 1.8), ("both", 1.5)):
            ratios = [
                ratio
                for one in compared
                if one.entry.pages == pages and one.entry.of == of and one.entry.contender.torch and (ratio := one.ratio())
            ]
            if ratios:
                yield Goal(
                    f"{of}, pages {pages}, entries: {len(ratios)}", "geometric mean, best peer / ours", geometric_mean(ratios), target
                )


def _of_entry(one: SideBySide, last_level_cache: int) -> Iterator[Goal]:
    entry, where = one.entry, str(one.entry)
    of_copy = one.ours.of_copy
    assert of_copy is not None
    if entry.pages == "reused" and not entry.small:
        # Within 2x of the floor, 2.5x with backward; beyond the last cache, where a copy is at the memory's speed, 60 % of it.
        target = 1 / 2.5 if entry.of == "both" else 1 / 2
        if entry.layout == "contiguous" and entry.dtype == "float32" and entry.bytes > last_level_cache:
            target = 0.6
        yield Goal(where, "share of a copy's bandwidth", of_copy, target)
    ratio, eager = one.ratio(), one.ratio(EAGER)
    if entry.contender.torch:
        if ratio is not None:
            yield Goal(where, f"{one.best} / ours", ratio, 0.67 if entry.small else 0.9)
        if eager is not None and not entry.small and (target := _beside_eager(entry)):
            yield Goal(where, "torch eager / ours", eager, target)
    elif ratio is not None and entry.of == "both" and not entry.small:
        yield Goal(where, f"{one.best} / ours", ratio, 5.0)
    if one.batch is not None and one.ours.seconds is not None and not entry.small:
        yield Goal(where, "our batch norm / ours", one.batch / one.ours.seconds, 1 / 1.5)


def _beside_eager(entry: Entry) -> float | None:
    """How much faster than torch's layer ours should be where users complain of torch's."""
    if entry.norm == "batch" and entry.of == "forward":
        return 2.0
    if entry.norm == "rms" and entry.of != "eval":
        return 3.0 if entry.dtype == "float32" else 8.0
    if entry.norm == "instance" and entry.layout == "channels_last" and entry.of != "eval":
        return 4.0
    if entry.norm == "group" and entry.layout == "channels_last" and entry.dtype == "bfloat16" and entry.of == "both":
        return 4.0
    return None
