"""EvoNorm, sample series: norm and activation in one, without the batch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_channels, check_count
from equinorm.core.channel import canonical_mask, channel_norm, split
from equinorm.core.pointwise import Point, pointwise_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import small_dtype

Variant = Literal["S0", "S1", "S2"]


def reciprocal(group: Moments, variant: Variant, eps: float) -> Tensor:
    """1 / s_g, or 1 / q_g."""
    return ((group.var + group.mean.square() if variant == "S2" else group.var) + eps).rsqrt()


def gated(x: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Swish of x, with the reciprocal deviation and weight as scale."""
    return x * (x * v).sigmoid() * scale + shift


def _pull(dy: Tensor, x: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    gate = (x * v).sigmoid_()
    swish = x * gate
    to_swish = dy * scale
    bend = (1 - gate).mul_(swish)  # the gate's derivative times x, per unit of v
    to_v = (bend * x).mul_(to_swish)
    return bend.mul_(v).add_(gate).mul_(to_swish), (to_v, swish.mul_(dy), dy)


SWISH = Point(gated, _pull)


class EvoNormS(ChannelNorm):
    r"""Swish divided by the deviation of a group of channels: norm and activation in one.

    Formula:
        s_g = sqrt(var + eps), q_g = sqrt(mean square + eps), over the channels of a group and all positions of one sample, biased;
        S0: y = x sigmoid(v x) / s_g * weight + bias, v one learned number per channel;
        S1: y = x sigmoid(x) / s_g * weight + bias;
        S2: y = x sigmoid(x) / q_g * weight + bias.
        No mean is subtracted.

    Use it when: batches are small or samples must not see each other, in place of group norm *and* the activation after it.
    Not when: an activation follows, or inference must fold into a neighbouring layer.
    Known trouble: ``apply_act=False`` is surprising: the published codes then leave out the norm too and apply only weight and bias.
        ``keep_norm`` divides by s_g or q_g alone.

    Args:
        num_features: C.
        groups: number of groups, must divide C.
        variant: "S0", "S1" or "S2".
        eps: added to the variance or mean square inside the root.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        apply_act: False applies weight and bias alone, as the published codes do at places without activation.
        keep_norm: with ``apply_act=False``, divide by the group's deviation.
        group_size: channels per group; instead of ``groups``.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: groups that do not divide C, groups of one value (S0 and S1), unknown variant, ``keep_norm`` together with
            ``apply_act``, wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> x = torch.tensor([-1.0, 0.0, 1.0, 4.0]).reshape(1, 1, 4)
        >>> equinorm.EvoNormS(1, groups=1, eps=0.0)(x).detach().flatten()
        tensor([-0.1438,  0.0000,  0.3908,  2.0996])

    Source: Liu et al. 2020, Table 2; S1 and S2 as in timm. Where 32 groups do not divide C the authors' code takes fewer without a word;
    here that is an error, and ``equinorm.create`` takes fewer.
    """

    facts: ClassVar[Facts] = Facts(
        name="evonorm_s",
        title="EvoNorm, sample series",
        paper=Paper(
            authors="Liu et al.",
            title="Evolving Normalization-Activation Layers",
            year=2020,
            venue="NeurIPS",
            arxiv="2004.02967",
            equation="Table 2",
        ),
        family="sample",
        pools="GS",
        invariances=frozenset({"per-sample"}),
        one_position="works while a group has more than one channel",
        reads_writes="2R+1W",
    )

    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        variant: Variant = "S0",
        eps: float = 1e-5,
        affine: bool = True,
        apply_act: bool = True,
        keep_norm: bool = False,
        group_size: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_count(self, groups=groups)
        if group_size is not None:
            check_count(self, group_size=group_size)
            if num_features % group_size:
                raise ValueError(f"EvoNormS: group_size must divide num_features, got {group_size} for {num_features} channels")
            groups = num_features // group_size
        if num_features % groups:
            raise ValueError(
                f"EvoNormS: groups must divide num_features, got {groups} groups for {num_features} channels; "
                "choose a divisor, or group_size"
            )
        if variant not in get_args(Variant):
            raise ValueError(f"EvoNormS: variant must be one of {', '.join(get_args(Variant))}, got {variant!r}; EvoNormB has the others")
        if keep_norm and apply_act:
            raise ValueError("EvoNormS: keep_norm says what apply_act=False leaves over; with apply_act=True the norm is always kept")
        self.variant: Variant = variant
        self.groups, self.apply_act, self.keep_norm = groups, apply_act, keep_norm
        wanted = variant == "S0" and apply_act
        self.register_parameter("v", nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, *, groups: int = 32, **options: Any) -> Self:
        """The norm with ``groups`` groups, or the largest smaller number that divides ``channels``."""
        groups = next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0)
        return cls(channels, groups, **options)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, v 1."""
        super().reset_parameters()
        if self.v is not None:
            nn.init.ones_(self.v)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        normed = self.apply_act or self.keep_norm
        if normed and self.variant != "S2" and x.shape[1:].numel() == self.groups:
            raise ValueError(
                f"EvoNormS: a group needs more than one value to have a variance, got shape {tuple(x.shape)} in {self.groups} groups; "
                'use fewer groups, or variant "S2"'
            )

        def rule(m: Moments | None, weight: Tensor | None, bias: Tensor | None) -> Affine:
            zero = torch.zeros(1, 1, dtype=small_dtype(x), device=x.device)
            scale = zero + 1 if m is None else reciprocal(m.over_groups(self.groups), self.variant, self.eps)
            return Affine(zero, scale if weight is None else scale * weight, zero if bias is None else bias.to(zero.dtype))

        if not self.apply_act:
            return channel_norm(x, rule, self.weight, self.bias, per="sample" if normed else None, mask=mask, impl=impl)[0]

        def parts(m: Moments, weight: Tensor | None, bias: Tensor | None, v: Tensor | None) -> tuple[tuple[Tensor, ...], None]:
            _, scale, shift = split(rule(m, weight, bias))[0]
            return (m.mean.new_ones(1, 1) if v is None else v.unsqueeze(0), scale, shift), None

        return pointwise_norm(x, parts, SWISH, self.weight, self.bias, self.v, mask=mask, impl=impl)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, variant={self.variant!r}, apply_act={self.apply_act}"
