"""Sparse switchable normalization."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.running import RunningMoments, recomputing
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import small_dtype
from equinorm.norms.sparsestmax import TIE, sparsemax, sparsestmax

if TYPE_CHECKING:
    from equinorm.core.sync import Group

CANDIDATES = ("instance", "layer", "batch")


def sparse_switch(
    candidates: list[Moments], mean_share: Tensor, var_share: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """Normalize by a sparse mixture of the candidates' means, and an independent one of their variances."""
    mean = reduce(torch.add, (share * x.mean for share, x in zip(mean_share, candidates, strict=True)))  # (N, C)
    var = reduce(torch.add, (share * x.var for share, x in zip(var_share, candidates, strict=True)))
    return normalize(Moments(mean, var, candidates[0].count), weight, bias, eps)


class SparseSwitchNorm(RunningMoments, ChannelNorm):
    r"""Let each layer learn which one of instance, layer and batch statistics it uses.

    Formula:
        y = (x - mu) / sqrt(var + eps) * weight + bias, mu = sum_k p_k mu_k, var = sum_k q_k var_k over k in {instance, layer, batch};
        p = sparsestmax(mean_weight, r), q = sparsestmax(var_weight, r): as the radius r grows from 0 during training, shares reach 0 one
        after another, until one candidate is left. That choice is then kept for good.

    Use it when: it is unclear which norm suits a network, and inference shall cost what one norm costs (:func:`ssn_to_fixed`).
    Not when: samples must not see each other (leave out "batch").
    Known trouble: without a scheduler the radius stays 0 and nothing is selected beyond what sparsemax drops. Mean and variance choose
        independently. Once two candidates are left, only the radius decides between them. The authors train the logits ``mean_weight``
        and ``var_weight`` with a tenth of the learning rate, without weight decay, their gradient clipped to norm 1.

    Args:
        num_features: C.
        eps: added to the mixed variance inside the root.
        momentum: weight of the new value in the batch part's running estimates; None for the plain average over all batches.
        affine: learn ``weight`` and ``bias``, both (C,).
        using: the candidates, two or three of ("instance", "layer", "batch"), in the order of the logits.
        transform: "sparsestmax", or "sparsemax" to leave the radius out.
        center: of sparsestmax, see :func:`~equinorm.sparsestmax`.
        last_gamma: start ``weight`` at 0, for the last norm of a residual branch.
        track_running_stats: keep running estimates for the batch part; without them evaluation uses the batch.
        process_group: pool the batch part over this process group, or over all processes with "world".
        device, dtype: of the parameters. The buffer ``radius`` is float32 at least; ``mean_choice`` and ``var_choice`` are int64, -1 while
            open.

    Shape:
        x: (N, C, *S) to the same shape and dtype; (N, C) with using=("layer", "batch"). mask: boolean (N, *S) or (N, 1, *S), True where
        data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: unknown or repeated candidates or fewer than two, an unknown transform or centre, wrong number of channels, no positions
            for the instance part, one value per channel in training once only the batch is left, a mask of another shape.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.SparseSwitchNorm(8)
        >>> schedule = equinorm.SparsestMaxScheduler(norm, total_steps=4)
        >>> for _ in range(5):
        ...     y = norm(torch.randn(4, 8, 5, 5))
        ...     schedule.step()
        >>> equinorm.ssn_to_fixed(norm).choices()
        {'mean': 'instance', 'var': 'instance'}

    Source: Shao et al. 2019. The authors' code differs in the centre of sparsestmax, in what it does at ties, and in mixing unbiased
    variances; its momentum is 1 - ours, and its radius grows to 1 although the choice has fallen at 0.82. Its checkpoints load.
    """

    facts: ClassVar[Facts] = Facts(
        name="sparse_switch",
        title="Sparse Switchable Normalization",
        paper=Paper(
            authors="Shao et al.",
            title="SSN: Learning Sparse Switchable Normalization via SparsestMax",
            year=2019,
            venue="CVPR",
            arxiv="1903.03793",
        ),
        family="learned",
        pools="S+CS+NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel of the batch part",
        invariances=frozenset({"shift", "scale"}),
        batch_of_one="the batch part equals the instance part",
        one_position="the instance part has variance 0; without spatial dimensions it must be left out",
        reads_writes="2R+1W",
    )

    process_group: Group
    center: Literal["simplex", "support"]
    radius: Tensor
    mean_choice: Tensor
    var_choice: Tensor
    fixed: tuple[str, str] | None = None  # the candidates of mean and variance, once fix() has read the choice
    kept_wide = ("running_mean", "running_var", "radius")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.003,
        affine: bool = True,
        using: tuple[str, ...] = CANDIDATES,
        transform: Literal["sparsestmax", "sparsemax"] = "sparsestmax",
        center: Literal["simplex", "support"] = "simplex",
        last_gamma: bool = False,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_momentum(self, momentum)
        using = tuple(using)
        if len(using) < 2 or len(set(using)) != len(using) or not set(using) <= set(CANDIDATES):
            raise ValueError(f"SparseSwitchNorm: using must name two or three different candidates out of {CANDIDATES}, got {using}")
        if transform not in ("sparsestmax", "sparsemax"):
            raise ValueError(f'SparseSwitchNorm: transform must be "sparsestmax" or "sparsemax", got {transform!r}')
        if center not in ("simplex", "support"):
            raise ValueError(f'SparseSwitchNorm: center must be "simplex" or "support", got {center!r}')
        self.momentum, self.using, self.transform, self.center = momentum, using, transform, center
        self.last_gamma, self.process_group = last_gamma, process_group
        self.mean_weight = nn.Parameter(torch.empty(len(using), device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.empty(len(using), device=device, dtype=dtype))
        self.register_running((num_features,), track=track_running_stats and "batch" in using, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("radius", torch.zeros((), device=device, dtype=wide))
        for name in ("mean_choice", "var_choice"):
            self.register_buffer(name, torch.tensor(-1, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal logits, radius 0, no choice, weight 1 (0 with ``last_gamma``), bias 0; forget the running estimates."""
        super().reset_parameters()
        if self.last_gamma and self.weight is not None:
            nn.init.zeros_(self.weight)
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)
        self.radius.zero_()
        self.mean_choice.fill_(-1)
        self.var_choice.fill_(-1)
        self.fixed = None
        self.reset_running_stats()

    @property
    def circumradius(self) -> float:
        """The radius from which on one candidate is left: sqrt((K - 1) / K)."""
        return (1 - 1 / len(self.using)) ** 0.5

    def set_radius(self, radius: float) -> None:
        """Set the radius of sparsestmax: 0 for sparsemax; from :attr:`circumradius` on, one candidate is left.

        Raises:
            ValueError: a negative radius.
        """
        if not radius >= 0:
            raise ValueError(f"SparseSwitchNorm: the radius must be at least 0, got {radius}")
        self.radius.fill_(radius)

    def choices(self) -> dict[str, str | None]:
        """What mean and variance have settled on: a candidate's name, or None while open."""
        return {
            kind: self.using[k] if (k := int(choice)) >= 0 else None
            for kind, choice in (("mean", self.mean_choice), ("var", self.var_choice))
        }

    def mixture(self) -> dict[str, dict[str, float]]:
        """The shares of each candidate in the mean and in the variance."""
        shares = self._shares().tolist()
        return {kind: dict(zip(self.using, share, strict=True)) for kind, share in zip(("mean", "var"), shares, strict=True)}

    def fix(self) -> None:
        """Compute from now on only the statistics that were chosen.

        Raises:
            ValueError: mean or variance is still open.
        """
        mean, var = self.choices().values()
        if mean is None or var is None:
            raise ValueError(
                f"SparseSwitchNorm: mean and variance must have settled on one candidate each, got {self.choices()}; train on with a "
                f"radius of {self.circumradius:.4f} or more"
            )
        self.fixed = mean, var

    def _shares(self) -> Tensor:
        """The shares of the candidates, (2, K): in the mean and in the variance."""
        z = torch.stack((self.mean_weight, self.var_weight)).to(small_dtype(self.mean_weight))
        shares = sparsemax(z) if self.transform == "sparsemax" else sparsestmax(z, self.radius.clone(), center=self.center)
        choice = torch.stack((self.mean_choice, self.var_choice)).unsqueeze(1)  # (2, 1)
        return torch.where(choice >= 0, (torch.arange(len(self.using), device=z.device) == choice).to(z.dtype), shares)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        needed = set(self.fixed or self.using)
        if x.ndim == 2 and "instance" in needed:
            raise ValueError(
                f"SparseSwitchNorm: the instance part needs an input with positions, (N, {self.num_features}, *S), got {tuple(x.shape)}; "
                'give using=("layer", "batch") for features without positions'
            )
        mask = None if mask is None else canonical_mask(x, mask)
        estimate = self.estimate() if "batch" in needed and self.running_mean is not None and not self.learning else None
        measures_batch = "batch" in needed and estimate is None
        if needed == {"batch"} and measures_batch and self.training and self.process_group is None and mask is None:
            check_batch(self, x)
        group = self.process_group if self.training else None

        def rule(
            m: Moments, mean_share: Tensor | None, var_share: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> Affine | tuple[Affine, Moments]:
            pooled = m.over_batch(group) if measures_batch else m
            known = {"instance": m, "layer": m.over_channels() if "layer" in needed else m, "batch": estimate or pooled}
            if mean_share is None or var_share is None:
                assert self.fixed is not None
                mean, var = (known[name] for name in self.fixed)
                affine = normalize(Moments(mean.mean, var.var, 1), weight, bias, self.eps)
            else:
                affine = sparse_switch([known[name] for name in self.using], mean_share, var_share, weight, bias, self.eps)
            return (affine, pooled) if measures_batch else affine

        shares = self._shares() if self.fixed is None else None
        per = "sample" if needed != {"batch"} else "batch" if measures_batch else None
        y, seen = channel_norm(
            x, rule, *((None, None) if shares is None else shares), self.weight, self.bias, per=per, mask=mask, impl=impl
        )
        if self.learning and seen is not None:
            self.learn(seen, unbiased=False)
        if self.learning and shares is not None and not recomputing():
            self._settle(shares)
        return y

    @torch.no_grad()
    def _settle(self, shares: Tensor) -> None:
        """Keep for good what has a share of 1."""
        for share, choice in zip(shares, (self.mean_choice, self.var_choice), strict=True):
            choice.copy_(torch.where(share.max() >= 1 - TIE, share.argmax(), choice))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for kind in ("mean", "var"):  # as the authors' code stores a choice: a flag, and logits that are its one-hot vector
            flag = state_dict.pop(f"{prefix}{kind}_fixed", None)
            if flag is not None:
                settled = state_dict[f"{prefix}{kind}_weight"].argmax()
                state_dict[f"{prefix}{kind}_choice"] = torch.where(flag.reshape(()) > 0, settled, -1)
                state_dict.setdefault(f"{prefix}num_batches_tracked", torch.tensor(0))
        self.fixed = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, using={self.using}, transform={self.transform!r}"
