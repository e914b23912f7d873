"""The covariance geometry: mean and covariance per group of channels -> a rule on (G, d, d) -> one matrix per group, applied to x.

The same three beats as in the channel geometry, with matrices in place of numbers. Everything is plain differentiable PyTorch around a few
matrix products, so derivatives of every order are right wherever those of the rule are. Large tensors are (G, d, M): G groups of d
contiguous channels, and all M samples and positions. Small ones are float64 where the device has it.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask
from equinorm.core.precision import without_autocast
from equinorm.core.running import RunningState, recomputing
from equinorm.core.sync import gather_covariance, refusing_together
from equinorm.kernels import reference

if TYPE_CHECKING:
    from equinorm.core.sync import Group

BLOCK = 1024  # positions whose products are summed in the type of the data; the sums of blocks are added in that of small tensors


class Covariance(NamedTuple):
    """Mean and biased covariance of the channels of each group, with the number of values behind them.

    Attributes:
        mean: (G, d) small tensor.
        cov: (G, d, d) small tensor, symmetric.
        count: samples and positions; a number, or a tensor where a mask or other processes decide.
    """

    mean: Tensor
    cov: Tensor
    count: int | Tensor


class Grouped(NamedTuple):
    """The input by groups of channels, minus an origin near its mean that carries no gradient.

    Subtracting first keeps products small: what the origin misses of the mean is subtracted from the products, where it no longer matters.

    Attributes:
        data: (G, d, M) in the type of large tensors; 0 where nothing counts.
        origin: (G, d) in that type.
        kept: (M,) boolean, True where data counts; None where all does.
    """

    data: Tensor
    origin: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, x: Tensor, d: int, mask: Tensor | None, origin: Tensor | None = None) -> Grouped:
        """Arrange x (N, C, *S) in groups of ``d`` channels; the origin is the mean, or the one given, as far as its type can hold it."""
        data = reference.wide(x).movedim(1, 0).flatten(1).unflatten(0, (-1, d))
        kept = None if mask is None else mask.flatten()
        if kept is not None:
            data = torch.where(kept, data, 0)
        if origin is None:
            count = max(data.shape[2], 1) if kept is None else kept.sum().clamp(min=1)
            origin = data.detach().sum(2) / count
        data = data - origin.to(data.dtype).unsqueeze(2)
        return cls(data if kept is None else torch.where(kept, data, 0), origin.to(data.dtype), kept)

    def measure(self) -> Covariance:
        """Mean and covariance of x."""
        small = reference.small_dtype(self.data)
        count = self.data.shape[2] if self.kept is None else self.kept.sum()
        size = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
        rest = self.data.sum(2).to(small) / size  # (G, d)
        cov = _Products.apply(self.data, small) / size - rest.unsqueeze(2) * rest.unsqueeze(1)
        return Covariance(self.origin.to(small) + rest, (cov + cov.mT) / 2, count)

    def project(self, center: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``matrix @ (x - center) * weight + bias``: (G, d, M), with center (G, d), matrix (G, d, d), weight and bias (C,)."""
        if weight is not None:
            matrix = matrix * weight.to(matrix.dtype).reshape_as(center).unsqueeze(2)
        shift = matrix @ (self.origin.to(center.dtype) - center).unsqueeze(2)  # (G, d, 1)
        if bias is not None:
            shift = shift + bias.to(matrix.dtype).reshape_as(center).unsqueeze(2)
        y = torch.baddbmm(shift.to(self.data.dtype), matrix.to(self.data.dtype), self.data)
        return y if self.kept is None else torch.where(self.kept, y, 0)


def ungrouped(y: Tensor, x: Tensor) -> Tensor:
    """``y`` (G, d, M) in the shape, dtype and memory layout of ``x`` (N, C, *S)."""
    y = y.to(x.dtype).reshape(x.shape[1], x.shape[0], *x.shape[2:])  # (C, N, *S)
    if x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return y.movedim(0, -1).contiguous().movedim(-1, 1)
    return y.movedim(0, 1).contiguous()


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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with refusing_together(self.process_group if self.learning else None, x.device):
            check_channels(self, x, self.num_features)
            mask = None if mask is None else canonical_mask(x, mask)
            if self.learning and self.process_group is None and mask is None:
                check_batch(self, x)
                self._check_rank(x.shape[0] * prod(x.shape[2:]))
        with without_autocast(x):
            if not self.learning:
                center, matrix = self.estimate()
                return ungrouped(Grouped.of(x, self.channels_per_group, mask, center).project(center, matrix, self.weight, self.bias), x)
            grouped = Grouped.of(x, self.channels_per_group, mask)
            pooled = Covariance(*gather_covariance(*grouped.measure(), self.process_group))
            matrix = self.projection(pooled.cov, torch.finfo(grouped.data.dtype).eps)
            y = ungrouped(grouped.project(pooled.mean, matrix, self.weight, self.bias), x)
            self.learn(pooled, matrix)
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


class _Products(torch.autograd.Function):
    """``data @ data.mT`` (G, d, d) in the small type, summed in blocks: over millions of positions as exact as over a thousand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(data: Tensor, small: torch.dtype) -> Tensor:
        whole = torch.compiler.is_compiling() or not data.shape[2]  # a trace of thousands of blocks would take minutes to compile
        blocks = (data,) if whole else data.split(BLOCK, 2)
        total = (blocks[0] @ blocks[0].mT).to(small)
        for block in blocks[1:]:
            total = total + block @ block.mT
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (data,) = ctx.saved_tensors
        return (grad + grad.mT).to(data.dtype) @ data, None
