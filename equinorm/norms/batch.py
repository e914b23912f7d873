"""Batch normalization, local or synchronised across processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import check_batch, check_channels, check_count, check_eps, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.following import following, set_activation, shown_activation
from equinorm.core.running import RunningMoments
from equinorm.core.sync import capturing, partners, refusing_together
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def batch(x: Moments, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group = None) -> tuple[Affine, Moments]:
    """One mean and variance per channel, over all samples and positions (and processes)."""
    pooled = x.over_batch(group)  # (1, C)
    return normalize(pooled, weight, bias, eps), pooled


def batch_norm(module: Any, x: Tensor, mask: Tensor | None, impl: Impl, group: Group) -> Tensor:
    """The forward of a module with batch norm's attributes, pooled over ``group`` in training."""
    estimated = not module.learning and module.running_mean is not None
    group = None if estimated or not module.training else group
    with refusing_together(group, x.device):
        check_channels(module, x, module.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
    options: dict[str, Any] = {"mask": mask, "impl": impl, "then": following(module)}
    if estimated:
        estimate = module.estimate()
        return channel_norm(x, lambda _, w, b: normalize(estimate, w, b, module.eps), module.weight, module.bias, per=None, **options)[0]
    if module.training and mask is None and partners(group) is None:
        check_batch(module, x)

    def pooled(moments: Moments, weight: Tensor | None, bias: Tensor | None) -> tuple[Affine, Moments]:
        return batch(moments, weight, bias, module.eps, group)

    y, seen = channel_norm(x, pooled, module.weight, module.bias, per="batch", **options)
    assert seen is not None
    if partners(group) is not None and not capturing(x) and int(seen.count) == 1:
        raise ValueError(
            f"{type(module).__name__}: training needs more than one value per channel over all processes to have a variance, got one "
            f"(shape {tuple(x.shape)} on this process); use larger batches, eval(), or a norm within the sample such as GroupNorm"
        )
    if module.learning:
        module.learn(seen)
    return y


class BatchNorm(RunningMoments, _BatchNorm):
    r"""Standardize each channel over the batch; use running estimates at inference.

    Formula:
        y = (x - mu) / sqrt(var + eps) * weight + bias, with mu and the biased var of each channel over (N, *S).
        After each training batch running <- running + momentum * (batch - running), with the variance times n / (n - 1) as in torch;
        evaluation puts the running estimates in place of mu and var.

    Use it when: a convolutional network trains with some 16 or more independent samples per process, or across processes with
        ``process_group``; inference is then a fixed affine map that folds into the neighbouring layer.
    Not when: batches are small, samples of a batch are correlated, sequences are padded without a mask, or samples must not see each other
        (per-sample gradients, gradient penalties).
    Known trouble: training and evaluation compute different things, and the gap grows as the batch shrinks. Running variances are averages
        of within-batch variances; if the means drift between batches, evaluation under-estimates. Accumulating gradients does not
        enlarge the batch. Under DistributedDataParallel without synchronisation, rank 0's estimates win.

    Differences: from ``torch.nn.BatchNorm2d``: one class for any number of spatial dimensions, (N, C) included; ``mask``;
    synchronisation on any device and with any split, empty ranks included; estimates stay float32 in half-precision modules, move once
    under activation checkpointing, and ignore channels whose batch statistics are not finite.

    Args:
        num_features: C.
        eps: added to the variance inside the root.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        track_running_stats: keep running estimates; without them evaluation uses the batch.
        bias: False leaves out the bias.
        process_group: pool the statistics over this process group, or over all processes with "world".
        device, dtype: of the parameters. Estimates are float32, or float64 in a float64 module.
        activation: name of a function of ``torch.nn.functional`` that follows the norm ("relu", "silu", "leaky_relu" ...), or None. What is
            between the two is never stored, and backward computes it anew.
        activation_param: slope of leaky_relu, alpha of elu and celu.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, one value per channel in training, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.BatchNorm(8)
        >>> norm.load_state_dict(torch.nn.BatchNorm2d(8).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Source: Ioffe and Szegedy 2015, Algorithm 1. The paper estimates population statistics after training; the running average is torch's
    custom, followed here to the letter so that checkpoints mean the same in both.
    """

    facts: ClassVar[Facts] = Facts(
        name="batch",
        title="Batch Normalization",
        paper=Paper(
            authors="Ioffe and Szegedy",
            title="Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
            year=2015,
            venue="ICML",
            arxiv="1502.03167",
            equation="Algorithm 1",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel",
        folds=True,
        invariances=frozenset({"shift", "scale", "per-channel"}),
        batch_of_one="normalizes over the positions of the one sample; refused when there is one position",
        one_position="normalizes over the samples",
        reads_writes="2R+1W",
    )

    process_group: Group

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        process_group: Group = None,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_count(self, num_features=num_features)
        check_eps(self, eps)
        check_momentum(self, momentum)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats, self.process_group = affine, track_running_stats, process_group
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
        return batch_norm(self, x, mask, impl, self.process_group)

    def extra_repr(self) -> str:
        return super().extra_repr() + shown_activation(self)
