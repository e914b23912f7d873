"""Instance normalization."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import check_channels, check_count, check_eps, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.following import following, set_activation, shown_activation
from equinorm.core.row import group_norm
from equinorm.core.running import RunningMoments
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def instance(x: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Affine, Moments]:
    """One mean and variance per sample and channel; what is remembered is their average over the samples."""
    bessel = x.count / (x.count - 1).clamp(min=1) if isinstance(x.count, Tensor) else x.count / max(x.count - 1, 1)
    average = Moments(x.mean.mean(0, keepdim=True), (x.var * bessel).mean(0, keepdim=True), x.mean.shape[0])
    return normalize(x, weight, bias, eps), average


class InstanceNorm(RunningMoments, _InstanceNorm):
    r"""Standardize each channel of each sample over its positions.

    Formula:
        y = (x - mu) / sqrt(var + eps) * weight + bias, with mu and the biased var over the positions of one channel of one sample.

    Use it when: the contrast of an image is not what the network should see: style transfer, image generation, domain generalisation.
    Not when: the mean of a channel carries the information, as in classification; or inputs have no positions.
    Known trouble: with ``track_running_stats`` evaluation becomes a fixed map per channel, which differs from training far more than batch
        norm's does, because the spread of means between samples is never counted. Leave it off unless a checkpoint needs it.

    Differences: from ``torch.nn.InstanceNorm2d``: one class for any number of spatial dimensions; ``mask``; the memory layout is kept; a
    wrong number of channels is an error also without ``affine``; with tracking, ``momentum=None`` is the plain average over batches and
    batches are counted (torch freezes the estimates and counts nothing).

    Args:
        num_features: C.
        eps: added to the variance inside the root.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,). Off by default, as in torch.
        track_running_stats: keep running estimates and use them in evaluation.
        bias: False leaves out the bias.
        device, dtype: of the parameters.
        activation: name of a function of ``torch.nn.functional`` that follows the norm ("relu", "silu", "leaky_relu" ...), or None. What is
            between the two is never stored, and backward computes it anew.
        activation_param: slope of leaky_relu, alpha of elu and celu.

    Shape:
        x: (N, C, *S) with at least one spatial dimension, to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where
        data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, no spatial dimension, a single position, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> y = equinorm.InstanceNorm(3)(torch.rand(2, 3, 8, 8) * 7)
        >>> torch.allclose(y.mean((2, 3)), torch.zeros(2, 3), atol=1e-6)
        True

    Source: Ulyanov, Vedaldi and Lempitsky 2016, Eq. 6. Running estimates are torch's: the batch mean of per-instance means and unbiased
    variances.
    """

    facts: ClassVar[Facts] = Facts(
        name="instance",
        title="Instance Normalization",
        paper=Paper(
            authors="Ulyanov, Vedaldi and Lempitsky",
            title="Instance Normalization: The Missing Ingredient for Fast Stylization",
            year=2016,
            arxiv="1607.08022",
            equation="Eq. 6",
        ),
        family="sample",
        pools="S",
        invariances=frozenset({"shift", "scale", "per-sample", "per-channel"}),
        one_position="refused: there is nothing to average",
    )

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_count(self, num_features=num_features)
        check_eps(self, eps)
        check_momentum(self, momentum)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None)
        self.register_running((num_features,), track=track_running_stats, device=device, dtype=dtype)
        set_activation(self, activation, activation_param)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm for ``channels`` channels with its default settings, as the catalogue builds it."""
        return cls(channels, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features, spatial=1)
        mask = None if mask is None else canonical_mask(x, mask)
        if not self.learning and self.running_mean is not None:
            estimate = self.estimate()
            return channel_norm(
                x,
                lambda _, w, b: normalize(estimate, w, b, self.eps),
                self.weight,
                self.bias,
                per=None,
                mask=mask,
                impl=impl,
                then=following(self),
            )[0]
        if x.shape[2:].numel() == 1:
            raise ValueError(
                f"InstanceNorm: each channel of a sample needs more than one position to have a variance, got shape {tuple(x.shape)}; "
                "use LayerNorm or GroupNorm where maps are 1x1"
            )
        if self.running_mean is None:
            return group_norm(x, self.num_features, self.weight, self.bias, self.eps, mask=mask, impl=impl, then=following(self))
        y, seen = channel_norm(
            x, lambda m, w, b: instance(m, w, b, self.eps), self.weight, self.bias, mask=mask, impl=impl, then=following(self)
        )
        if seen is not None and x.shape[0]:
            self.learn(seen, unbiased=False)
        return y

    def extra_repr(self) -> str:
        return super().extra_repr() + shown_activation(self)
