"""Instance-level meta normalization."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_channels, check_count
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def instance_meta(
    x: Moments, key: Moments, encoder: Tensor, to_weight: Tensor, to_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Affine:
    """Normalize by ``x`` and rescale by what an auto-encoder makes of the key moments, (N, K) each: variance to weight, mean to bias."""
    encoder, to_weight, to_bias = (w.to(key.mean.dtype) for w in (encoder, to_weight, to_bias))
    repeats = weight.shape[0] // key.mean.shape[1]
    omega = F.linear(F.linear(key.var, encoder).relu(), to_weight).sigmoid()  # (N, K)
    beta = F.linear(F.linear(key.mean, encoder).relu(), to_bias).tanh()
    return normalize(x, omega.repeat_interleave(repeats, 1) + weight, beta.repeat_interleave(repeats, 1) + bias, eps)


class ILMNorm(ChannelNorm):
    r"""Group, instance or layer norm whose weight and bias are predicted, sample by sample, from the moments that it removes.

    Formula:
        y = omega * (x - mu) / sqrt(var + eps) + beta, with mu and the biased var of group, instance or layer norm, and for each key group g
        of ``key_group_size`` consecutive channels with moments m_g, v_g, and every channel c of it:
        omega_c = sigmoid(D_w relu(E v))_g + weight_c and beta_c = tanh(D_b relu(E m))_g + bias_c.

    Use it when: a norm within the sample, with small batches, shall keep some of the contrast and brightness that it takes away.
    Not when: features must not depend on the scale of the input: the predictions do.
    Known trouble: E and D see moments that nobody normalized: large activations saturate sigmoid and tanh, and predictions become
        constants. At first omega is about 1.5 everywhere (sigmoid(0) = 0.5 added to a weight of 1).

    Args:
        num_channels: C.
        norm: "group", "instance" or "layer" (over (C, *S)).
        num_groups: of group norm, must divide C; ignored by the others.
        key_group_size: channels per key group, must divide C into K groups.
        reduction: the code has K / reduction numbers, rounded down; 2 where K is below reduction.
        eps: added to the variance inside the root.
        device, dtype: of the parameters: ``weight`` (1) and ``bias`` (0), both (C,); ``encoder`` (E), ``to_weight`` (D_w) and ``to_bias``
            (D_b), which start as linear layers without bias.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: unknown norm, groups that do not divide C, statistics over one value, wrong number of channels, a mask of another shape,
            or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.ILMNorm(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])

    Source: Jia, Chen and Chen 2019, whose gamma is the variance v here. The authors' code takes unbiased variances throughout; here all are
    biased. Where K equals reduction, its group form has a code of 1 number and its other forms one of 2; here all have 1.
    """

    facts: ClassVar[Facts] = Facts(
        name="ilm",
        title="Instance-Level Meta Normalization",
        paper=Paper(
            authors="Jia, Chen and Chen",
            title="Instance-Level Meta Normalization",
            year=2019,
            venue="CVPR",
            arxiv="1904.03516",
        ),
        family="learned",
        pools="GS",
        invariances=frozenset({"per-sample"}),
        one_position='normalizes over the channels of a group; refused when that is one, as with norm="instance"',
        reads_writes="2R+1W",
    )

    def __init__(
        self,
        num_channels: int,
        norm: Literal["group", "instance", "layer"] = "group",
        num_groups: int = 32,
        key_group_size: int = 16,
        reduction: int = 16,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, True, device, dtype)
        check_count(self, num_groups=num_groups, key_group_size=key_group_size, reduction=reduction)
        groups = {"group": num_groups, "instance": num_channels, "layer": 1}
        if norm not in groups:
            raise ValueError(f'ILMNorm: norm must be "group", "instance" or "layer", got {norm!r}')
        if num_channels % groups[norm]:
            raise ValueError(f"ILMNorm: num_groups must divide num_channels, got {num_groups} groups for {num_channels} channels")
        if num_channels % key_group_size:
            divisors = [size for size in range(1, num_channels + 1) if num_channels % size == 0]
            raise ValueError(
                f"ILMNorm: key_group_size must divide num_channels, got {key_group_size} for {num_channels} channels; use one of {divisors}"
            )
        self.norm, self.groups, self.key_groups = norm, groups[norm], num_channels // key_group_size
        code = self.key_groups // reduction or 2
        self.encoder = nn.Parameter(torch.empty(code, self.key_groups, device=device, dtype=dtype))
        self.to_weight = nn.Parameter(torch.empty(self.key_groups, code, device=device, dtype=dtype))
        self.to_bias = nn.Parameter(torch.empty(self.key_groups, code, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, *, num_groups: int = 32, key_group_size: int = 16, **options: Any) -> Self:
        """The norm with ``num_groups`` groups and key groups of that size, or the next smaller numbers that divide ``channels``."""
        groups, size = (next(g for g in range(min(n, channels), 0, -1) if channels % g == 0) for n in (num_groups, key_group_size))
        return cls(channels, num_groups=groups, key_group_size=size, **options)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, encoder and decoders as linear layers."""
        super().reset_parameters()
        for matrix in (self.encoder, self.to_weight, self.to_bias):
            bound = matrix.shape[1] ** -0.5
            nn.init.uniform_(matrix, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        if x.shape[1:].numel() == self.groups:
            raise ValueError(
                f"ILMNorm: each statistic needs more than one value to have a variance, got shape {tuple(x.shape)} with norm={self.norm!r} "
                f"and {self.groups} group(s)"
            )
        mask = None if mask is None else canonical_mask(x, mask)
        size = self.num_features // self.key_groups

        def rule(m: Moments, encoder: Tensor, to_weight: Tensor, to_bias: Tensor, weight: Tensor, bias: Tensor) -> Affine:
            mean, var, _ = m.over_groups(self.key_groups)  # (N, C), repeated within each group
            key = Moments(mean[:, ::size], var[:, ::size], 1)  # (N, K)
            return instance_meta(m.over_groups(self.groups), key, encoder, to_weight, to_bias, weight, bias, self.eps)

        parameters = self.encoder, self.to_weight, self.to_bias, self.weight, self.bias
        return channel_norm(x, rule, *parameters, mask=mask, impl=impl)[0]

    def extra_repr(self) -> str:
        return f"{self.num_features}, norm={self.norm!r}, groups={self.groups}, key_groups={self.key_groups}, eps={self.eps}"
