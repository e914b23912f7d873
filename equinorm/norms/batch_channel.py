"""Batch-channel normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.following import following, set_activation, shown_activation
from equinorm.core.running import RunningMoments, recomputing
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def batch_channel(
    x: Moments, by: Moments, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, groups: int, eps: float
) -> Affine:
    """Batch norm by the moments ``by``, then channel norm of its output: one affine map, one read and one write of x."""
    bn = normalize(by, w1, b1, eps)  # (1, C)
    cn = normalize(bn.of(x).over_groups(groups), w2, b2, eps)  # moments of the normalized x, known without touching the data
    return bn.then(cn)


class BatchChannelNorm(RunningMoments, ChannelNorm):
    r"""Batch norm followed by channel norm, as one affine map.

    Formula:
        z = (x - mu) / sqrt(var + eps) * weight + bias per channel, y = group norm of z over C / G channels and all positions of each
        sample, with one ``channel_weight`` and ``channel_bias`` per group.
        Large-batch form (default): mu, var are the batch's in training, running estimates in evaluation.
        Micro-batch form (``estimate=True``): mu, var are running estimates in training too, moved by each batch before they are used,
        without gradient: mu' = mu + r (mean(x) - mu), var' = var + r (mean((x - mu)^2) - var), r = momentum.

    Use it when: a convolutional network trains with few samples per process and with ``weight_standardization``; the batch part keeps
        channels from dying, the channel part keeps the scale.
    Not when: convolutions are not standardized (activations of the micro-batch form can drift), or inference must fold.
    Known trouble: all batch-part weights scaled by one factor change nothing. In the micro-batch form the result of training depends on
        the order of batches.

    Args:
        num_features: C.
        num_groups: G of the channel part, must divide C.
        eps: added to both variances inside the root.
        momentum: r, weight of the new value; the paper ties it to the learning rate. None for the plain average over all batches.
        affine: learn ``weight``, ``bias`` (C,) and ``channel_weight``, ``channel_bias`` (G,).
        estimate: the micro-batch form.
        variance: in the micro-batch form, "drift" moves the variance towards the second moment about the estimate before this step
            (the authors' code), "batch" towards the variance of the batch.
        process_group: pool the batch part over this process group, or over all processes with "world".
        device, dtype: of the parameters.
        activation: name of a function of ``torch.nn.functional`` that follows the norm ("relu", "silu", "leaky_relu" ...), or None. What is
            between the two is never stored, and backward computes it anew.
        activation_param: slope of leaky_relu, alpha of elu and celu.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: G does not divide C, groups of one value, wrong number of channels, one value per channel in training of the large-batch
            form, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.BatchChannelNorm(64, num_groups=32, estimate=True)
        >>> norm(torch.randn(1, 64, 5, 5)).shape
        torch.Size([1, 64, 5, 5])

    Source: Qiao et al. 2019 (arXiv:1903.10520 v2, section 4). The authors' code starts r at 0 and leaves it to the trainer; here it is
    ``momentum`` from the start. Neither estimate carries n / (n - 1) in the micro-batch form; the large-batch form stores it as torch does.
    """

    facts: ClassVar[Facts] = Facts(
        name="batch_channel",
        title="Batch-Channel Normalization",
        paper=Paper(
            authors="Qiao et al.",
            title="Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
            year=2019,
            arxiv="1903.10520",
            equation="section 4",
        ),
        family="batch",
        pools="NS+GS",
        train_differs=True,
        synchronizes="count, mean and variance per channel of the batch part",
        invariances=frozenset({"shift", "scale"}),
        batch_of_one="the micro-batch form works; the large-batch form normalizes over positions, and is refused when there is one",
        one_position="works while a group has more than one channel",
        reads_writes="2R+1W",
    )

    process_group: Group
    channel_weight: nn.Parameter | None
    channel_bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        estimate: bool = False,
        variance: Literal["drift", "batch"] = "drift",
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_count(self, num_groups=num_groups)
        check_momentum(self, momentum)
        if num_features % num_groups:
            raise ValueError(f"BatchChannelNorm: num_groups must divide num_features, got {num_groups} groups for {num_features} channels")
        if variance not in ("drift", "batch"):
            raise ValueError(f'BatchChannelNorm: variance must be "drift" or "batch", got {variance!r}')
        self.num_groups, self.momentum, self.estimated, self.variance = num_groups, momentum, estimate, variance
        self.process_group = process_group
        for name in ("channel_weight", "channel_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_groups, device=device, dtype=dtype)) if affine else None)
        self.register_running((num_features,), device=device, dtype=dtype)
        set_activation(self, activation, activation_param)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, *, num_groups: int = 32, **options: Any) -> Self:
        """Batch-channel norm with ``num_groups`` groups, or the largest smaller number that divides ``channels``."""
        groups = next(g for g in range(min(num_groups, channels), 0, -1) if channels % g == 0)
        return cls(channels, groups, **options)

    def reset_parameters(self) -> None:
        """Weights 1, biases 0; forget the running estimates."""
        super().reset_parameters()
        if self.channel_weight is not None and self.channel_bias is not None:
            nn.init.ones_(self.channel_weight)
            nn.init.zeros_(self.channel_bias)
        self.reset_running_stats()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        if x.shape[1:].numel() == self.num_groups:
            raise ValueError(
                f"BatchChannelNorm: a group needs more than one value to have a variance, got shape {tuple(x.shape)} "
                f"in {self.num_groups} groups; use fewer groups"
            )
        mask = None if mask is None else canonical_mask(x, mask)
        if self.learning and not self.estimated and self.process_group is None and mask is None:
            check_batch(self, x)
        before = self.estimate() if self.estimated or not self.learning else None
        # A forward repeated by activation checkpointing finds the estimates already moved.
        moving = self.learning and not recomputing()
        step = self._step() if moving and self.estimated else 0.0

        def rule(m: Moments, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None) -> Affine | tuple[Affine, Moments]:
            # Wide from here on: each of them receives a sum of gradients.
            w1, b1, w2, b2 = (None if w is None else w.to(m.mean.dtype) for w in (w1, b1, w2, b2))
            if w2 is not None and b2 is not None:  # (G,) to (C,)
                w2, b2 = (w.repeat_interleave(self.num_features // self.num_groups) for w in (w2, b2))
            if before is None:
                pooled = m.over_batch(self.process_group)
                return batch_channel(m, pooled, w1, b1, w2, b2, self.num_groups, self.eps), pooled
            if not moving:
                return batch_channel(m, before, w1, b1, w2, b2, self.num_groups, self.eps)
            pooled = Moments(m.mean.detach(), m.var.detach(), m.count).over_batch(self.process_group)
            drift = (pooled.mean - before.mean).square() if self.variance == "drift" else 0
            target = Moments(pooled.mean, pooled.var + drift, pooled.count)
            moved = Moments(before.mean + step * (target.mean - before.mean), before.var + step * (target.var - before.var), 1)
            return batch_channel(m, moved, w1, b1, w2, b2, self.num_groups, self.eps), target

        y, seen = channel_norm(
            x, rule, self.weight, self.bias, self.channel_weight, self.channel_bias, mask=mask, impl=impl, then=following(self)
        )
        if self.learning and seen is not None:
            self.learn(seen, unbiased=not self.estimated)
        return y

    def _step(self) -> float | Tensor:
        assert self.num_batches_tracked is not None
        return self.momentum if self.momentum is not None else 1 / (self.num_batches_tracked + 1).double()

    def extra_repr(self) -> str:
        settings = f"num_groups={self.num_groups}, momentum={self.momentum}, estimate={self.estimated}"
        return f"{super().extra_repr()}, {settings}{shown_activation(self)}"
