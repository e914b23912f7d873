"""A remedy: something to try against findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from equinorm.checkup.trial import Case
from equinorm.probe.findings import Finding
from equinorm.probe.record import Report


@dataclass(frozen=True)
class Remedy:
    """Something to try.

    Attributes:
        title: in a few words.
        sentence: what is done.
        aims: the kinds of findings that it is for.
        perform: does it.
        cost: what is lost by it, one sentence; "" for nothing.
        loses: 0 nothing that was learned, 1 the function changes, 2 weights are replaced. Of equal effects the gentler comes first.
    """

    title: str
    sentence: str
    aims: tuple[str, ...]
    perform: Callable[[Case], None]
    cost: str = ""
    loses: Literal[0, 1, 2] = 0


Proposal = Callable[[Report, Sequence[Finding]], Iterator[Remedy]]


def kinds(found: Sequence[Finding]) -> tuple[str, ...]:
    """The kinds among findings, each once."""
    return tuple(dict.fromkeys(finding.kind for finding in found))
