"""Decorrelated batch normalization: ZCA whitening of groups of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from equinorm.core.matrix import roots
from equinorm.core.whiten import WhiteningNorm, divisor
from equinorm.facts import Facts, Paper

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def zca(cov: Tensor, eps: float, noise: float) -> Tensor:
    """The symmetric matrix that takes data of this covariance to covariance I: the one nearest to doing nothing but scaling."""
    return roots(cov + eps * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device), noise)[1]


class DecorrelatedBatchNorm(WhiteningNorm):
    r"""Whiten groups of channels over the batch: each has mean 0, variance 1 and no correlation with the others of its group.

    Formula:
        y = W (x - mu) * weight + bias per group of d channels, W = (S + eps I)^(-1/2), with mu and the biased covariance S of the group
        over all samples and positions.
        After each training batch running <- running + momentum * (batch - running) for mu and W; evaluation puts these in place.

    Use it when: features are correlated and optimisation suffers from it (discriminators, style removal, shallow convolutional nets); the
        symmetric (ZCA) root keeps every channel as near to itself as whitening can.
    Not when: a batch has fewer than about 2 d values per channel, or speed matters more: :class:`~equinorm.IterNorm` needs matrix products
        only.
    Known trouble: directions that a batch does not span are multiplied by 1 / sqrt(eps) at inference. Where channels are nearly copies of
        each other, training amplifies the noise between them. The mean of the matrices is not the matrix of the mean covariance:
        ``running`` chooses.

    Args:
        num_features: C.
        channels_per_group: d, must divide C; more than C means all channels. d = 1 is batch norm.
        eps: added to the eigenvalues of the covariance.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        running: average the "projection" W (the authors' code) or the "covariance", whose W evaluation then computes.
        process_group: pool mean and covariance over this process group, or over all processes with "world".
        device, dtype: of the parameters. Estimates are float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.
        Buffers: ``running_mean`` (G, d), ``running_projection`` or ``running_covariance`` (G, d, d), ``num_batches_tracked``.

    Raises:
        TypeError: the input is not floating point.
        ValueError: d does not divide C, wrong number of channels, one value per channel in training, a mask of another shape, or settings
            out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.DecorrelatedBatchNorm(2, eps=0.0)
        >>> norm(torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, -1.0], [2.0, 4.0]])).detach()
        tensor([[-0.6061,  0.4041],
                [ 1.6162, -0.6061],
                [-1.0102, -1.2122],
                [ 0.0000,  1.4142]])

    Source: Huang et al. 2018, Algorithm 1. The authors' backward divides by differences of eigenvalues; this one never does, and is exact
    for equal ones too. Their Lua code allows a smaller last group and starts without affine; the PyTorch port folds all groups into the
    batch, so that they share one matrix, and draws the weight at random: none of this is followed.
    """

    facts: ClassVar[Facts] = Facts(
        name="decorrelated_batch",
        title="Decorrelated Batch Normalization (DBN)",
        paper=Paper(
            authors="Huang et al.",
            title="Decorrelated Batch Normalization",
            year=2018,
            venue="CVPR",
            arxiv="1804.08450",
            equation="Algorithm 1",
        ),
        family="whitening",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and covariance per group",
        invariances=frozenset({"shift", "scale"}),
        batch_of_one="whitens over the positions of the one sample; refused when there is one position",
        one_position="whitens over the samples",
        reads_writes="3R+1W",
    )

    def __init__(
        self,
        num_features: int,
        channels_per_group: int = 16,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        running: Literal["projection", "covariance"] = "projection",
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, channels_per_group, eps, momentum, affine, running, process_group, device, dtype)

    @classmethod
    def for_channels(cls, channels: int, *, channels_per_group: int = 16, **options: Any) -> Self:
        """The norm with ``channels_per_group`` channels in a group, or the largest smaller number that divides ``channels``."""
        return cls(channels, divisor(channels, channels_per_group), **options)

    def projection(self, cov: Tensor, noise: float) -> Tensor:
        """(S + eps I)^(-1/2)."""
        return zca(cov, self.eps, noise)
