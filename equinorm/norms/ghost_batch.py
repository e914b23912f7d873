"""Ghost batch normalization: batch norm over small virtual batches."""

from __future__ import annotations

from math import ceil
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.running import RunningMoments, recomputing
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def ghost_batch(x: Moments, chunks: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Affine, Moments]:
    """One mean and variance per channel and virtual batch, a run of consecutive samples."""
    n = x.mean.shape[0]
    seen = x.over_chunks(chunks)  # (K, C)
    size, longer = divmod(n, chunks)
    sizes = torch.tensor([size + 1] * longer + [size] * (chunks - longer), device=x.mean.device)
    mean, var = (part.repeat_interleave(sizes, 0, output_size=n) for part in (seen.mean, seen.var))  # (N, C)
    return normalize(Moments(mean, var, x.count), weight, bias, eps), seen


class GhostBatchNorm(RunningMoments, ChannelNorm):
    r"""Batch norm within virtual batches: consecutive parts of the batch, each with statistics of its own.

    Formula:
        y = (x - mu_k) / sqrt(var_k + eps) * weight + bias, with mu_k and the biased var_k of each channel over (V, *S), the samples of
        virtual batch k of K. Running estimates take the virtual batches in turn, m <- m + momentum * (mu_k - m), with the variance times
        n / (n - 1). Evaluation is batch norm's.

    Use it when: batches are large and the noise of small-batch statistics helps to generalise, or a published network (TabNet) asks for it.
    Not when: the batch is small already.
    Known trouble: K virtual batches move the estimates by 1 - (1 - momentum)^K in one step: 0.81 for 0.1 and 16. The running variance is
        an average of variances within virtual batches; shuffle, or differences between them are missing from it.

    Args:
        num_features: C.
        virtual_batch_size: V, 128 if neither it nor ``num_splits`` is given. The batch is cut into ceil(N / V) parts as near to equal as
            can be; for V = 2 into floor(N / 2), which leaves no part of one.
        eps: added to the variance inside the root.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        track_running_stats: keep running estimates; without them evaluation uses the batch, in parts as well.
        num_splits: K, in place of ``virtual_batch_size``; a smaller batch has a part for each sample.
        running_stats: "sequential" as above; "mean" moves once, by 1 - (1 - momentum)^K towards the plain mean of the parts' moments.
        device, dtype: of the parameters. Estimates are float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a virtual batch with one value per channel in training, a mask of another shape, or settings
            that contradict each other or are out of range.

    Example:
        >>> import torch, equinorm
        >>> x = torch.randn(6, 8)
        >>> norm = equinorm.GhostBatchNorm(8, virtual_batch_size=3)
        >>> torch.allclose(norm(x)[3:], equinorm.BatchNorm(8)(x[3:]), atol=1e-6)
        True

    Source: Hoffer, Hubara and Soudry 2017, Algorithm 1. The authors' code has no such layer: it runs the network on each part of the batch
    in turn, which amounts to the same. Ports differ in what they do with a batch that does not divide; here no part is left over.
    """

    facts: ClassVar[Facts] = Facts(
        name="ghost_batch",
        title="Ghost Batch Normalization",
        paper=Paper(
            authors="Hoffer, Hubara and Soudry",
            title="Train longer, generalize better: closing the generalization gap in large batch training of neural networks",
            year=2017,
            venue="NeurIPS",
            arxiv="1705.08741",
            equation="Algorithm 1",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        folds=True,
        invariances=frozenset({"shift", "scale", "per-channel"}),
        batch_of_one="one part; normalizes over the positions of the one sample; refused when there is one position",
        one_position="normalizes over the samples of each part; refused when a part has one",
        reads_writes="2R+1W",
    )

    def __init__(
        self,
        num_features: int,
        virtual_batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        num_splits: int | None = None,
        running_stats: Literal["sequential", "mean"] = "sequential",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_momentum(self, momentum)
        if virtual_batch_size is not None and num_splits is not None:
            raise ValueError(
                f"GhostBatchNorm: give virtual_batch_size or num_splits, got both: {virtual_batch_size} samples and {num_splits} parts"
            )
        if num_splits is None:
            virtual_batch_size = 128 if virtual_batch_size is None else virtual_batch_size
            check_count(self, virtual_batch_size=virtual_batch_size)
        else:
            check_count(self, num_splits=num_splits)
        if running_stats not in ("sequential", "mean"):
            raise ValueError(f'GhostBatchNorm: running_stats must be "sequential" or "mean", got {running_stats!r}')
        self.virtual_batch_size, self.num_splits, self.momentum, self.running_stats = (
            virtual_batch_size,
            num_splits,
            momentum,
            running_stats,
        )
        self.register_running((num_features,), track=track_running_stats, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; forget the running estimates."""
        super().reset_parameters()
        self.reset_running_stats()

    def parts(self, samples: int) -> int:
        """K: into how many virtual batches a batch of so many samples is cut."""
        if self.num_splits is not None:
            parts = min(self.num_splits, samples)
        elif self.virtual_batch_size == 2:
            parts = samples // 2
        else:
            assert self.virtual_batch_size is not None
            parts = ceil(samples / self.virtual_batch_size)
        return max(parts, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        if not self.learning and self.running_mean is not None:
            estimate = self.estimate()
            return channel_norm(
                x, lambda _, w, b: normalize(estimate, w, b, self.eps), self.weight, self.bias, per=None, mask=mask, impl=impl
            )[0]
        parts = self.parts(x.shape[0])
        if self.training and mask is None and x.shape[0] // parts * x.shape[2:].numel() == 1:
            raise ValueError(
                f"GhostBatchNorm: training needs more than one value per channel in each virtual batch to have a variance, got shape "
                f"{tuple(x.shape)} in {parts} parts; use larger virtual batches or fewer parts, or eval()"
            )

        if x.ndim == 2 and mask is None and x.shape[0] % parts == 0:
            y, seen = self._side_by_side(x, parts, impl)
        else:

            def rule(moments: Moments, weight: Tensor | None, bias: Tensor | None) -> tuple[Affine, Moments]:
                return ghost_batch(moments, parts, weight, bias, self.eps)

            y, seen = channel_norm(x, rule, self.weight, self.bias, mask=mask, impl=impl)
        assert seen is not None
        if self.learning:
            self._learn_in_turn(seen)
        return y

    def _side_by_side(self, x: Tensor, parts: int, impl: Impl) -> tuple[Tensor, Moments | None]:
        """The same for features (N, C), whose moments per sample would be as large as x: the parts as channels of one batch (V, K C)."""
        size, channels = x.shape[0] // parts, x.shape[1]

        def rule(moments: Moments, weight: Tensor | None, bias: Tensor | None) -> tuple[Affine, Moments]:
            weight, bias = (None if w is None else w.repeat(parts) for w in (weight, bias))  # (K C,)
            return normalize(moments, weight, bias, self.eps), moments

        beside = x.reshape(parts, size, channels).transpose(0, 1).reshape(size, parts * channels)
        y, seen = channel_norm(beside, rule, self.weight, self.bias, per="batch", impl=impl)
        assert seen is not None
        seen = Moments(seen.mean.reshape(parts, channels), seen.var.reshape(parts, channels), seen.count)
        return y.reshape(size, parts, channels).transpose(0, 1).reshape(x.shape), seen

    @torch.no_grad()
    def _learn_in_turn(self, seen: Moments) -> None:
        """What K steps of the running average do, at once: each part counts by how many came after it. Parts of one value are skipped."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None or recomputing():
            return
        count = torch.as_tensor(seen.count, dtype=seen.mean.dtype, device=seen.mean.device).expand(len(seen.mean), 1)  # (K, 1)
        known = (count > 1).to(seen.mean.dtype)
        steps = known.sum()
        self.num_batches_tracked.add_((steps > 0).long())
        mean_share = known / steps.clamp(min=1)
        if self.momentum is None:
            shares = mean_share / self.num_batches_tracked.clamp(min=1)
        elif self.running_stats == "mean":
            shares = mean_share * (1 - (1 - self.momentum) ** steps)
        else:
            after = known.flip(0).cumsum(0).flip(0) - known
            shares = known * self.momentum * (1 - self.momentum) ** after
        var = seen.var * (count / (count - 1).clamp(min=1))
        mean, var = ((shares * (new - old)).sum(0) + old for new, old in ((seen.mean, self.running_mean), (var, self.running_var)))
        where = mean.isfinite() & var.isfinite()
        self.move("running_mean", mean, where)
        self.move("running_var", var, where)

    def extra_repr(self) -> str:
        parts = f"virtual_batch_size={self.virtual_batch_size}" if self.num_splits is None else f"num_splits={self.num_splits}"
        return f"{super().extra_repr()}, momentum={self.momentum}, {parts}"
