"""The one idea: moments of the input, a small differentiable rule, one affine map applied to the input."""

from __future__ import annotations

from equinorm.core.affine import Affine, normalize
from equinorm.core.moments import Moments

__all__ = ["Affine", "Moments", "normalize"]
