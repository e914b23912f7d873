"""EvoNorm, batch series: norm and activation in one, with the variance of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_fraction
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.pointwise import Point, pointwise_norm, where_larger
from equinorm.core.running import RunningState, recomputing, some
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import small_dtype

if TYPE_CHECKING:
    from equinorm.core.sync import Group

Variant = Literal["B0", "B1", "B2"]


def other(m: Moments, v: Tensor | None, variant: Variant, eps: float) -> tuple[Tensor, Tensor]:
    """Slope and offset of what grows with the input: v x + s_i, (x + 1) q_i, or q_i - x."""
    if v is not None:
        return v.unsqueeze(0), (m.var + eps).sqrt()
    q = (m.var + m.mean.square() + eps).sqrt()
    return (q, q) if variant == "B1" else (-q.new_ones(1, 1), q)


def quotient_of(x: Tensor, s: Tensor, slope: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X over the larger of both, with weight and bias."""
    return x / torch.maximum(s, x * slope + offset) * weight + bias


def _pull(
    dy: Tensor, x: Tensor, s: Tensor, slope: Tensor, offset: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    rising = (x * slope).add_(offset)
    divisor = torch.maximum(s, rising)
    quotient = x / divisor
    dx = (dy * weight).div_(divisor)
    to_divisor = (dx * quotient).neg_()
    to_rising = where_larger(to_divisor, rising.sub_(s))
    dx.add_(to_rising * slope)
    return dx, (to_divisor.sub_(to_rising), to_rising * x, to_rising, quotient.mul_(dy), dy)


QUOTIENT = Point(quotient_of, _pull)


class EvoNormB(RunningState, ChannelNorm):
    r"""Divide by the larger of the batch's deviation and something that grows with the input: norm and activation in one.

    Formula:
        s_b = sqrt(var over (N, *S) + eps), s_i = sqrt(var over *S of one sample + eps), q_i likewise with the mean square instead of the
        variance, all per channel and biased;
        B0: y = x / max(s_b, v x + s_i) * weight + bias, v one learned number per channel;
        B1: y = x / max(s_b, (x + 1) q_i) * weight + bias;
        B2: y = x / max(s_b, q_i - x) * weight + bias.
        Evaluation puts a running estimate in place of the batch's variance. No mean is subtracted.

    Use it when: a convolutional network trains with large batches, in place of batch norm *and* the activation after it.
    Not when: batches are small (take ``EvoNormS``), an activation follows, or inference must fold into a neighbouring layer.
    Known trouble: ``apply_act=False`` is surprising: the published codes then leave out the norm too and apply only weight and bias.
        ``keep_norm`` divides by s_b instead. For large x, B0 levels off at 1 / v. B0 and B2 do not change under scaling of the input.

    Args:
        num_features: C.
        variant: "B0", "B1" or "B2".
        eps: added to each variance inside its root. timm's B0 uses 1e-3.
        momentum: weight of the new value in the running estimate.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        apply_act: False applies weight and bias alone, as the published codes do at places without activation.
        keep_norm: with ``apply_act=False``, divide by s_b.
        process_group: pool the batch's variance over this process group, or over all processes with "world".
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: unknown variant, ``keep_norm`` together with ``apply_act``, wrong number of channels, one value per channel in training,
            a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> x = torch.tensor([-1.0, 0.0, 1.0, 4.0]).reshape(1, 1, 4)
        >>> equinorm.EvoNormB(1, eps=0.0)(x).detach().flatten()
        tensor([-0.5345,  0.0000,  0.3483,  0.6813])

    Source: Liu et al. 2020, Table 2; B1 and B2 as in timm. The running estimate is of the biased variance, as in the authors' code; timm
    stores n / (n - 1) times it.
    """

    facts: ClassVar[Facts] = Facts(
        name="evonorm_b",
        title="EvoNorm, batch series",
        paper=Paper(
            authors="Liu et al.",
            title="Evolving Normalization-Activation Layers",
            year=2020,
            venue="NeurIPS",
            arxiv="2004.02967",
            equation="Table 2",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel",
        invariances=frozenset({"per-channel"}),
        batch_of_one="both deviations are the sample's; refused when there is one position",
        one_position="the deviation within the sample is 0",
        reads_writes="2R+1W",
    )

    kept_wide = ("running_var",)
    v: nn.Parameter | None
    running_var: Tensor | None
    process_group: Group

    def __init__(
        self,
        num_features: int,
        variant: Variant = "B0",
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        apply_act: bool = True,
        keep_norm: bool = False,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_fraction(self, momentum=momentum)
        if variant not in get_args(Variant):
            raise ValueError(f"EvoNormB: variant must be one of {', '.join(get_args(Variant))}, got {variant!r}; EvoNormS has the others")
        if keep_norm and apply_act:
            raise ValueError("EvoNormB: keep_norm says what apply_act=False leaves over; with apply_act=True the norm is always kept")
        self.variant: Variant = variant
        self.momentum, self.apply_act, self.keep_norm = momentum, apply_act, keep_norm
        self.process_group = process_group
        wanted = variant == "B0" and apply_act
        self.register_parameter("v", nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None)
        if apply_act or keep_norm:
            self.register_state("running_var", (num_features,), device=device, dtype=dtype)
        else:
            self.running_var = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, v 1; forget the running estimate."""
        super().reset_parameters()
        for ones in (self.v, self.running_var):
            if ones is not None:
                nn.init.ones_(ones)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        learning = self.learning and self.running_var is not None
        if learning and self.process_group is None and mask is None:
            check_batch(self, x)
        estimate = None if learning or self.running_var is None else self.running_var.to(small_dtype(x), copy=True).unsqueeze(0)
        if self.apply_act:

            def parts(
                m: Moments, weight: Tensor | None, bias: Tensor | None, v: Tensor | None
            ) -> tuple[tuple[Tensor, ...], Moments | None]:
                pooled = m.over_batch(self.process_group) if estimate is None else None
                var = estimate if pooled is None else pooled.var
                assert var is not None
                s = (var + self.eps).sqrt()
                slope, offset = other(m, v, self.variant, self.eps)
                one, zero = m.mean.new_ones(1, 1), m.mean.new_zeros(1, 1)
                return (s, slope, offset, one if weight is None else weight[None], zero if bias is None else bias[None]), pooled

            y, seen = pointwise_norm(x, parts, QUOTIENT, self.weight, self.bias, self.v, mask=mask, impl=impl)
        else:

            def rule(m: Moments | None, weight: Tensor | None, bias: Tensor | None) -> Affine | tuple[Affine, Moments]:
                pooled = None if m is None else m.over_batch(self.process_group)
                var = estimate if pooled is None else pooled.var
                zero = torch.zeros(1, 1, dtype=small_dtype(x), device=x.device)
                scale = zero + 1 if var is None else (var + self.eps).rsqrt()
                affine = Affine(zero, scale if weight is None else scale * weight, zero if bias is None else bias.to(zero.dtype))
                return affine if pooled is None else (affine, pooled)

            y, seen = channel_norm(x, rule, self.weight, self.bias, per="batch" if learning else None, mask=mask, impl=impl)
        if seen is not None:
            self._learn(seen)
        return y

    @torch.no_grad()
    def _learn(self, seen: Moments) -> None:
        assert self.running_var is not None
        if recomputing():
            return
        value = self.running_var + self.momentum * (seen.var - self.running_var)
        self.move("running_var", value, some(seen.count, value).reshape(()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, variant={self.variant!r}, momentum={self.momentum}, apply_act={self.apply_act}"
