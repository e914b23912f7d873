"""The last of the three beats: one affine map per sample and channel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from equinorm.core.moments import Moments


class Affine(NamedTuple):
    """The map ``x -> (x - center) * scale + shift``, each part a small tensor that broadcasts to ``(N, C)``.

    The centre stays apart from the shift: folding both into one number loses a digit per decade of mean/std.
    """

    center: Tensor  # (N | 1, C | 1)
    scale: Tensor
    shift: Tensor

    def of(self, x: Moments) -> Moments:
        """The moments of the mapped data, known from those of the data without touching it."""
        return Moments((x.mean - self.center) * self.scale + self.shift, x.var * self.scale.square(), x.count)

    def then(self, after: Affine) -> Affine:
        """The one map that does this one and then ``after``: two norms in a row cost one read and one write."""
        return Affine(self.center, self.scale * after.scale, (self.shift - after.center) * after.scale + after.shift)


def normalize(x: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    """The map that takes data with moments ``x`` to mean ``bias`` and standard deviation ``weight`` (0 and 1 when None).

    Args:
        x: moments to normalize by.
        weight: (C,) or anything that broadcasts to the moments, or None.
        bias: likewise.
        eps: added to the variance inside the root.
    """
    scale = (x.var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return Affine(x.mean, scale, x.mean.new_zeros(()) if bias is None else bias)
