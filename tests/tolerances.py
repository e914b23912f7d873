"""How far a result may be from its float64 reference: one table, one measure, and the reason for each number.

The measure is the max-norm relative error ``max|actual - expected| / max|expected|``, over the whole tensor or over each group of it
(one channel, one row) where a large group would hide a small one. An elementwise relative error would punish the entries that happen to
be near zero, which a norm's output always has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Bound on the error of one comparison: ``max|actual - expected| <= max(atol, rtol * max|expected|)``."""

    rtol: float
    atol: float
    reason: str


# atol only matters where the exact answer is (nearly) zero, such as the gradient of a constant input: it is what rounding leaves of terms
# of order one. For the half types that is float32's, since they are computed there.
OUTPUT: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-13, "eps is 2.2e-16; the references sum naively, up to a few thousand terms"),
    torch.float32: Tolerance(1e-6, 3e-7, "eps is 1.2e-7; a centred, scaled, shifted value is rounded a handful of times"),
    torch.bfloat16: Tolerance(4e-3, 1e-6, "half an eps is 3.9e-3: one rounding of a result computed in float32"),
    torch.float16: Tolerance(6e-4, 1e-6, "half an eps is 4.9e-4: one rounding of a result computed in float32"),
}

GRADIENT: dict[torch.dtype, Tolerance] = OUTPUT | {
    torch.float32: Tolerance(2e-6, 6e-7, "a gradient subtracts two projections from the incoming one: about twice the output's roundings"),
}


def relative_error(actual: Tensor, expected: Tensor, *, over: tuple[int, ...] | None = None) -> Tensor:
    """Return ``max|actual - expected| / max|expected|`` in float64, where the maxima run over the dimensions ``over``.

    Args:
        actual: the result, of any floating dtype.
        expected: the reference, of the same shape.
        over: dimensions that form one group, for instance ``(0, 2, 3)`` for one error per channel; ``None`` for the whole tensor.

    Returns:
        The errors, with the dimensions ``over`` removed. A group whose reference is all zeros has error 0 if met exactly, else infinity.
    """
    dims = tuple(range(expected.dim())) if over is None else over
    error = (actual.double() - expected.double()).abs().amax(dims)
    scale = expected.double().abs().amax(dims)
    return torch.where(error == 0, error, error / scale)
