"""What a method says about itself, once.

Every public method carries a ``facts`` attribute made of the two records below. The catalogue, the documentation and the tests read
them from there; the prose (formula, symbols, when to use it, known trouble) lives in the method's docstring and is read from there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol, TypeVar, cast

Family = Literal["batch", "sample", "learned", "conditional", "whitening", "local", "weight", "residual", "bounded", "gan"]
Invariance = Literal["shift", "scale", "per-sample", "per-channel", "weight-scale"]

FAMILIES: dict[str, str] = {
    "batch": "statistics over the batch, running estimates at inference",
    "sample": "statistics within one sample, the same in training and at inference",
    "learned": "a learned mixture or gate chooses among several statistics",
    "conditional": "the affine map is computed from a second input",
    "whitening": "removes correlation between channels, not only scale",
    "local": "statistics in a neighbourhood of each position",
    "weight": "acts on the weights of a layer, not on activations",
    "residual": "keeps the signal in range without measuring it",
    "bounded": "replaces the norm by a bounded elementwise function",
    "gan": "keeps scales in hand in adversarial training",
}

INVARIANCES: dict[str, str] = {
    "shift": "adding one constant to the whole input changes nothing",
    "scale": "multiplying the whole input by a positive constant changes nothing (up to eps)",
    "per-sample": "a sample's output does not depend on the rest of the batch",
    "per-channel": "a channel's output does not depend on the other channels",
    "weight-scale": "multiplying an output unit's weights by a positive constant changes nothing (up to eps)",
}


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method was published.

    Attributes:
        authors: surnames, in order ("Ioffe and Szegedy"; "Wu et al." from four on).
        title: full title.
        year: year of the first public version.
        venue: conference or journal, empty when there is none.
        arxiv: arXiv identifier without prefix, empty when there is none.
        equation: where in the paper the formula stands ("Algorithm 1", "Eq. 4").
    """

    authors: str
    title: str
    year: int
    venue: str = ""
    arxiv: str = ""
    equation: str = ""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.venue, f"arXiv:{self.arxiv}" if self.arxiv else "", self.equation) if part)
        return f'{self.authors}, "{self.title}", {self.year}' + (f" ({place})" if place else "")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What can be checked about a method; the test-suite checks every claim made here.

    Attributes:
        name: the short catalogue name, lower case with underscores ("batch", "group", "spectral").
        title: the name in full, as in the paper.
        paper: the publication.
        family: one of :data:`FAMILIES`.
        pools: what one statistic averages over, as letters out of N (samples), C (all channels), G (channels of a group),
            L (a window of channels), S (positions), K (a window of positions), D (the normalized last dimensions), W (the weights of
            one output unit); several statistics are joined by "+" ("NS+GS"); empty when nothing is measured.
        train_differs: whether training and evaluation compute different things.
        synchronizes: what crosses processes when a process group is given; empty when nothing can.
        folds: whether inference is a fixed affine map per channel, which a neighbouring linear layer can absorb.
        invariances: claims out of :data:`INVARIANCES`, true of the training form.
        batch_of_one: what happens in training with one sample.
        one_position: what happens with a single spatial position, or none.
        reads_writes: least traffic of the training forward in units of the input ("1R+1W").
    """

    name: str
    title: str
    paper: Paper
    family: Family
    pools: str
    train_differs: bool = False
    synchronizes: str = ""
    folds: bool = False
    invariances: frozenset[Invariance] = frozenset()
    batch_of_one: str = "works as with any batch"
    one_position: str = "works"
    reads_writes: str = "1R+1W"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Facts: family must be one of {sorted(FAMILIES)}, got {self.family!r}")
        if unknown := set(self.pools) - set("NCGLSKDW+"):
            raise ValueError(f"Facts: pools may use the letters N C G L S K D W, got {sorted(unknown)}")
        if unknown := set(self.invariances) - set(INVARIANCES):
            raise ValueError(f"Facts: unknown invariances {sorted(unknown)}; known are {sorted(INVARIANCES)}")


P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class Described(Protocol[P, R_co]):
    """A function that states its facts."""

    facts: Facts
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def describes(facts: Facts) -> Callable[[Callable[P, R_co]], Described[P, R_co]]:
    """Decorate a public function with its facts, as classes carry theirs: ``function.facts``."""

    def attach(function: Callable[P, R_co]) -> Described[P, R_co]:
        described = cast("Described[P, R_co]", function)
        described.facts = facts
        return described

    return attach
