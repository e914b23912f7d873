"""Mean-only batch normalization: subtract the batch mean of each channel, and leave the scale to the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.running import RunningMoments, recomputing
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import HALF, small_dtype

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def mean_only(mean: Tensor, bias: Tensor | None) -> Affine:
    """Subtract the mean, add the bias, scale by nothing."""
    return Affine(mean, mean.new_ones(()), mean.new_zeros(()) if bias is None else bias.to(mean.dtype))


class MeanOnlyBatchNorm(RunningMoments):
    r"""Subtract the mean of each channel over the batch; use a running mean at inference.

    Formula:
        y = x - mu + bias, with mu the mean of each channel over (N, *S).
        After each training batch running_mean <- running_mean + momentum * (mu - running_mean); evaluation puts it in place of mu.

    Use it when: the layer before has weight normalization, whose missing half this is: it centres pre-activations as batch norm does, and
        adds gentler noise, because it divides by no batch variance.
    Not when: the scale must be controlled, too: nothing here sees it.
    Known trouble: a bias in the layer before is subtracted again; build that layer with ``bias=False``. Training and evaluation differ.

    Args:
        num_features: C.
        momentum: weight of the new value in the running mean; None for the plain average over all batches.
        bias: learn a bias (C,), 0 at the start.
        process_group: take the mean over this process group, or over all processes with "world".
        device, dtype: of the bias. The running mean is float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.MeanOnlyBatchNorm(2)
        >>> norm(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).detach()
        tensor([[-1.,  0.],
                [ 1.,  0.]])

    Source: Salimans and Kingma 2016, section 4. The weight of the new value, 0.1, is that of the authors' code.
    """

    facts: ClassVar[Facts] = Facts(
        name="mean_only_batch",
        title="Mean-only Batch Normalization",
        paper=Paper(
            authors="Salimans and Kingma",
            title="Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
            year=2016,
            venue="NeurIPS",
            arxiv="1602.07868",
            equation="section 4",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="count and mean per channel",
        folds=True,
        invariances=frozenset({"shift", "per-channel"}),
        batch_of_one="subtracts the mean over the positions of the one sample; a single position comes out as the bias",
        one_position="subtracts the mean over the samples",
        reads_writes="2R+1W",
    )
    kept_wide = ("running_mean",)
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        check_count(self, num_features=num_features)
        check_momentum(self, momentum)
        self.num_features, self.momentum = num_features, momentum
        self.process_group: Group = process_group
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None)
        wide = torch.float32 if (dtype or torch.get_default_dtype()) in HALF else dtype
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=wide))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm for ``channels`` channels with its default settings, as the catalogue builds it."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """Bias 0, nothing learned."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget: mean 0, no batches."""
        for buffer in (self.running_mean, self.num_batches_tracked):
            assert buffer is not None
            buffer.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        if not self.learning:
            assert self.running_mean is not None
            mean = self.running_mean.to(small_dtype(x), copy=True).unsqueeze(0)  # (1, C)
            return channel_norm(x, lambda _, bias: mean_only(mean, bias), self.bias, per=None, mask=mask, impl=impl)[0]

        def rule(moments: Moments, bias: Tensor | None) -> tuple[Affine, Moments]:
            pooled = moments.over_batch(self.process_group)
            return mean_only(pooled.mean, bias), pooled

        y, seen = channel_norm(x, rule, self.bias, per="batch", mask=mask, impl=impl)
        if seen is not None and not recomputing():
            self._learn_mean(seen)
        return y

    @torch.no_grad()
    def _learn_mean(self, seen: Moments) -> None:
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        some = torch.as_tensor(seen.count, device=seen.mean.device).reshape(()) > 0  # a batch of no values teaches nothing
        self.num_batches_tracked.add_(some)
        weight = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype)
        mean = seen.mean.reshape(-1).to(self.running_mean.dtype)
        moved = self.running_mean + weight * (mean - self.running_mean)
        self.running_mean.copy_(torch.where(some & mean.isfinite(), moved, self.running_mean))

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"
