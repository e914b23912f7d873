"""Mixture normalization: every position is normalized by the Gaussians of a mixture that are responsible for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equinorm.core import Moments
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_fraction
from equinorm.core.channel import canonical_mask
from equinorm.core.measure import measure
from equinorm.core.mixed import BLOCK, columns, from_columns, mixed_norm
from equinorm.core.running import RunningState, recomputing
from equinorm.core.sync import LEAST, agree, gather
from equinorm.facts import Facts, Paper
from equinorm.kernels import observed
from equinorm.kernels.reference import small_dtype, wide

if TYPE_CHECKING:
    from equinorm.core.sync import Group

FLOOR = 1e-3  # least variance of a component, as a share of the channel's: a component on a single point would be certain of it
FIT_POINTS = 4096  # the fit looks at this many points, evenly spaced; the posterior of all of them follows from it
COLLAPSED = 0.01  # a component whose running share is less than this part of an equal share is lost: the mixture is seeded anew


class Mixture(NamedTuple):
    """A mixture of K Gaussians with diagonal covariances in C dimensions."""

    share: Tensor  # (K,)
    mean: Tensor  # (K, C)
    var: Tensor  # (K, C)

    @classmethod
    def of(cls, pooled: Moments) -> Mixture:
        """The mixture of these moments (K, C), shares by their counts (K, 1)."""
        counts = torch.as_tensor(pooled.count).squeeze(1)
        return cls(counts / counts.sum().clamp(min=LEAST), pooled.mean, pooled.var)

    def moments(self) -> Moments:
        """Mean and variance of the whole, (1, C)."""
        mean = self.share @ self.mean
        return Moments(mean.unsqueeze(0), (self.share @ (self.var + (self.mean - mean).square())).unsqueeze(0), 1)

    def seen_in(self, frame: Moments) -> Mixture:
        """The mixture of the data after ``frame`` was taken to mean 0 and variance 1."""
        deviation = _deviation(frame)
        return Mixture(self.share, (self.mean - frame.mean) / deviation, self.var / deviation.square())


def _deviation(frame: Moments) -> Tensor:
    return torch.where(frame.var > 0, frame.var, 1.0).sqrt()


class Points(NamedTuple):
    """Points in C standardized coordinates, and their squares: (..., C, M). Both steps of the fit are products with them."""

    values: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor, frame: Moments) -> Points:
        """``x`` (..., C, M) in the coordinates of ``frame``; what is not finite lies at the origin."""
        values = (x - frame.mean.to(x.dtype).T).to(frame.mean.dtype).div_(_deviation(frame).T)
        if _blocking(x) or not values.sum().isfinite():
            values = torch.where(values.isfinite(), values, 0.0)
        return cls(values, values.square())


def _blocking(x: Tensor) -> bool:
    """Whether asking a tensor for its value would wait for a device, or cannot be asked at all."""
    return x.device.type != "cpu" or observed(x)


def posterior(points: Points, mixture: Mixture) -> Tensor:
    """The E step: how responsible each component is for each of the points: (..., K, M)."""
    # -1/2 sum_c (x_c - mu_c)^2 / var_c by two matrix products; points and mixture are standardized, so nothing cancels.
    var = mixture.var.clamp(min=FLOOR)  # (K, C)
    constant = mixture.share.log() - (mixture.mean.square() / var + var.log()).sum(1) / 2
    linear, quadratic = (part.expand(*points.values.shape[:-2], -1, -1) for part in (mixture.mean / var, -0.5 / var))
    return (linear @ points.values).add_(quadratic @ points.squares).add_(constant.unsqueeze(1)).softmax(-2)


def maximize(points: Points, responsible: Tensor, group: Group) -> Mixture:
    """The M step: weighted moments of M points under ``responsible`` (K, M), over all processes of ``group``."""
    counts = responsible.sum(1, keepdim=True)  # (K, 1)
    share = responsible / counts.clamp(min=LEAST)
    means = share @ points.values.T  # (K, C)
    # The points are standardized, so what cancels is rounding far below the least variance that the next E step takes.
    variances = (share @ points.squares.T - means.square()).clamp(min=0)
    return Mixture.of(gather(Moments(means, variances, counts), group))


def seed(points: Tensor, weights: Tensor, components: int, group: Group) -> Tensor:
    """Responsibilities (K, M) of k-means++ seeds among ``points`` (C, M).

    Each is drawn with probability proportional to the squared distance from those before.
    """
    seeds = points.new_zeros(components, points.shape[0])
    if points.shape[1]:
        chosen = [points.index_select(1, torch.multinomial(weights + LEAST, 1))]  # (C, 1)
        distance = (points - chosen[0]).square().sum(0)
        for _ in range(components - 1):
            chosen.append(points.index_select(1, torch.multinomial(weights * distance + LEAST, 1)))
            distance = torch.minimum(distance, (points - chosen[-1]).square().sum(0))
        seeds = torch.cat(chosen, 1).T
    seeds = agree(seeds, points.shape[1] > 0, group)
    distances = torch.stack([(points - s.unsqueeze(1)).square().sum(0) for s in seeds])
    return nn.functional.one_hot(distances.argmin(0), components).T.to(points.dtype)


class MixtureNorm(RunningState, ChannelNorm):
    r"""Fit a Gaussian mixture to the batch and normalize every position by the components it belongs to.

    Formula:
        x_i in R^C, i over (N, *S); p_ik: posterior of component k of a mixture with diagonal covariances, fitted by expectation
        maximization; share_k = mean_i p_ik; mu_k, var_k: mean and biased variance per channel, x_i counting p_ik times;
        y_i = sum_k p_ik / sqrt(share_k) (x_i - mu_k) / sqrt(var_k + eps) * weight + bias.
        Evaluation takes share_k, mu_k and var_k from running estimates, and the posteriors from them.

    Use it when: activations have several modes that batch norm's single mean and variance blur, and training time is no concern.
    Not when: inference must fold into a neighbouring layer, or the cost of the fit matters: a step of it looks at no more than 4096 points.
    Known trouble: with certain posteriors the output has variance K, not 1, since each component has variance 1 / share_k;
        ``fisher_scale=False`` leaves the root out. With more than some 50 channels posteriors are nearly always certain. The gradient
        takes posteriors as constants. The first batch, and a batch after a component was lost, draws random seeds.

    Args:
        num_features: C.
        num_components: K.
        em_steps: M and E steps per training batch; the first batch starts at k-means++ seeds, later ones at the running estimates.
        eps: added to each variance inside the root.
        momentum: weight of the new value in the running estimates.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        fisher_scale: divide by sqrt(share_k).
        process_group: pool the fit over this process group, or over all processes with "world".
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.
        responsibilities: (N, K) or (N, K, *S), not negative: the posteriors, in place of those of a fit (labels, for instance); rescaled to
        add up to 1 over K. Gradients flow through them.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, one value per channel in training, responsibilities or a mask of another shape, or settings
            out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.MixtureNorm(1, num_components=2, affine=False)
        >>> labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> norm(torch.tensor([[0.0], [2.0], [10.0], [14.0]]), responsibilities=labels).flatten()
        tensor([-1.4142,  1.4142, -1.4142,  1.4142])

    Source: Kalayeh and Shah 2019, section on mixture normalization; no code was published. Chosen here: assignment per position with
    vectors over the channels; the running estimates and the warm start; a least variance of 1e-3 of the channel's in the posteriors; a fit
    on at most 4096 evenly spaced points. With fewer values than components the norm is batch norm and learns nothing.
    """

    facts: ClassVar[Facts] = Facts(
        name="mixture",
        title="Mixture Normalization",
        paper=Paper(
            authors="Kalayeh and Shah",
            title="Training Faster by Separating Modes of Variation in Batch-normalized Models",
            year=2018,
            venue="TPAMI 2019",
            arxiv="1806.02892",
            equation="section on mixture normalization",
        ),
        family="learned",
        pools="NS",
        train_differs=True,
        synchronizes="shares, mean and variance per component and channel, once per step of the fit",
        batch_of_one="fits over the positions of the one sample; refused when there is one position",
        one_position="fits over the samples",
        reads_writes="5R+1W",
    )

    kept_wide = ("running_share", "running_mean", "running_var")
    running_share: Tensor
    running_mean: Tensor
    running_var: Tensor
    initialized: Tensor
    process_group: Group

    def __init__(
        self,
        num_features: int,
        num_components: int = 3,
        em_steps: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        fisher_scale: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_count(self, num_components=num_components, em_steps=em_steps)
        check_fraction(self, momentum=momentum)
        self.num_components, self.em_steps, self.momentum, self.fisher_scale = num_components, em_steps, momentum, fisher_scale
        self.process_group = process_group
        self.register_state("running_share", (num_components,), device=device, dtype=dtype)
        self.register_state("running_mean", (num_components, num_features), device=device, dtype=dtype)
        self.register_state("running_var", (num_components, num_features), device=device, dtype=dtype)
        self.register_buffer("initialized", torch.tensor(False, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; forget the running estimates: equal shares, mean 0, variance 1."""
        super().reset_parameters()
        self.running_share.fill_(1 / self.num_components)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.initialized.fill_(False)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, responsibilities: Tensor | None = None) -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        if self.learning and self.process_group is None and mask is None:
            check_batch(self, x)
        data = wide(x) if mask is None else torch.where(mask, wide(x), 0.0)
        if self.learning:
            *before, initialized = self.before_step(*self.kept_wide, "initialized")
        else:
            state = (self.running_share, self.running_mean, self.running_var)
            before, initialized = [b.to(small_dtype(data), copy=True) for b in state], self.initialized
        running, group = Mixture(*before), self.process_group if self.learning else None
        p = self._given(x, responsibilities) if responsibilities is not None else self._fitted(data, mask, running, initialized, group)
        p = p.to(data.dtype) if mask is None else torch.where(mask, p.to(data.dtype), 0.0)  # (N, K, *S)

        def rule(m: Moments | None, weight: Tensor | None, bias: Tensor | None) -> tuple[tuple[Tensor, Tensor, Tensor], Moments | None]:
            pooled = None if m is None else gather(m, group)
            mixture = running if pooled is None else Mixture.of(pooled)
            scale = (mixture.var + self.eps).rsqrt()  # (K, C)
            if self.fisher_scale:
                scale = scale * mixture.share.clamp(min=LEAST).rsqrt().unsqueeze(1)
            shift = scale.new_zeros(1, 1) if bias is None else bias.to(scale.dtype).unsqueeze(0)
            return (mixture.mean, scale if weight is None else scale * weight, shift), pooled

        y, seen = mixed_norm(data, p, rule, self.weight, self.bias, measured=self.learning)
        if seen is not None and not recomputing():
            self._learn(torch.as_tensor(seen.count).squeeze(1), Mixture.of(seen), running, initialized)
        return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)

    def _given(self, x: Tensor, responsibilities: Tensor) -> Tensor:
        expected = (x.shape[0], self.num_components, *x.shape[2:])
        if responsibilities.shape not in (expected, expected[:2]):
            raise ValueError(
                f"MixtureNorm: responsibilities must have shape (N, K) = {expected[:2]} or (N, K, *S) = {expected}, "
                f"got {tuple(responsibilities.shape)}"
            )
        p = wide(responsibilities).reshape(*responsibilities.shape, *[1] * (x.ndim - responsibilities.ndim)).expand(expected)
        return p / p.sum(1, keepdim=True).clamp(min=LEAST)

    @torch.no_grad()
    def _fitted(self, data: Tensor, mask: Tensor | None, running: Mixture, initialized: Tensor, group: Group) -> Tensor:
        """The posteriors (N, K, *S): those of the running mixture, and in training of one fitted from there."""
        shape = (data.shape[0], self.num_components, *data.shape[2:])
        frame = measure(data, per="batch", mask=mask).over_batch(group) if self.learning else running.moments()
        held = frame.mean.to(data.dtype)  # subtracted without rounding
        frame = Moments(held.to(frame.mean.dtype), frame.var, frame.count)
        mixture, data = running.seen_in(frame), columns(data)  # (N', C, S')
        if self.learning:
            n, _, length = data.shape
            every = max(-(-n * length // FIT_POINTS), 1)
            at = torch.arange(0, n * length, every, device=data.device)
            at = at // max(length, 1), slice(None), at % max(length, 1)
            sample = Points.of(data[at].T.contiguous(), frame)
            weights = sample.values.new_full(sample.values.shape[1:], every)
            if mask is not None:
                weights = weights * columns(mask).expand(n, 1, length)[at][:, 0]
            responsible, fresh = posterior(sample, mixture), ~initialized | self._collapsed(running)
            if _blocking(data) or fresh:
                responsible = torch.where(fresh, seed(sample.values, weights, self.num_components, group), responsible)
            for step in range(self.em_steps):
                mixture = maximize(sample, responsible * weights, group)
                if step < self.em_steps - 1:
                    responsible = posterior(sample, mixture)
        parts = data.split(max(BLOCK // max(data[:1].numel(), 1), 1))
        p = torch.cat([posterior(Points.of(part, frame), mixture).to(data.dtype) for part in parts])  # (N', K, S')
        if self.learning:  # fewer values than components: all in the first
            first = torch.zeros_like(p[:1, :, :1])
            first[:, 0] = 1
            few = frame.count < self.num_components
            if isinstance(few, Tensor):
                p = torch.where(few, first, p)
            elif few:
                p = first.expand(p.shape)
        return from_columns(p, shape)

    def _collapsed(self, running: Mixture) -> Tensor:
        return running.share.min() < COLLAPSED / self.num_components

    @torch.no_grad()
    def _learn(self, counts: Tensor, seen: Mixture, running: Mixture, initialized: Tensor) -> None:
        """Move the running mixture; the first batch, and the one after a component was lost, replace it."""
        enough = counts.sum() > self.num_components - 0.5  # a sum of posteriors, rounded
        sound = torch.stack([part.isfinite().all() for part in seen]).all() & enough
        step = torch.where(~initialized | self._collapsed(running), torch.ones_like(running.share[0]), self.momentum)
        members = sound & (counts > LEAST).unsqueeze(1)
        self.move("running_share", running.share + step * (seen.share - running.share), sound)
        self.move("running_mean", running.mean + step * (seen.mean - running.mean), members)
        self.move("running_var", running.var + step * (seen.var - running.var), members)
        self.initialized.logical_or_(sound)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}, em_steps={self.em_steps}, momentum={self.momentum}"
