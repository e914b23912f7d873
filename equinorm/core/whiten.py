"""Norms that apply one matrix to each group of channels, and what they share: estimates, checks, and the choice of the groups."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask
from equinorm.core.covariance import Covariance, matrix_norm
from equinorm.core.precision import without_autocast
from equinorm.core.running import RunningState, recomputing
from equinorm.core.sync import gather_covariance, refusing_together
from equinorm.kernels import Impl, reference

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def divisor(channels: int, at_most: int) -> int:
    """The largest number of channels per group, at most ``at_most``, that divides ``channels``."""
    return next(d for d in range(min(at_most, channels), 0, -1) if channels % d == 0)


class WhiteningNorm(RunningState, ChannelNorm):
    """Abstract norm that applies one matrix to each group of channels; subclasses say in :meth:`projection` which.

    Attributes:
        channels_per_group: d, at most C.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        running: what is averaged: the "projection" matrices, or the "covariance" that evaluation takes the projection of.
        process_group: pool over this process group, or over all processes with "world".
    """

    momentum: float | None
    process_group: Group
    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        channels_per_group: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        running: Literal["projection", "covariance"],
        process_group: Group,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_count(self, channels_per_group=channels_per_group)
        check_momentum(self, momentum)
        d = min(channels_per_group, num_features)
        if num_features % d:
            divisors = [k for k in range(1, num_features + 1) if num_features % k == 0]
            raise ValueError(
                f"{type(self).__name__}: channels_per_group must divide num_features, got {channels_per_group} for {num_features} "
                f"channels; use one of {divisors}"
            )
        if running not in ("projection", "covariance"):
            raise ValueError(f'{type(self).__name__}: running must be "projection" or "covariance", got {running!r}')
        self.channels_per_group, self.momentum, self.running, self.process_group = d, momentum, running, process_group
        self.kept_wide = ("running_mean", f"running_{running}")
        groups = num_features // d
        self.register_state("running_mean", (groups, d), device=device, dtype=dtype)
        self.register_state(f"running_{running}", (groups, d, d), device=device, dtype=dtype)
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; forget the running estimates."""
        super().reset_parameters()
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget: mean 0, projection (or covariance) the identity, no batches."""
        self.running_mean.zero_()
        matrix = self.get_buffer(f"running_{self.running}")
        matrix.copy_(torch.eye(self.channels_per_group, device=matrix.device, dtype=matrix.dtype).expand_as(matrix))
        self.num_batches_tracked.zero_()

    @abstractmethod
    def projection(self, cov: Tensor, noise: float) -> Tensor:
        """The matrices (G, d, d) for covariances (G, d, d): pure, and differentiable as often as gradients shall be.

        Args:
            cov: symmetric, without eps.
            noise: relative rounding error of its entries.
        """

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        with refusing_together(self.process_group if self.learning else None, x.device):
            check_channels(self, x, self.num_features)
            mask = None if mask is None else canonical_mask(x, mask)
            if self.learning and self.process_group is None and mask is None:
                check_batch(self, x)
                self._check_rank(x.shape[0] * prod(x.shape[2:]))
        with without_autocast(x):
            estimate = None if self.learning else self.estimate()

            def rule(
                seen: Covariance | None, weight: Tensor | None, bias: Tensor | None
            ) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Covariance, Tensor] | None]:
                if seen is None:
                    assert estimate is not None
                    pooled, (center, matrix) = None, estimate
                else:
                    pooled = Covariance(*gather_covariance(*seen, self.process_group))
                    center, matrix = pooled.mean, self.projection(pooled.cov, torch.finfo(reference.wide(x[:0]).dtype).eps)
                scaled = matrix if weight is None else matrix * weight.to(matrix.dtype).reshape_as(center).unsqueeze(2)
                return (center, scaled, bias), None if pooled is None else (pooled, matrix)

            at = None if estimate is None else estimate[0]
            y, seen = matrix_norm(x, self.channels_per_group, rule, self.weight, self.bias, center=at, mask=mask, impl=impl)
            if seen is not None:
                self.learn(*seen)
            return y

    def estimate(self) -> tuple[Tensor, Tensor]:
        """The center (G, d) and the matrix (G, d, d) of evaluation; copies, because a later step moves the buffers."""
        matrix = self.get_buffer(f"running_{self.running}")
        small = reference.small_dtype(matrix)
        kept = matrix.to(small, copy=True)
        return (
            self.running_mean.to(small, copy=True),
            kept if self.running == "projection" else self.projection(kept, torch.finfo(matrix.dtype).eps),
        )

    @torch.no_grad()
    def learn(self, seen: Covariance, matrix: Tensor) -> None:
        """Move the estimates towards one batch.

        A repeated forward (activation checkpointing) changes nothing, nor does a batch of at most one value per channel. A group whose
        moments are not finite keeps its estimates.
        """
        if recomputing():
            return
        some = torch.as_tensor(seen.count, device=matrix.device).reshape(()) > 1
        self.num_batches_tracked.add_(some)
        step = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.clamp(min=1).to(matrix.dtype)
        name, value = f"running_{self.running}", matrix if self.running == "projection" else seen.cov
        old = self.get_buffer(name)
        sound = some & seen.mean.isfinite().all(1) & value.isfinite().all(2).all(1)  # (G,)
        self.move("running_mean", self.running_mean + step * (seen.mean - self.running_mean), sound[:, None])
        self.move(name, old + step * (value - old), sound[:, None, None])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channels_per_group={self.channels_per_group}, momentum={self.momentum}, running={self.running!r}"

    def _check_rank(self, count: int) -> None:
        d = self.channels_per_group
        if 0 < count < 2 * d:
            warnings.warn(
                f"{type(self).__name__}: a covariance of {d} channels from {count} values per channel is poor, and singular below {d + 1}: "
                f"directions that no batch shows are multiplied by 1 / sqrt(eps) in evaluation; take at least {2 * d} values, or fewer "
                "channels_per_group",
                RuntimeWarning,
                stacklevel=3,
            )
