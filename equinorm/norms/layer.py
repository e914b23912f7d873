"""Layer normalization."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from equinorm.core.base import check_eps, check_trailing
from equinorm.core.row import row_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


class LayerNorm(torch.nn.LayerNorm):
    r"""Standardize the last dimensions of the input, each row by its own mean and variance.

    Formula:
        y = (x - mu) / sqrt(var + eps) * weight + bias, with mu and the biased var over the dimensions in ``normalized_shape``.

    Use it when: features are a vector per token or sample: transformers, recurrent networks, deep MLPs, any batch size.
    Not when: channels are feature maps of a convolutional network (use GroupNorm; with one group it is layer norm over (C, *S)).
    Known trouble: a row of one value is always the bias. A constant row comes out as the bias, its gradient is multiplied by 1/sqrt(eps).

    Differences: from ``torch.nn.LayerNorm``: ``mask``; derivatives of every order are right; exact at any mean (torch loses one digit per
    decade of mean/std in float32); the output has the dtype of the input also under autocast.

    Args:
        normalized_shape: trailing shape to normalize, an int for the last dimension.
        eps: added to the variance inside the root.
        elementwise_affine: learn ``weight`` (1) and ``bias`` (0) of that shape.
        bias: False leaves out the bias.
        device, dtype: of the parameters.

    Shape:
        x: (..., *normalized_shape) to the same shape and dtype. mask: boolean, broadcastable to x, True where data is: (N, T, 1) for
        padded tokens, or finer for padded features; the rest enters no statistic and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: the trailing shape differs, a mask that does not broadcast or is not boolean, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.LayerNorm(4, eps=0.0)(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).detach()
        tensor([[-1.3416, -0.4472,  0.4472,  1.3416]])

    Source: Ba, Kiros and Hinton 2016, Eq. 3 and 4.
    """

    facts: ClassVar[Facts] = Facts(
        name="layer",
        title="Layer Normalization",
        paper=Paper(authors="Ba, Kiros and Hinton", title="Layer Normalization", year=2016, arxiv="1607.06450", equation="Eq. 3"),
        family="sample",
        pools="D",
        invariances=frozenset({"shift", "scale", "per-sample"}),
        one_position="normalizes the features of the one position",
    )

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        check_eps(self, eps)
        if torch.Size(self.normalized_shape).numel() == 1:
            warnings.warn("LayerNorm: normalized_shape holds one value, so every output will be the bias", stacklevel=2)

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """Layer norm over a last dimension of ``channels`` features."""
        return cls(channels, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_trailing(self, x, self.normalized_shape, mask)
        return row_norm(x, len(self.normalized_shape), self.weight, self.bias, self.eps, mask=mask, impl=impl)
