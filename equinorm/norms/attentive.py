"""Attentive normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.running import RunningMoments
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.norms.attention import HEADS, Stage

if TYPE_CHECKING:
    from equinorm.core.sync import Group

ATTENTION_EPS = 1e-3  # beside the variance of what the head reads


def attentive(x: Moments, by: Moments, gamma: Tensor, beta: Tensor, attention: Tensor, eps: float) -> Affine:
    """Normalize by the moments ``by``, then scale and shift each sample by its own mixture of K rows of gamma and beta."""
    gamma, beta = (attention @ table.to(attention.dtype) for table in (gamma, beta))  # (N, K) @ (K, C)
    return normalize(by, gamma, beta, eps)


class AttentiveNorm(RunningMoments, ChannelNorm):
    r"""Batch or group norm whose weight and bias are a mixture of K pairs, weighed anew for each sample by attention to its own channels.

    Formula:
        y = (sum_k a_k gamma_k) * (x - mu) / sqrt(var + eps) + sum_k a_k beta_k, with mu, var of batch norm or group norm, tables
        gamma, beta (K, C), and a = head(m / sqrt(v + 1e-3)) in R^K from the mean m and the biased var v of each channel of the sample.

    Use it when: batch or group norm would be followed by squeeze-and-excitation; this does both at the price of the norm.
    Not when: inference must fold into the neighbouring layer (attention reads the sample in evaluation too).
    Known trouble: attention weights do not add up to 1. With the "hsigmoid" heads the scale is about K / 2 at first: harmless in front of
        another norm, not behind the last one of a residual branch; ``normalize_attention`` divides by their sum. The head's batch norm
        needs at least two samples in training.

    Args:
        num_features: C.
        num_mixtures: K; the authors take 10 in the first two stages of a network and 20 in the last two.
        norm: "batch" or "group".
        num_groups: G of group norm, must divide C; ignored by "batch".
        attention: the head: linear map, optional norm, activation. "norm_hsigmoid" (default), "norm_sigmoid", "norm_softmax", "hsigmoid",
            "sigmoid", and with a hidden layer of 2 K units "hidden_norm_hsigmoid" and "hidden_sigmoid". Its norm is batch norm over the
            samples with norm="batch", layer norm over the units with norm="group".
        normalize_attention: divide the attention weights by their sum.
        eps: added to the variance inside the root, in the head's norm too.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        track_running_stats: keep running estimates; without them evaluation uses the batch.
        process_group: pool the batch statistics over this process group, or over all processes with "world".
        device, dtype: of the parameters ``weight`` ~ N(1, 0.1) and ``bias`` ~ N(0, 0.1), both (K, C), and of the head's.

    Shape:
        x: (N, C, *S) with at least one spatial dimension, to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data
        is; the rest comes out as 0, and a sample without data does not count in the head's norm.

    Raises:
        TypeError: the input is not floating point.
        ValueError: unknown norm or head, G does not divide C, groups of one value, wrong number of channels, no spatial dimension, one
            sample in training with a batch norm in the head, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.AttentiveNorm(64, norm="group", attention="hsigmoid")(torch.randn(1, 64, 7, 7)).shape
        torch.Size([1, 64, 7, 7])

    Source: Li, Sun and Wu 2019. What the head reads, and its forms, are those of the authors' code: the paper speaks of pooled
    features, the code divides them by the deviation. That deviation is unbiased there, which fails on maps of one position; here it is
    biased. Their group form cannot be built with a norm in the head; here that norm is layer norm over the units.
    """

    facts: ClassVar[Facts] = Facts(
        name="attentive",
        title="Attentive Normalization",
        paper=Paper(
            authors="Li, Sun and Wu",
            title="Attentive Normalization",
            year=2019,
            venue="ECCV 2020",
            arxiv="1908.01259",
        ),
        family="learned",
        pools="NS+S",
        train_differs=True,
        synchronizes="count, mean and variance per channel, and per unit of an attention head with batch norm",
        batch_of_one="refused while the head holds a batch norm; without one it normalizes over the positions",
        one_position='works; norm="group" needs groups of more than one channel',
        reads_writes="2R+1W",
    )

    process_group: Group

    def __init__(
        self,
        num_features: int,
        num_mixtures: int = 10,
        norm: Literal["batch", "group"] = "batch",
        num_groups: int = 32,
        attention: str = "norm_hsigmoid",
        normalize_attention: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, False, device, dtype)
        check_count(self, num_mixtures=num_mixtures, num_groups=num_groups)
        check_momentum(self, momentum)
        if norm not in ("batch", "group"):
            raise ValueError(f'AttentiveNorm: norm must be "batch" or "group", got {norm!r}')
        if norm == "group" and num_features % num_groups:
            raise ValueError(f"AttentiveNorm: num_groups must divide num_features, got {num_groups} groups for {num_features} channels")
        if norm == "group" and process_group is not None:
            raise ValueError('AttentiveNorm: norm="group" pools nothing over samples, so process_group must be None')
        if attention not in HEADS:
            raise ValueError(f"AttentiveNorm: attention must be one of {', '.join(HEADS)}; got {attention!r}")
        self.num_mixtures, self.norm, self.num_groups, self.momentum = num_mixtures, norm, num_groups, momentum
        self.attention, self.normalize_attention, self.process_group, self.affine = attention, normalize_attention, process_group, True
        self.weight = nn.Parameter(torch.empty(num_mixtures, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_mixtures, num_features, device=device, dtype=dtype))
        activations, normed = HEADS[attention]
        kind = None if not normed else "batch" if norm == "batch" else "layer"
        widths = [num_features, *[2 * num_mixtures] * (len(activations) - 1), num_mixtures]
        self.head = nn.ModuleList(
            Stage(i, o, activation, kind, eps, momentum, track_running_stats, device, dtype)
            for i, o, activation in zip(widths[:-1], widths[1:], activations, strict=True)
        )
        self.register_running((num_features,), track=norm == "batch" and track_running_stats, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, *, num_groups: int = 32, **options: Any) -> Self:
        """Attentive norm; groups, where it has them, are ``num_groups`` or the largest smaller number that divides ``channels``."""
        groups = next(g for g in range(min(num_groups, channels), 0, -1) if channels % g == 0)
        return cls(channels, num_groups=groups, **options)

    def reset_parameters(self) -> None:
        """Weights ~ N(1, 0.1), biases ~ N(0, 0.1), the head as linear layers and norms; forget the running estimates."""
        assert self.weight is not None
        assert self.bias is not None
        nn.init.normal_(self.weight, 1.0, 0.1)
        nn.init.normal_(self.bias, 0.0, 0.1)
        for stage in self.head:
            assert isinstance(stage, Stage)
            stage.reset_parameters()
        self.reset_running_stats()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features, spatial=1)
        mask = None if mask is None else canonical_mask(x, mask)
        self._check_size(x, mask)
        tracked = self.running_mean is not None and not self.learning
        estimate = self.estimate() if tracked else None
        stages = [stage for stage in self.head if isinstance(stage, Stage)]
        estimates = [stage.estimate() if tracked and stage.norm == "batch" else None for stage in stages]
        group = self.process_group if self.training else None

        def rule(m: Moments, gamma: Tensor, beta: Tensor, *head: Any) -> Affine | tuple[Affine, Moments]:
            z = m.mean * (m.var + ATTENTION_EPS).rsqrt()  # (N, C)
            samples = (m.count > 0).to(z.dtype) if isinstance(m.count, Tensor) else 1
            of_head = []
            for k, stage in enumerate(stages):
                z, seen = stage.run(z, head[4 * k : 4 * k + 4], estimates[k], samples, group)
                of_head.append(seen)
            if self.normalize_attention:
                z = z / z.sum(1, keepdim=True).clamp(min=1e-12)
            if self.norm == "group":
                return attentive(m, m.over_groups(self.num_groups), gamma, beta, z, self.eps)
            if estimate is not None:
                return attentive(m, estimate, gamma, beta, z, self.eps)
            pooled = m.over_batch(group)
            return attentive(m, pooled, gamma, beta, z, self.eps), _joined([pooled, *(seen for seen in of_head if seen is not None)])

        tensors = [t for stage in stages for t in stage.tensors()]
        y, seen = channel_norm(x, rule, self.weight, self.bias, *tensors, mask=mask, impl=impl)
        if self.learning and self.running_mean is not None and seen is not None:
            learners = [(part, part.running_mean.numel()) for part in (self, *stages) if part.running_mean is not None]
            widths = [width for _, width in learners]
            for (part, _), mean, var in zip(learners, seen.mean.split(widths, 1), seen.var.split(widths, 1), strict=True):
                part.learn(Moments(mean, var, seen.count), unbiased=False)
        return y

    def _check_size(self, x: Tensor, mask: Tensor | None) -> None:
        if self.norm == "group" and x.shape[1:].numel() == self.num_groups:
            raise ValueError(
                f"AttentiveNorm: a group needs more than one value to have a variance, got shape {tuple(x.shape)} "
                f"in {self.num_groups} groups; use fewer groups"
            )
        if self.norm == "batch" and self.training and self.process_group is None:
            if HEADS[self.attention][1] and x.shape[0] == 1 and not self.frozen:
                raise ValueError(
                    f"AttentiveNorm: the head's batch norm needs more than one sample in training, got shape {tuple(x.shape)}; use "
                    'a larger batch, eval(), attention="hsigmoid" or norm="group"'
                )
            if mask is None:
                check_batch(self, x)

    def extra_repr(self) -> str:
        options = f"{self.num_features}, num_mixtures={self.num_mixtures}, norm={self.norm!r}, attention={self.attention!r}, eps={self.eps}"
        return options + (f", num_groups={self.num_groups}" if self.norm == "group" else f", momentum={self.momentum}")


def _joined(sets: list[Moments]) -> Moments:
    """What the estimates learn from, side by side: of the channels, then of the head's units; each variance already times n / (n - 1)."""
    means, variances = [m.mean for m in sets], [m.var * _bessel(m.count) for m in sets]
    return Moments(torch.cat(means, 1), torch.cat(variances, 1), sets[0].count)


def _bessel(count: int | Tensor) -> float | Tensor:
    return count / (count - 1).clamp(min=1) if isinstance(count, Tensor) else count / max(count - 1, 1)
