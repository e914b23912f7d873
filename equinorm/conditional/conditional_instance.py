"""Conditional instance normalization."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.conditional.condition import check_choice, chosen
from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_channels, check_count
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def conditional_instance(x: Moments, gamma: Tensor, beta: Tensor, eps: float) -> Affine:
    """Instance norm of each sample with the scale and shift (N | 1, C) of its own style."""
    return normalize(x, gamma, beta, eps)


class ConditionalInstanceNorm(ChannelNorm):
    r"""Instance norm whose weight and bias are a row of a table, chosen or blended per sample.

    Formula:
        z = gamma_s * (x - mu) / sqrt(var + eps) + beta_s, with mu and the biased var over the positions of one channel of one sample.
        gamma_s, beta_s are row s of ``weight`` and ``bias`` (K, C) for a class number s, or for shares w the blends sum_k w_k gamma_k and
        sum_k w_k beta_k.

    Use it when: one network paints in a known set of styles, or generates one of a known set of classes.
    Not when: styles are not known at training time (AdaptiveInstanceNorm), or contrast carries the information.
    Known trouble: only the rows of a batch receive gradient, while weight decay and optimizers with momentum move all rows; keep the tables
        out of weight decay.

    Args:
        num_features: C.
        num_classes: K, the number of styles.
        eps: added to the variance inside the root.
        device, dtype: of the parameters ``weight`` (1) and ``bias`` (0), both (K, C).

    Shape:
        x: (N, C, *S) with at least one spatial dimension, to the same shape and dtype. y: class numbers (N,), int64 or int32, or
        floating-point shares (N, K), or (K,) for the whole batch; shares need not sum to one. mask: boolean (N, *S) or (N, 1, *S), True
        where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point, or y is neither.
        ValueError: wrong number of channels, no spatial dimension, a single position, class numbers out of range, a y or mask of another
            shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm, x = equinorm.ConditionalInstanceNorm(8, num_classes=3), torch.randn(2, 8, 5, 5)
        >>> norm(x, torch.tensor([0, 2])).shape
        torch.Size([2, 8, 5, 5])
        >>> norm(x, torch.tensor([0.5, 0.0, 0.5])).shape
        torch.Size([2, 8, 5, 5])

    Source: Dumoulin, Shlens and Kudlur 2016, Eq. 5; the blend is that of section 3.4 and of the authors' code.
    """

    facts: ClassVar[Facts] = Facts(
        name="conditional_instance",
        title="Conditional Instance Normalization",
        paper=Paper(
            authors="Dumoulin, Shlens and Kudlur",
            title="A Learned Representation For Artistic Style",
            year=2016,
            venue="ICLR 2017",
            arxiv="1610.07629",
            equation="Eq. 5",
        ),
        family="conditional",
        pools="S",
        invariances=frozenset({"shift", "scale", "per-sample", "per-channel"}),
        one_position="refused: there is nothing to average",
        reads_writes="2R+1W",
    )
    takes_condition: ClassVar[bool] = True

    def __init__(
        self, num_features: int, num_classes: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_features, eps, False, device, dtype)
        check_count(self, num_classes=num_classes)
        self.num_classes, self.affine = num_classes, True
        self.weight = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features, spatial=1)
        check_choice(self, x, y, self.num_classes)
        assert self.weight is not None
        assert self.bias is not None
        if x.shape[2:].numel() == 1:
            raise ValueError(
                f"ConditionalInstanceNorm: each channel of a sample needs more than one position to have a variance, got shape "
                f"{tuple(x.shape)}; use ConditionalBatchNorm or FiLM where maps are 1x1"
            )
        mask = None if mask is None else canonical_mask(x, mask)
        gamma, beta = chosen(self.weight, y), chosen(self.bias, y)  # each (N | 1, C)
        return channel_norm(x, lambda m, g, b: conditional_instance(m, g, b, self.eps), gamma, beta, mask=mask, impl=impl)[0]

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_classes={self.num_classes}, eps={self.eps}"
