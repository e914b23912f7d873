"""Switchable normalization."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_channels, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.following import following, set_activation, shown_activation
from equinorm.core.running import RunningMoments
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl

if TYPE_CHECKING:
    from equinorm.core.sync import Group

CANDIDATES = ("instance", "layer", "batch")


def switch(
    candidates: list[Moments], mean_weight: Tensor, var_weight: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """Normalize by a learned mixture of the candidates' means, and an independent mixture of their variances."""
    p = mean_weight.to(candidates[0].mean.dtype).softmax(0)
    q = var_weight.to(candidates[0].mean.dtype).softmax(0)
    mean = reduce(torch.add, (p_k * x.mean for p_k, x in zip(p, candidates, strict=True)))  # (N, C)
    var = reduce(torch.add, (q_k * x.var for q_k, x in zip(q, candidates, strict=True)))
    return normalize(Moments(mean, var, candidates[0].count), weight, bias, eps)


class SwitchNorm(RunningMoments, ChannelNorm):
    r"""Let each layer learn its own mixture of instance, layer and batch statistics.

    Formula:
        y = (x - mu) / sqrt(var + eps) * weight + bias, mu = sum_k p_k mu_k, var = sum_k q_k var_k over k in {instance, layer, batch};
        p = softmax(mean_weight), q = softmax(var_weight): six numbers per layer, shared by all channels.

    Use it when: it is unclear which norm suits a network, or different depths want different ones; the learned p, q then tell which.
    Not when: samples must not see each other (leave out "batch"), or inference must fold into a neighbouring layer.
    Known trouble: do not decay ``mean_weight`` and ``var_weight``. At batch size 1 the batch part equals the instance part.

    Args:
        num_features: C.
        eps: added to the mixed variance inside the root.
        momentum: weight of the new value in the batch part's running estimates; None for the plain average over all batches.
        affine: learn ``weight`` and ``bias``, both (C,).
        using: the candidates, a subset of ("instance", "layer", "batch") in the order of the logits.
        last_gamma: start ``weight`` at 0, for the last norm of a residual branch.
        track_running_stats: keep running estimates for the batch part; without them evaluation uses the batch.
        process_group: pool the batch part over this process group, or over all processes with "world".
        device, dtype: of the parameters.
        activation: name of a function of ``torch.nn.functional`` that follows the norm ("relu", "silu", "leaky_relu" ...), or None. What is
            between the two is never stored, and backward computes it anew.
        activation_param: slope of leaky_relu, alpha of elu and celu.

    Shape:
        x: (N, C, *S) to the same shape and dtype. Without spatial dimensions the instance part has nothing to average and is left out of
        the mixture. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: unknown or repeated candidates, only "instance" without positions, wrong number of channels, a mask of another shape.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.SwitchNorm(8)
        >>> norm(torch.randn(4, 8, 5, 5)).shape, norm.mixture()["mean"]["batch"]
        (torch.Size([4, 8, 5, 5]), 0.333...)

    Source: Luo et al. 2018, Eq. 3 to 5. The authors' code mixes unbiased variances, which is not what the pooled formulas of the paper
    give, and starts the running variance at 0; here every variance is biased (the stored one too: it is what enters the mixture) and
    starts at 1. Their ``momentum`` is 1 - ours. Their checkpoints load.
    """

    facts: ClassVar[Facts] = Facts(
        name="switch",
        title="Switchable Normalization",
        paper=Paper(
            authors="Luo et al.",
            title="Differentiable Learning-to-Normalize via Switchable Normalization",
            year=2018,
            venue="ICLR 2019",
            arxiv="1806.10779",
            equation="Eq. 3",
        ),
        family="learned",
        pools="S+CS+NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel of the batch part",
        invariances=frozenset({"shift", "scale"}),
        batch_of_one="the batch part equals the instance part",
        one_position="the instance part has variance 0; without spatial dimensions it is left out",
        reads_writes="2R+1W",
    )

    process_group: Group

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        using: tuple[str, ...] = CANDIDATES,
        last_gamma: bool = False,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_momentum(self, momentum)
        using = tuple(using)
        if not using or len(set(using)) != len(using) or not set(using) <= set(CANDIDATES):
            raise ValueError(f"SwitchNorm: using must name different candidates out of {CANDIDATES}, got {using}")
        self.momentum, self.using, self.last_gamma, self.process_group = momentum, using, last_gamma, process_group
        self.mean_weight = nn.Parameter(torch.empty(len(using), device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.empty(len(using), device=device, dtype=dtype))
        self.register_running((num_features,), track=track_running_stats and "batch" in using, device=device, dtype=dtype)
        set_activation(self, activation, activation_param)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal shares, weight 1 (0 with ``last_gamma``), bias 0; forget the running estimates."""
        super().reset_parameters()
        if self.last_gamma and self.weight is not None:
            nn.init.zeros_(self.weight)
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)
        self.reset_running_stats()

    def mixture(self) -> dict[str, dict[str, float]]:
        """The learned shares of each candidate in the mean and in the variance."""
        return {
            name: dict(zip(self.using, logits.detach().double().softmax(0).tolist(), strict=True))
            for name, logits in (("mean", self.mean_weight), ("var", self.var_weight))
        }

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        # Without positions an instance has nothing to average: it leaves the mixture.
        active = [k for k, name in enumerate(self.using) if x.ndim > 2 or name != "instance"]
        if not active:
            raise ValueError(
                f'SwitchNorm: using=("instance",) needs an input with positions, (N, {self.num_features}, *S), got {tuple(x.shape)}'
            )
        estimate = None if self.learning or self.running_mean is None else self.estimate()

        def rule(m: Moments, mean_weight: Tensor, var_weight: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Affine, Moments]:
            pooled = m.over_batch(self.process_group if self.training else None) if estimate is None and "batch" in self.using else m
            known = {"instance": m, "layer": m.over_channels(), "batch": estimate or pooled}
            candidates = [known[self.using[k]] for k in active]
            if len(active) < len(self.using):
                mean_weight, var_weight = mean_weight[active], var_weight[active]
            return switch(candidates, mean_weight, var_weight, weight, bias, self.eps), pooled

        y, seen = channel_norm(
            x, rule, self.mean_weight, self.var_weight, self.weight, self.bias, mask=mask, impl=impl, then=following(self)
        )
        if self.learning and seen is not None:
            self.learn(seen, unbiased=False)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, using={self.using}{shown_activation(self)}"
