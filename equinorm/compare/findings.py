"""What a comparison measured, in plain sentences made from its numbers."""

from __future__ import annotations

from collections import Counter

from equinorm.compare.intervals import WANTED, Interval
from equinorm.compare.outcomes import FAILURES
from equinorm.compare.results import Comparison, Row, at_edge


def number(value: float) -> str:
    """A metric's value with three decimals, or three significant digits where that says more.

    Example:
        >>> number(0.97312), number(0.0000123), number(1234.5)
        ('0.973', '1.23e-05', '1.23e+03')
    """
    return f"{value:.3f}" if 0.01 <= abs(value) < 10 or value == 0 else f"{value:.3g}"


def bounds(interval: Interval) -> str:
    """The interval in words."""
    return f"{number(interval.low)} to {number(interval.high)}"


def label(key: str) -> str:
    """A metric's name to read."""
    return key.replace("_", " ")


def findings(comparison: Comparison) -> list[str]:
    """The sentences, from the most general to the most particular."""
    sentences: list[str] = []
    if len(comparison.plan.norms) > 1:
        sentences += filter(None, (_best_at(comparison, batch_size) for batch_size in sorted(comparison.plan.batch_sizes, reverse=True)))
    if len(comparison.plan.batch_sizes) > 1:
        sentences += filter(None, [_change(comparison)])
    sentences += filter(None, [_rates_at_edge(comparison)])
    return sentences


def interval_statement(comparison: Comparison) -> str:
    """What the intervals are, with the numbers of this comparison."""
    shown = [row.interval for row in comparison.rows if row.interval]
    full = [interval for interval in shown if interval.count == len(comparison.plan.seeds)]
    if not full:
        return "No norm finished with all its seeds."
    if full[0].count == 1:
        return "One seed: there are no intervals, and differences may be chance."
    count, rank, confidence = full[0].count, full[0].rank, full[0].confidence
    extent = "from the lowest to the highest result" if rank == 1 else f"from number {rank} to number {count + 1 - rank} of them in order"
    more = "" if confidence >= WANTED else " (95 % takes six seeds)"
    return (
        f"A mark is the median of {count} seeds; its interval goes {extent}. Without any assumption on their distribution, the interval "
        f"holds the median of further seeds with {100 * confidence:.0f} % probability{more}. Seeds that did not finish are not in it, and "
        "are counted beside it."
    )


def progress(comparison: Comparison) -> str:
    """How many cells there are, and what became of them."""
    total, failures = len(comparison.plan.cells()), comparison.failures
    text = f"{total} cells were asked for and {len(comparison.outcomes) - len(failures)} were measured to the end."
    if failures:
        kinds = Counter(outcome.kind for outcome in failures.values())
        text += f" Without a result: {', '.join(f'{count} {kind} ({FAILURES[kind]})' for kind, count in kinds.items())}."
    if comparison.missing:
        text += f" {comparison.missing} are not finished yet."
    return text


def _best_at(comparison: Comparison, batch_size: int) -> str:
    rows = [row for row in comparison.rows if row.batch_size == batch_size and row.interval]
    if not rows:
        return f"At batch size {batch_size} no norm has a result."
    rows.sort(key=_median, reverse=comparison.higher_is_better)
    best, *others = rows
    assert best.interval is not None
    text = (
        f"At batch size {batch_size} the {'highest' if comparison.higher_is_better else 'lowest'} median {label(comparison.metric_key)} "
        f"is that of {best.norm}, {number(best.interval.median)} ({bounds(best.interval)})"
    )
    if not others:
        return text + ", the only one with a result."
    close = [row.norm for row in others if row.interval and row.interval.overlaps(best.interval)]
    apart = [row for row in others if row.norm not in close]
    text += f"; the intervals of {_and(close)} overlap with it." if close else "; no other interval overlaps with it."
    if apart:
        text += f" {'Lower' if comparison.higher_is_better else 'Higher'}: {_and([f'{row.norm} {number(_median(row))}' for row in apart])}."
    return text


def _change(comparison: Comparison) -> str | None:
    large, small = max(comparison.plan.batch_sizes), min(comparison.plan.batch_sizes)
    pairs = [(comparison.row(norm, large), comparison.row(norm, small)) for norm in comparison.plan.norms]
    pairs = [(at_large, at_small) for at_large, at_small in pairs if at_large.interval and at_small.interval]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: _median(pair[1]) - _median(pair[0]), reverse=not comparison.higher_is_better)
    changes = [f"{a.norm} {_median(b) - _median(a):+.3f} (from {number(_median(a))} to {number(_median(b))})" for a, b in pairs]
    return f"From batch size {large} to {small} the median {label(comparison.metric_key)} changed by: {'; '.join(changes)}."


def _rates_at_edge(comparison: Comparison) -> str | None:
    rates = comparison.plan.learning_rates
    rows = [row for row in comparison.rows if row.interval and at_edge(row.lr, rates)]
    if not rows:
        return None
    return (
        f"For {len(rows)} of {len(comparison.rows)} combinations of norm and batch size the chosen learning rate is the smallest or the "
        "largest of the grid, so a better one may lie outside it."
    )


def _median(row: Row) -> float:
    assert row.interval is not None
    return row.interval.median


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
