"""Scaled L2 normalization."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import check_count, check_trailing
from equinorm.core.channel import channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def scale_norm(x: Tensor, g: Tensor, eps: float, *, mask: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """``g * x / max(||x||, eps)`` for every row of the last dimension.

    A row is a channel of its own in the channel geometry: its norm follows from its moments, and the map is one factor.

    Args:
        x: (..., D), floating.
        g: one number for all rows, 0-dimensional.
        eps: smallest norm that a row is divided by, positive.
        mask: boolean, broadcastable to x; where False the value does not count and comes out as 0.
        impl: "plain" rules the kernels out for this call.
    """

    def rule(row: Moments, g: Tensor) -> Affine:
        square = (row.var + row.mean.square()) * row.count  # (rows, 1)
        return Affine(square.new_zeros(()), g / square.clamp(min=eps**2).sqrt(), square.new_zeros(()))

    rows = x.reshape(-1, 1, x.shape[-1])
    if mask is not None:
        mask = mask.expand(x.shape).reshape(rows.shape)
    return channel_norm(rows, rule, g, mask=mask, impl=impl)[0].reshape(x.shape)


class ScaleNorm(nn.Module):
    """Put every feature vector on a sphere whose radius is the layer's one parameter.

    Formula:
        y = g * x / max(||x||, eps), over the last dimension; g starts at sqrt(D), which makes it RMS norm without weight.

    Use it when: a transformer trains on little data or with few parameters to spare, at the cost of one number per layer.
    Not when: features need gains of their own.
    Known trouble: rows shorter than eps are scaled by g / eps, no longer normalized; a row of zeros stays zero.

    Args:
        num_features: D, the size of the last dimension.
        eps: smallest norm that a row is divided by, positive.
        init_scale: g at the start, sqrt(D) if None.
        device, dtype: of the parameter ``scale``, 0-dimensional.

    Shape:
        x: (..., D) to the same shape and dtype. mask: boolean, broadcastable to x, True where data is: (N, T, 1) for padded tokens, or
        finer for padded features; the rest enters no norm and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: another last dimension, a mask that is not boolean or does not broadcast, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.ScaleNorm(2, init_scale=10.0)(torch.tensor([[3.0, 4.0]])).detach()
        tensor([[6., 8.]])

    Source: Nguyen and Salazar 2019, section 2.3; the clamp with 1e-5 is the authors' code. Their companion, embeddings of fixed length, is
    :func:`~equinorm.fix_norm`.
    """

    facts: ClassVar[Facts] = Facts(
        name="scale",
        title="Scaled L2 Normalization (ScaleNorm)",
        paper=Paper(
            authors="Nguyen and Salazar",
            title="Transformers without Tears: Improving the Normalization of Self-Attention",
            year=2019,
            venue="IWSLT",
            arxiv="1910.05895",
            equation="section 2.3",
        ),
        family="sample",
        pools="D",
        invariances=frozenset({"scale", "per-sample"}),
        one_position="normalizes the features of the one position",
    )

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        init_scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(self, num_features=num_features)
        if not 0 < eps < float("inf"):
            raise ValueError(f"ScaleNorm: eps must be finite and positive, it is what a row of zeros is divided by; got {eps}")
        self.num_features, self.eps = num_features, eps
        self.init_scale = num_features**0.5 if init_scale is None else float(init_scale)
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """Scale norm over a last dimension of ``channels`` features."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """``scale`` to its initial value."""
        nn.init.constant_(self.scale, self.init_scale)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_trailing(self, x, (self.num_features,), mask)
        return scale_norm(x, self.scale, self.eps, mask=mask, impl=impl)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, init_scale={self.init_scale:g}"
