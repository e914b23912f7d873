"""Batch renormalization."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_channels, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.running import RunningState, recomputing
from equinorm.core.sync import refusing_together
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl

if TYPE_CHECKING:
    from equinorm.core.sync import Group

Limit = float | Callable[[int], float]


def batch_renorm(
    x: Moments, mean: Tensor, s: Tensor, r_max: Tensor, d_max: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """Batch norm, corrected by constants r and d towards what the running estimates would give."""
    s_b = (x.var + eps).sqrt()  # (1, C)
    r = (s_b.detach() / s).clamp(1 / r_max, r_max)
    d = ((x.mean.detach() - mean) / s).clamp(-d_max, d_max)
    return _affine(x.mean, r / s_b, d, weight, bias)


def estimated(mean: Tensor, s: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
    """The running estimates in place of the batch's."""
    return _affine(mean, 1 / s, torch.zeros_like(mean), weight, bias)


def _affine(center: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    return Affine(center, scale, shift if bias is None else shift + bias)


class BatchRenorm(RunningState, ChannelNorm):
    r"""Batch norm for small or dependent batches: corrected in training so that it computes what evaluation will.

    Formula:
        y = ((x - mu) / s_B * r + d) * weight + bias, s_B = sqrt(var + eps), with mu and the biased var of each channel over (N, *S),
        r = clip(s_B / s, 1 / r_max, r_max), d = clip((mu - m) / s, -d_max, d_max) and running m, s; no gradient flows through r and d.
        Then m += momentum * (mu - m), s += momentum * (s_B - s). Evaluation is (x - m) / s * weight + bias.

    Use it when: batches are small, or their samples depend on each other, and inference must be a fixed affine map.
    Not when: samples must not see each other, or training is too short for the running estimates to settle.
    Known trouble: the limits must open slowly, or the first steps, whose running estimates are far off, diverge. One value per channel has
        no deviation: the output is d * weight + bias, and s is pulled towards sqrt(eps); warned of.

    Args:
        num_features: C.
        eps: added to the variance inside the root; it is part of the running deviation.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        r_max: limit of r, at least 1, or a function of the number of steps done.
        d_max: limit of d, at least 0, or a function of the number of steps done.
        warmup: (a, b, c): r_max opens linearly from 1 between step a and b, d_max from 0 between a and c. None for limits that are constant
            from the start. Limits given as functions are their own schedule.
        track: "std" keeps a running deviation, as the paper does; "var" keeps ``running_var`` as batch norm does, whose checkpoints then
            load. The two differ in evaluation: a mean of deviations is not the root of the mean variance.
        process_group: pool the statistics over this process group, or over all processes with "world".
        device, dtype: of the parameters. Estimates are float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.BatchRenorm(8, warmup=None)
        >>> norm(torch.randn(2, 8, 5, 5)).shape, norm.running_std.shape
        (torch.Size([2, 8, 5, 5]), torch.Size([8]))

    Source: Ioffe 2017, Algorithm 1; defaults and schedule of section 4. Keras keeps separate averages for r and d and for inference, and
    does not clip by default; here one pair serves both, as in the paper.
    """

    facts: ClassVar[Facts] = Facts(
        name="batch_renorm",
        title="Batch Renormalization",
        paper=Paper(
            authors="Ioffe",
            title="Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
            year=2017,
            venue="NeurIPS",
            arxiv="1702.03275",
            equation="Algorithm 1",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel",
        folds=True,
        invariances=frozenset({"per-channel"}),
        batch_of_one="normalizes over the positions of the one sample; a single value has no deviation and is warned of",
        one_position="normalizes over the samples",
        reads_writes="2R+1W",
    )

    process_group: Group
    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        warmup: tuple[int, int, int] | None = (5000, 40000, 25000),
        track: Literal["std", "var"] = "std",
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_momentum(self, momentum)
        for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            if not callable(limit) and not limit >= least:
                raise ValueError(f"BatchRenorm: {name} must be a number of at least {least} or a function of the step, got {limit}")
            if warmup is not None and not callable(limit) and limit == float("inf"):
                raise ValueError(f"BatchRenorm: {name} cannot open linearly to infinity; give a finite limit, or warmup=None")
        if warmup is not None and not (len(warmup) == 3 and 0 <= warmup[0] < min(warmup[1:])):
            raise ValueError(f"BatchRenorm: warmup must be steps (a, b, c) with 0 <= a < b and a < c, or None, got {warmup}")
        if track not in ("std", "var"):
            raise ValueError(f'BatchRenorm: track must be "std" or "var", got {track!r}')
        self.momentum, self.r_max, self.d_max, self.warmup, self.track = momentum, r_max, d_max, warmup, track
        self.process_group = process_group
        self.kept_wide = ("running_mean", f"running_{track}")
        for name in self.kept_wide:
            self.register_state(name, (num_features,), device=device, dtype=dtype)
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; forget the running estimates."""
        super().reset_parameters()
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Mean 0, deviation or variance 1, no steps."""
        self.running_mean.zero_()
        self.get_buffer(self.kept_wide[1]).fill_(1)
        self.num_batches_tracked.zero_()

    def limits(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """The limits of r and d after so many steps, as small tensors."""
        found = []
        for limit, least, end in ((self.r_max, 1.0, 1), (self.d_max, 0.0, 2)):
            if callable(limit):
                found.append(torch.as_tensor(limit(int(steps)), dtype=torch.float64, device=steps.device))
            elif self.warmup is None:
                found.append(torch.full_like(steps, limit, dtype=torch.float64))
            else:
                start, opened = self.warmup[0], self.warmup[end]
                found.append(least + (limit - least) * ((steps - start).double() / (opened - start)).clamp(0, 1))
        return found[0], found[1]

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        with refusing_together(self.process_group if self.learning else None, x.device):
            check_channels(self, x, self.num_features)
            mask = None if mask is None else canonical_mask(x, mask)
        mean, spread, steps = self.before_step(*self.kept_wide, "num_batches_tracked")
        s = spread if self.track == "std" else (spread + self.eps).sqrt()
        if not self.learning:
            return channel_norm(x, lambda _, w, b: estimated(mean, s, w, b), self.weight, self.bias, per=None, mask=mask, impl=impl)[0]
        if x.numel() == x.shape[1] and x.numel():
            warnings.warn(
                f"BatchRenorm: one value per channel has no deviation, got shape {tuple(x.shape)}: the output depends on it through d "
                "alone, and the running deviation shrinks; use a larger batch (drop_last=True drops a last batch of one)",
                RuntimeWarning,
                stacklevel=2,
            )
        r_max, d_max = self.limits(steps)

        def rule(moments: Moments, weight: Tensor | None, bias: Tensor | None) -> tuple[Affine, Moments]:
            pooled = moments.over_batch(self.process_group)
            return batch_renorm(pooled, mean, s, r_max, d_max, weight, bias, self.eps), pooled

        y, seen = channel_norm(x, rule, self.weight, self.bias, per="batch", mask=mask, impl=impl)
        assert seen is not None
        self._learn(seen)
        return y

    @torch.no_grad()
    def _learn(self, seen: Moments) -> None:
        if recomputing():
            return
        some = torch.as_tensor(seen.count, device=seen.mean.device).reshape(()) > 0
        self.num_batches_tracked.add_(some)
        rate = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.clamp(min=1).double()
        spread = (seen.var + self.eps).sqrt() if self.track == "std" else seen.var
        where = some & (seen.mean.isfinite() & seen.var.isfinite()).reshape(-1)
        for name, new in zip(self.kept_wide, (seen.mean, spread), strict=True):
            old = self.get_buffer(name)
            self.move(name, old + rate * (new.reshape(-1) - old), where)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, r_max={self.r_max}, d_max={self.d_max}, track={self.track!r}"
