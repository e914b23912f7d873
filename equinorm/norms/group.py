"""Group normalization."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from equinorm.core.base import check_channels, check_count, check_eps
from equinorm.core.channel import canonical_mask
from equinorm.core.following import following, set_activation, shown_activation
from equinorm.core.row import group_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


class GroupNorm(torch.nn.GroupNorm):
    r"""Standardize contiguous groups of channels of each sample over their positions.

    Formula:
        y = (x - mu) / sqrt(var + eps) * weight + bias, with mu and the biased var over the C / G channels of a group and the positions of
        one sample; weight and bias per channel. G = 1 is layer norm over (C, *S), G = C is instance norm.

    Use it when: batches are small (detection, segmentation, diffusion) or samples must not see each other.
    Not when: a large independent batch is at hand and inference must be a folded affine map.
    Known trouble: channels may die behind it, since a group with one active channel is normalized all the same; batch-channel norm with
        weight standardization answers this. Groups of one value are refused: they would come out as the bias.

    Differences: from ``torch.nn.GroupNorm``: ``mask``; groups of one value raise whatever the batch size; a wrong number of channels is an
    error also without ``affine``; the result does not depend on the rest of the batch in any memory layout.

    Args:
        num_groups: G, must divide C.
        num_channels: C.
        eps: added to the variance inside the root.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        bias: False leaves out the bias.
        device, dtype: of the parameters.
        activation: name of a function of ``torch.nn.functional`` that follows the norm ("relu", "silu", "leaky_relu" ...), or None. What is
            between the two is never stored, and backward computes it anew.
        activation_param: slope of leaky_relu, alpha of elu and celu.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: G does not divide C, wrong number of channels, groups of one value, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.GroupNorm(4, 8)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    Source: Wu and He 2018, Eq. 7.
    """

    facts: ClassVar[Facts] = Facts(
        name="group",
        title="Group Normalization",
        paper=Paper(authors="Wu and He", title="Group Normalization", year=2018, venue="ECCV", arxiv="1803.08494", equation="Eq. 7"),
        family="sample",
        pools="GS",
        invariances=frozenset({"shift", "scale", "per-sample"}),
        one_position="normalizes over the channels of the group; refused when the group is one channel",
    )

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        check_count(self, num_groups=num_groups, num_channels=num_channels)
        check_eps(self, eps)
        if num_channels % num_groups:
            divisors = [g for g in range(1, num_channels + 1) if num_channels % g == 0]
            raise ValueError(
                f"GroupNorm: num_groups must divide num_channels, got {num_groups} groups for {num_channels} channels; "
                f"use one of {divisors}"
            )
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if wanted else None)
        set_activation(self, activation, activation_param)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, *, num_groups: int = 32, **options: Any) -> Self:
        """Group norm with ``num_groups`` groups, or the largest smaller number that divides ``channels``."""
        groups = next(g for g in range(min(num_groups, channels), 0, -1) if channels % g == 0)
        return cls(groups, channels, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_channels)
        if x.shape[1:].numel() == self.num_groups:
            raise ValueError(
                f"GroupNorm: a group needs more than one value to have a variance, got shape {tuple(x.shape)} "
                f"in {self.num_groups} groups; use fewer groups"
            )
        mask = None if mask is None else canonical_mask(x, mask)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, mask=mask, impl=impl, then=following(self))

    def extra_repr(self) -> str:
        return super().extra_repr() + shown_activation(self)
