"""Moving average batch normalization: averages over many small batches, in both directions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.core import Moments, normalize
from equinorm.core.base import ChannelNorm, check_channels, check_count, check_fraction
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.controlled import controlled_norm
from equinorm.core.measure import measure
from equinorm.core.running import RunningState, recomputing, some
from equinorm.core.sync import gather
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import small_dtype

if TYPE_CHECKING:
    from equinorm.core.sync import Group

RENORM_AFTER = 1000  # steps without the correction r, as in the authors' code


class MovingAverageBatchNorm(RunningState, ChannelNorm):
    r"""Batch norm for batches of one or two: the statistics of forward *and* backward are averages over the last batches.

    Formula:
        Step t = 1, 2, ... x2_t = mean of x^2 of a channel over (N, *S), not centred; s_t = mean of the last m = buffer_size of them;
        z = x / sqrt(s_t + eps); r = sqrt(s_t + eps) / sqrt(running_var + eps), kept in [1 / clip, clip], a constant;
        y = weight r z + bias; running_var' = alpha running_var + (1 - alpha) s_t.
        Backward, g the gradient to r z: q_t = mean(g r z); dx = (g r - z Q_t) / sqrt(s_t + eps), Q_t the mean of the last m values q.
        While t <= m or t < warmup_iters this batch's values stand in for both averages; r = 1 while t <= max(1000, warmup_iters).
        Evaluation: y = weight x / sqrt(running_var + eps) + bias.

    Use it when: a convolutional network trains with one or two samples per process and must fold at inference as batch norm does. The
        layers before it are ``CenConv2d``, or have ``weight_centering``, which stands in for the missing subtraction of the mean.
    Not when: batches are large, inputs are not centred, or anything needs the true derivative: second derivatives, ``torch.func``, gradient
        checks. The backward pass is not the derivative of the forward pass, by design.
    Known trouble: training moves state in forward and in backward. The variance includes the square of the mean. Another
        ``buffer_size`` makes checkpoints unloadable. Under DistributedDataParallel pass ``process_group`` or ``broadcast_buffers=False``.
        ``retain_graph`` with two backward passes writes q twice, to the same place. Activation checkpointing repeats a forward with the
        state of its first run, if the module runs once in it.

    Args:
        num_features: C.
        buffer_size: m; the authors' real batch size over the batch size per process.
        eps: added to each mean square inside its root.
        alpha: weight of the old value in ``running_var`` (the authors' momentum, whose sense is the opposite of torch's).
        warmup_iters: steps that use their own batch.
        clip: bound of r and 1 / r.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        process_group: pool the means of both directions over this process group, or over all processes with "world".
        device, dtype: of the parameters. The state is float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.MovingAverageBatchNorm(8, buffer_size=4)
        >>> norm(torch.randn(1, 8, 5, 5)).shape, norm.buffer_x2.shape
        (torch.Size([1, 8, 5, 5]), torch.Size([4, 8]))

    Source: Yan et al. 2020, Algorithm 1. The paper's bound of r is 1.05 and its m 16 in some experiments; the authors' code has 5 and the
    ratio of batch sizes, and adds that r begins after 1000 steps. The defaults here are the code's, with m = 16. Its checkpoints load.
    """

    facts: ClassVar[Facts] = Facts(
        name="moving_average_batch",
        title="Moving Average Batch Normalization",
        paper=Paper(
            authors="Yan et al.",
            title="Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
            year=2020,
            venue="ICLR",
            arxiv="2001.06838",
            equation="Algorithm 1",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="mean square per channel forward, one mean per channel backward",
        folds=True,
        invariances=frozenset({"per-channel"}),
        batch_of_one="works",
        one_position="works",
        reads_writes="2R+1W",
    )

    kept_wide = ("running_var", "buffer_x2", "buffer_gz")
    running_var: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    iters: Tensor
    process_group: Group

    def __init__(
        self,
        num_features: int,
        buffer_size: int = 16,
        eps: float = 1e-5,
        alpha: float = 0.98,
        warmup_iters: int = 100,
        clip: float = 5.0,
        affine: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_count(self, buffer_size=buffer_size)
        check_fraction(self, alpha=alpha)
        if isinstance(warmup_iters, bool) or not isinstance(warmup_iters, int) or warmup_iters < 0:
            raise ValueError(f"MovingAverageBatchNorm: warmup_iters must be an integer of at least 0, got {warmup_iters!r}")
        if not clip >= 1:
            raise ValueError(f"MovingAverageBatchNorm: clip bounds both r and 1 / r and must be at least 1, got {clip}")
        self.buffer_size, self.alpha, self.warmup_iters, self.clip = buffer_size, alpha, warmup_iters, clip
        self.process_group = process_group
        self.register_state("running_var", (num_features,), device=device, dtype=dtype)
        for name in ("buffer_x2", "buffer_gz"):
            self.register_state(name, (buffer_size, num_features), device=device, dtype=dtype)
        self.register_buffer("iters", torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; running variance 1, empty buffers, no steps."""
        super().reset_parameters()
        nn.init.ones_(self.running_var)
        for zero in (self.buffer_x2, self.buffer_gz, self.iters):
            zero.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        if not self.learning:
            square = self.running_var.to(small_dtype(x), copy=True).unsqueeze(0)
            estimate = Moments(torch.zeros_like(square), square, 1)
            return channel_norm(
                x, lambda _, w, b: normalize(estimate, w, b, self.eps), self.weight, self.bias, per=None, mask=mask, impl=impl
            )[0]
        with torch.no_grad():
            running, buffer, iters = self.before_step("running_var", "buffer_x2", "iters")
            m = measure(x.detach(), per="batch", mask=mask, impl=impl).over_batch(self.process_group)
            x2 = m.var + m.mean.square()  # (1, C)
            step = iters + 1
            buffer = torch.where(self._slot(step), x2, buffer)
            square = torch.where(self._alone(step), x2, buffer.mean(0, keepdim=True))
            r = ((square + self.eps) / (running + self.eps)).sqrt().clamp(1 / self.clip, self.clip)
            r = torch.where(step <= max(RENORM_AFTER, self.warmup_iters), torch.ones_like(r), r)
            if not recomputing():
                counted = some(m.count, x).reshape(())
                self.move("buffer_x2", buffer, counted)
                self.move("running_var", self.alpha * running + (1 - self.alpha) * square, counted)
                self.iters.add_(counted)
        scale = r * (square + self.eps).rsqrt()
        control = partial(self._control, step, r)
        return controlled_norm(x, torch.zeros_like(scale), scale, self.weight, self.bias, control, per="batch", mask=mask, impl=impl)

    def _slot(self, step: Tensor) -> Tensor:
        """Which row of the buffers belongs to ``step``: (m, 1)."""
        return (torch.arange(self.buffer_size, device=step.device) == step % self.buffer_size).unsqueeze(1)

    def _alone(self, step: Tensor) -> Tensor:
        """Whether ``step`` uses its own batch in place of the averages."""
        return (step <= self.buffer_size) | (step < self.warmup_iters)

    @torch.no_grad()
    def _control(self, step: Tensor, r: Tensor, mean_g: Tensor, mean_gy: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        pooled = gather(Moments(mean_gy, torch.zeros_like(mean_gy), count), self.process_group)
        buffer = torch.where(self._slot(step), pooled.mean, self.buffer_gz.to(r.dtype))
        q = torch.where(self._alone(step), pooled.mean, buffer.mean(0, keepdim=True))
        self.move("buffer_gz", buffer, some(pooled.count, r).reshape(()))
        return -q / r.square(), torch.zeros_like(mean_g)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, buffer_size={self.buffer_size}, alpha={self.alpha}, clip={self.clip}"
