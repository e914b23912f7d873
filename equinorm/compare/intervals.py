"""Intervals from few seeds, without assuming a distribution.

The median of further seeds lies between the k-th smallest and the k-th largest of n results with probability 1 - 2 P(B < k), where B counts
heads in n fair coin tosses: each further result is above the median or below it, and nothing else is assumed. Three seeds give their whole
range 75 %; six seeds are the first to reach 95 %. Accuracies are bounded and training runs either learn or do not, so an interval from mean
and standard deviation would claim more than three numbers tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WANTED = 0.95


@dataclass(frozen=True)
class Interval:
    """A median and where it may lie.

    Attributes:
        median: of the results.
        low, high: bounds: the ``rank``-th smallest and the ``rank``-th largest result.
        rank: 1 for the whole range.
        confidence: probability that the bounds hold the median of further results.
        count: number of results.
    """

    median: float
    low: float
    high: float
    rank: int
    confidence: float
    count: int

    def overlaps(self, other: Interval) -> bool:
        """Whether the two have a value in common."""
        return self.low <= other.high and other.low <= self.high


def median_interval(values: Sequence[float]) -> Interval:
    """The narrowest interval of order statistics that holds the median with 95 % confidence, or the whole range where that is not reached.

    Raises:
        ValueError: no values.

    Example:
        >>> median_interval([0.91, 0.88, 0.90])
        Interval(median=0.9, low=0.88, high=0.91, rank=1, confidence=0.75, count=3)
    """
    if not values:
        raise ValueError("median_interval needs at least one value")
    ordered, n = sorted(values), len(values)
    rank = next((k for k in range((n + 1) // 2, 1, -1) if confidence(n, k) >= WANTED), 1)
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank], rank, confidence(n, rank), n)


def confidence(count: int, rank: int) -> float:
    """Probability that the median lies between the ``rank``-th smallest and ``rank``-th largest of ``count`` values."""
    return max(0.0, 1 - 2 * sum(math.comb(count, i) for i in range(rank)) / 2**count)
