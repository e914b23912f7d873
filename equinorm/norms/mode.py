"""Mode normalization: several sets of batch statistics, and a gate that assigns samples to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.running import RunningMoments, recomputing
from equinorm.core.sync import LEAST
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def assign(x: Moments, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    """The gates g = softmax(W phi(x) + b) of each sample, phi(x) being its mean per channel: (N, K)."""
    return (x.mean @ gate_weight.to(x.mean.dtype).T + gate_bias.to(x.mean.dtype)).softmax(1)


def mode(modes: Moments, gates: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    """Normalize by every mode and mix the results by the gates; a mixture of affine maps is one affine map."""
    rstd = (modes.var + eps).rsqrt()  # (K, C)
    scale = gates @ rstd  # (N, C)
    center = gates @ (rstd * modes.mean) / scale
    return Affine(center, scale if weight is None else scale * weight, rstd.new_zeros(()) if bias is None else bias.to(rstd.dtype))


class ModeNorm(RunningMoments, ChannelNorm):
    r"""Find modes in the batch, and normalize each sample by the statistics of the modes it belongs to.

    Formula:
        g_n = softmax(gate_weight phi(x_n) + gate_bias), phi(x_n) the mean of each channel over the positions; N_k = sum_n g_nk;
        mu_k and var_k: mean and biased variance per channel over (N, *S), sample n counting g_nk times;
        y_n = sum_k g_nk (x_n - mu_k) / sqrt(var_k + eps) * weight + bias.
        Evaluation gates its input as training does, and puts running estimates in place of mu_k and var_k.

    Use it when: a batch mixes sources whose statistics differ (several domains, several tasks) and batch norm's single mean and variance
        blur them.
    Not when: inference must fold into a neighbouring layer (the gate depends on the input), or samples must not see each other.
    Known trouble: gates tend to collapse on one mode; ``running_share``, the running average of N_k / N, shows it. A rarely used mode has
        noisy running estimates; ``count_weighted`` lets a batch count for a mode by its share of it. The gate reads unnormalized
        means: where they are large, it saturates.

    Args:
        num_features: C.
        num_modes: K.
        eps: added to each variance inside the root.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,), shared by the modes.
        count_weighted: move a mode's estimates by momentum times N_k / N over its running average, instead of by momentum.
        process_group: pool the modes over this process group, or over all processes with "world".
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0, and a
        sample counts in its modes by its positions with data.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, one value per channel in training, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.ModeNorm(8, num_modes=3)
        >>> norm(torch.randn(4, 8, 5, 5)).shape, norm.running_mean.shape
        (torch.Size([4, 8, 5, 5]), torch.Size([3, 8]))

    Source: Deecke, Murray and Bilen 2018, Algorithm 1. As in the authors' code, evaluation divides by the spread about the running mean,
    which also holds the drift of the mean between batches: with m = momentum,
    running_var' = (1 - m) running_var + m var_k + m (1 - m) (mu_k - running_mean)^2, the same number as their E[x^2] - E[x]^2 without
    its cancellation. Their estimates start at 0, which multiplies by 1/sqrt(eps) in an untrained network; ours start at mean 0 and
    variance 1.
    """

    facts: ClassVar[Facts] = Facts(
        name="mode",
        title="Mode Normalization",
        paper=Paper(
            authors="Deecke, Murray and Bilen",
            title="Mode Normalization",
            year=2018,
            venue="ICLR 2019",
            arxiv="1810.05466",
            equation="Algorithm 1",
        ),
        family="learned",
        pools="NS",
        train_differs=True,
        synchronizes="sum of gates, mean and variance per mode and channel",
        batch_of_one="every mode is the sample itself: instance norm over its positions; refused when there is one position",
        one_position="normalizes over the samples",
        reads_writes="2R+1W",
    )

    process_group: Group
    kept_wide = ("running_mean", "running_var", "running_share")

    def __init__(
        self,
        num_features: int,
        num_modes: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        count_weighted: bool = False,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_count(self, num_modes=num_modes)
        check_momentum(self, momentum)
        self.num_modes, self.momentum, self.count_weighted, self.process_group = num_modes, momentum, count_weighted, process_group
        self.gate_weight = nn.Parameter(torch.empty(num_modes, num_features, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(num_modes, device=device, dtype=dtype))
        self.register_running((num_modes, num_features), device=device, dtype=dtype)
        self.running_share: Tensor
        self.register_state("running_share", (num_modes,), device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nearly equal gates, weight 1, bias 0; forget the running estimates."""
        super().reset_parameters()
        nn.init.normal_(self.gate_weight, 1 / self.num_modes, 0.01)
        bound = self.num_features**-0.5
        nn.init.uniform_(self.gate_bias, -bound, bound)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget: mean 0, variance 1, equal shares, no batches."""
        super().reset_running_stats()
        self.running_share.fill_(1 / self.num_modes)

    @torch.no_grad()
    def set_second_moments(self, mean: Tensor, mean_square: Tensor) -> None:
        """Take over running estimates kept as E[x] and E[x^2], as the authors' code does, each (K, C)."""
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = tuple(self.running_mean.shape)
        for name, given in (("mean", mean), ("mean_square", mean_square)):
            if given.shape != shape:
                raise ValueError(f"ModeNorm: {name} must have shape (K, C) = {shape}, got {tuple(given.shape)}")
        self.running_mean.copy_(mean)
        self.running_var.copy_((mean_square.double() - mean.double().square()).clamp(min=0))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        if self.learning and self.process_group is None and mask is None:
            check_batch(self, x)
        estimate = None if self.learning else self.estimate()

        def rule(
            m: Moments, gate_weight: Tensor, gate_bias: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> Affine | tuple[Affine, Moments]:
            gates = assign(m, gate_weight, gate_bias)
            if estimate is not None:
                return mode(Moments(estimate.mean[0], estimate.var[0], 1), gates, weight, bias, self.eps)
            modes = m.weighted_over_batch(gates, self.process_group)
            return mode(modes, gates, weight, bias, self.eps), modes

        y, seen = channel_norm(x, rule, self.gate_weight, self.gate_bias, self.weight, self.bias, mask=mask, impl=impl)
        if seen is not None and not recomputing():
            self._learn_modes(seen)
        return y

    @torch.no_grad()
    def _learn_modes(self, seen: Moments) -> None:
        """Move the estimates of every mode; :meth:`learn` goes a ``momentum`` of the way to what it is told."""
        assert isinstance(seen.count, Tensor)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        values = seen.count.sum(0, keepdim=True)  # the gates of a sample add up to 1
        step = self.momentum if self.momentum is not None else 1 / (self.num_batches_tracked + 1).to(seen.mean.dtype)
        before, share = self.running_share.to(seen.mean.dtype), (seen.count / values).squeeze(1)  # each (K,)
        after = before + step * (share - before)
        ratio = share / after if self.count_weighted else torch.ones_like(share)  # a mode's own step is step * ratio
        ratio = torch.where(seen.count > LEAST, ratio.unsqueeze(1), 0.0)  # a mode without a member learns nothing
        apart = seen.mean - self.running_mean
        mean = self.running_mean + ratio * apart
        var = self.running_var + ratio * (seen.var - self.running_var + (1 - step * ratio) * apart.square())
        self.learn(Moments(mean, var, values), unbiased=False)
        self.running_share.copy_(torch.where(after.isfinite().all(), after, before))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_modes={self.num_modes}, momentum={self.momentum}"
