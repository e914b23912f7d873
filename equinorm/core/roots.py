"""Powers whose exponent is a multiple of 1/4, by square roots: a tenth of the price of a general power, and of its derivative."""

from __future__ import annotations

from torch import Tensor


def power(t: Tensor, exponent: float) -> Tensor:
    """``t ** exponent`` for positive ``t``, differentiable to any order: by square roots where two of them do."""
    if abs(exponent) not in (0.25, 0.5, 0.75):
        return t.reciprocal() if exponent == -1 else t.pow(exponent)
    root = t.rsqrt() if exponent < 0 else t.sqrt()
    if abs(exponent) == 0.5:
        return root
    return root.sqrt() if abs(exponent) == 0.25 else root * root.sqrt()
