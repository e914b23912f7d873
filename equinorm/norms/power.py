"""Power normalization: a running quadratic mean in both directions, made for transformers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_count, check_floating, check_fraction
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.controlled import controlled_norm
from equinorm.core.measure import measure
from equinorm.core.position import position_norm
from equinorm.core.running import RunningState, recomputing, some
from equinorm.core.sync import gather
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import small_dtype, wide

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def group_scaling(x: Tensor, groups: int, eps: float) -> Tensor:
    """Divide every position of (N, C, *S) by the root mean square over the channels of each group."""
    grouped = x.unflatten(1, (groups, -1))
    return (grouped * (grouped.square().mean(2, keepdim=True) + eps).rsqrt()).flatten(1, 2)


def power(m: Moments) -> Moments:
    """The moments that a quadratic norm divides by: no mean, and the mean square in place of the variance."""
    return Moments(torch.zeros_like(m.mean), m.var + m.mean.square(), m.count)


class PowerNorm(RunningState, ChannelNorm):
    r"""Divide each channel by a running quadratic mean, and correct the gradient by a running estimate too.

    Formula:
        phi_B = mean of x^2 of a channel over all tokens, a = alpha_fwd, b = alpha_bkw;
        PN-V: y = x / sqrt(phi_B + eps) * weight + bias, with its true derivative;
        PN: xh = x / psi, psi = sqrt(phi + eps), phi the running value before this batch; y = weight xh + bias;
        phi' = a phi + (1 - a) phi_B;
        backward, g the gradient to xh: dx = (g - nu xh) / psi;  nu' = nu (1 - (1 - b) mean(xh^2)) + (1 - b) mean(g xh).
        In the first ``warmup_iters`` steps psi comes from the batch, and phi is the plain average so far. Evaluation uses phi.
        Before all this, group scaling divides every token by the root mean square of its channels, in ``num_groups`` groups.

    Use it when: a transformer is trained from scratch, in place of layer norm, and tokens abound.
    Not when: batches hold few tokens, or anything needs the true derivative: second derivatives, ``torch.func``, gradient checks. The
        backward pass of "PN" is not the derivative of its forward pass, by design.
    Known trouble: training moves state in forward (phi) and in backward (nu, kept as ``ema_gz`` = nu / (1 - b)). nu runs away when
        (1 - b) mean(xh^2) > 2 for long; a larger ``alpha_bkw`` helps. The end of the warm-up is a jump. Under DistributedDataParallel
        pass ``process_group`` or ``broadcast_buffers=False``. ``retain_graph`` with two backward passes moves nu twice. Activation
        checkpointing repeats a forward with the state of its first run, if the module runs once in it.

    Args:
        num_features: C.
        eps: added to each quadratic mean inside its root.
        alpha_fwd: weight of the old value in phi.
        alpha_bkw: weight of the old value in nu; 1 turns the correction off.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        warmup_iters: steps that normalize by the batch.
        num_groups: groups of channels of the group scaling; None leaves it out, as the paper's formulas do.
        variant: "PN", or "PN-V" for the batch form.
        channel_dim: where the channels are: -1 for (..., C), 1 for (N, C, *S). The catalogue's ``create`` builds it with 1, like every
            other norm.
        process_group: pool the means of both directions over this process group, or over all processes with "world".
        device, dtype: of the parameters. The state is float32, or float64 in a float64 module.

    Shape:
        x: (T, B, C), (B, C) or any (..., C), or as ``channel_dim`` says, to the same shape and dtype. mask: boolean over the tokens, (T, B)
        or with a channel dimension of size 1, True where data is; the rest enters nothing and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: groups that do not divide C, unknown variant, wrong number of channels, a mask of another shape, or settings out of
            range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.PowerNorm(1, eps=0.0, affine=False, num_groups=None, warmup_iters=0)
        >>> _ = norm.running_phi.fill_(4.0)
        >>> norm(torch.tensor([[1.0], [2.0], [2.0]])).flatten()
        tensor([0.5000, 1.0000, 1.0000])

    Source: Shen et al. 2020, Algorithms 1 and 2. The authors' code deviates, and is not followed, in these: its backward divides by the
    batch's psi even where the forward took the running one; the warm-up updates phi twice per step; the padding mask is missing in the
    statistics of the backward pass. Its group scaling, which the paper does not mention, is followed. Its checkpoints load.
    """

    facts: ClassVar[Facts] = Facts(
        name="power",
        title="Power Normalization",
        paper=Paper(
            authors="Shen et al.",
            title="PowerNorm: Rethinking Batch Normalization in Transformers",
            year=2020,
            venue="ICML",
            arxiv="2003.07845",
            equation="Algorithms 1 and 2",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="quadratic mean per channel forward, one mean per channel backward",
        batch_of_one="works: its tokens are the batch",
        one_position="works",
        reads_writes="2R+1W, with group scaling 4R+2W",
    )

    kept_wide = ("running_phi", "ema_gz")
    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor
    process_group: Group

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        affine: bool = True,
        warmup_iters: int = 10000,
        num_groups: int | None = 1,
        variant: Literal["PN", "PN-V"] = "PN",
        channel_dim: Literal[-1, 1] = -1,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_fraction(self, alpha_fwd=alpha_fwd, alpha_bkw=alpha_bkw)
        if num_groups is not None:
            check_count(self, num_groups=num_groups)
            if num_features % num_groups:
                raise ValueError(f"PowerNorm: num_groups must divide num_features, got {num_groups} groups for {num_features} channels")
        if isinstance(warmup_iters, bool) or not isinstance(warmup_iters, int) or warmup_iters < 0:
            raise ValueError(f"PowerNorm: warmup_iters must be an integer of at least 0, got {warmup_iters!r}")
        if variant not in ("PN", "PN-V"):
            raise ValueError(f'PowerNorm: variant must be "PN" or "PN-V", got {variant!r}')
        if channel_dim not in (1, -1):
            raise ValueError(f"PowerNorm: channel_dim must be 1 for (N, C, *spatial) or -1 for (..., C), got {channel_dim}")
        self.alpha_fwd, self.alpha_bkw, self.warmup_iters, self.num_groups = alpha_fwd, alpha_bkw, warmup_iters, num_groups
        self.variant, self.channel_dim, self.process_group = variant, channel_dim, process_group
        for name in self.kept_wide:
            self.register_state(name, (num_features,), device=device, dtype=dtype)
        self.register_buffer("iters", torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, *, channel_dim: Literal[-1, 1] = 1, **options: Any) -> Self:
        """The norm for (N, C, *S), or with the channels where ``channel_dim`` says."""
        return cls(channels, channel_dim=channel_dim, **options)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; phi 1, nothing to correct, no steps."""
        super().reset_parameters()
        nn.init.ones_(self.running_phi)
        nn.init.zeros_(self.ema_gz)
        self.iters.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_floating(self, x)
        dim, channels = self.channel_dim, self.num_features
        if x.ndim < 2 or x.shape[dim] != channels:
            forms = {1: f"(N, {channels}, *spatial)", -1: f"(*, {channels})"}
            raise ValueError(
                f"PowerNorm: the input must have shape {forms[dim]}, got {tuple(x.shape)}; for {forms[-dim]} construct it with "
                f"channel_dim={-dim}"
            )
        data = x.movedim(dim, 1)
        if mask is not None:
            mask = canonical_mask(data, mask.movedim(dim, 1) if mask.ndim == x.ndim else mask)
        if self.num_groups is not None:  # two divisions, one rounding
            data = wide(data) if mask is None else torch.where(mask, wide(data), 0.0)
            groups, eps = self.num_groups, self.eps
            data = position_norm(data, lambda x: group_scaling(x, groups, eps), groups, eps, centered=False, impl=impl)
        if not self.learning:
            phi = self.running_phi.to(small_dtype(x), copy=True).unsqueeze(0)
            estimate = Moments(torch.zeros_like(phi), phi, 1)
            y, _ = channel_norm(
                data, lambda _, w, b: normalize(estimate, w, b, self.eps), self.weight, self.bias, per=None, mask=mask, impl=impl
            )
        elif self.variant == "PN-V":
            y = self._by_batch(data, mask, impl)
        else:
            y = self._by_past(data, mask, impl)
        return y.movedim(1, dim).to(x.dtype)

    def _by_batch(self, x: Tensor, mask: Tensor | None, impl: Impl) -> Tensor:
        def rule(m: Moments, weight: Tensor | None, bias: Tensor | None) -> tuple[Affine, Moments]:
            pooled = power(m.over_batch(self.process_group))
            return normalize(pooled, weight, bias, self.eps), pooled

        phi, iters = self.before_step("running_phi", "iters")
        y, seen = channel_norm(x, rule, self.weight, self.bias, per="batch", mask=mask, impl=impl)
        if seen is not None:
            self._learn(seen, phi, iters)
        return y

    def _by_past(self, x: Tensor, mask: Tensor | None, impl: Impl) -> Tensor:
        with torch.no_grad():
            phi, iters = self.before_step("running_phi", "iters")
            seen = power(measure(x.detach(), per="batch", mask=mask, impl=impl).over_batch(self.process_group))
            scale = (torch.where(iters < self.warmup_iters, seen.var, phi) + self.eps).rsqrt()  # (1, C)
            self._learn(seen, phi, iters)
        control = partial(self._control, seen.var * scale.square())
        return controlled_norm(x, torch.zeros_like(scale), scale, self.weight, self.bias, control, per="batch", mask=mask, impl=impl)

    @torch.no_grad()
    def _learn(self, seen: Moments, phi: Tensor, iters: Tensor) -> None:
        if recomputing():
            return
        counted = some(seen.count, phi).reshape(())
        step = torch.where(iters < self.warmup_iters, 1 / (iters + 1).to(phi.dtype), 1 - self.alpha_fwd)
        self.move("running_phi", phi + step * (seen.var - phi), counted)
        self.iters.add_(counted)

    @torch.no_grad()
    def _control(self, mean_square: Tensor, mean_g: Tensor, mean_gy: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        pooled = gather(Moments(mean_gy, torch.zeros_like(mean_gy), count), self.process_group).mean
        ema = self.ema_gz.to(pooled.dtype, copy=True)
        nu = (1 - self.alpha_bkw) * ema
        self.move("ema_gz", ema + pooled - nu * mean_square)
        return -nu.unsqueeze(0), torch.zeros_like(mean_g)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, warmup_iters={self.warmup_iters}, "
            f"num_groups={self.num_groups}, variant={self.variant!r}, channel_dim={self.channel_dim}"
        )
