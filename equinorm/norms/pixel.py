"""Pixelwise feature vector normalization."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from equinorm.core.base import check_eps, check_floating
from equinorm.core.position import position_norm
from equinorm.core.row import row_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


class PixelNorm(nn.Module):
    """Divide the features at each position by their root mean square.

    Formula:
        y = x / sqrt(mean_c x_c^2 + eps), over the channels at each position; nothing is learned. It is RMS norm over dimension 1 without
        weight.

    Use it when: a generator's activations escalate under competition with its discriminator; also to put latent vectors on a sphere.
    Not when: the magnitude at a position carries information that later layers need.
    Known trouble: a position where all features are zero stays zero, with a gradient of 1/sqrt(eps) = 1e4.

    Args:
        dim: the dimension of the features.
        eps: added to the mean square inside the root.

    Shape:
        x: any shape with a dimension ``dim``, to the same shape and dtype.

    Raises:
        TypeError: the input is not floating point.
        ValueError: the input has no such dimension, or eps is out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.PixelNorm()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]])

    Source: Karras et al. 2017, section 4.2.
    """

    facts: ClassVar[Facts] = Facts(
        name="pixel",
        title="Pixelwise Feature Vector Normalization (PixelNorm)",
        paper=Paper(
            authors="Karras et al.",
            title="Progressive Growing of GANs for Improved Quality, Stability, and Variation",
            year=2017,
            venue="ICLR 2018",
            arxiv="1710.10196",
            equation="section 4.2",
        ),
        family="sample",
        pools="C",
        invariances=frozenset({"scale", "per-sample"}),
    )

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        check_eps(self, eps)
        self.dim, self.eps = dim, eps

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """Pixel norm over dimension 1, for any number of channels."""
        return cls(**options)

    def forward(self, x: Tensor, *, impl: Impl = "auto") -> Tensor:
        check_floating(self, x)
        if not -x.ndim <= self.dim < x.ndim:
            raise ValueError(
                f"PixelNorm: the input must have shape (N, C, *spatial) or any with a dimension {self.dim}, got {tuple(x.shape)}"
            )
        rows = x.movedim(self.dim, -1)
        if rows.is_contiguous() or self.dim % x.ndim != 1:  # a position is a row; elsewhere a copy into rows would cost more than it saves
            y = row_norm(rows, 1, None, None, self.eps, centered=False, impl=impl if rows.is_contiguous() else "plain")
            return y.movedim(-1, self.dim)

        def definition(x: Tensor) -> Tensor:
            return row_norm(x.movedim(1, -1), 1, None, None, self.eps, centered=False, impl="plain").movedim(-1, 1)

        return position_norm(x, definition, 1, self.eps, centered=False, impl=impl)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"
