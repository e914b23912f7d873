"""Iterative normalization: whitening by a few matrix products."""

from __future__ import annotations

from math import ceil, log
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from equinorm.core.whiten import WhiteningNorm, divisor
from equinorm.facts import Facts, Paper

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def newton(cov: Tensor, eps: float, steps: int) -> Tensor:
    """The inverse root of cov + eps I by Newton's iteration, in the coupled form: y converges to the root while z converges to its inverse.

    In exact arithmetic z_k is the P_k of the paper's P <- (3 P - P^3 S) / 2, which loses the symmetry between P and S to rounding and then
    amplifies it.
    """
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    s = cov + eps * identity
    trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # (G, 1, 1)
    trace = torch.where(trace == 0, 1, trace)
    y, z = s / trace, identity.expand_as(s)
    for _ in range(steps):
        r = (3 * identity - z @ y) / 2
        y, z = y @ r, r @ z
    return z / trace.sqrt()


class IterNorm(WhiteningNorm):
    r"""Whiten groups of channels over the batch as far as T steps of Newton's iteration go.

    Formula:
        y = W (x - mu) * weight + bias per group of d channels, with mu and the biased covariance over all samples and positions,
        S = covariance + eps I, W = P_T / sqrt(tr S), P_0 = I, P_(k+1) = (3 P_k - P_k^3 S / tr S) / 2.
        After each training batch running <- running + momentum * (batch - running) for mu and W; evaluation puts these in place.

    Use it when: whitening is wanted at the cost of a few small matrix products, or less whitening with less noise: T trades one for the
        other.
    Not when: a batch has fewer than about 2 d values per channel, or channels are to be decorrelated exactly.
    Known trouble: with the usual T = 5 wide groups do not reach variance 1: white input comes out with variance 0.97 at d = 16, 0.59 at d =
        64, 0.11 at d = 512. This is the method, and the affine map makes up for it; ``T="auto"`` takes enough steps for white input.
        Directions of variance under 1e-4 of the largest stay un-whitened at T = 5.

    Args:
        num_features: C.
        channels_per_group: d, must divide C; more than C means all channels. d = 1 is batch norm.
        T: steps, at least 0, or "auto" for as many as bring white input to variance 0.9999: log(sqrt d) / log 1.5 + 3. Steps beyond 19 in
            float32, or 44 in float64, could only amplify rounding and are left out.
        eps: added to the diagonal of the covariance.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        running: average the "projection" W (the authors' code) or the "covariance", whose W evaluation then computes.
        process_group: pool mean and covariance over this process group, or over all processes with "world".
        device, dtype: of the parameters. Estimates are float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.
        Buffers: ``running_mean`` (G, d), ``running_projection`` or ``running_covariance`` (G, d, d), ``num_batches_tracked``.

    Raises:
        TypeError: the input is not floating point.
        ValueError: d does not divide C, wrong number of channels, one value per channel in training, a mask of another shape, or settings
            out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.IterNorm(2, T=7, eps=0.0)
        >>> norm(torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, -1.0], [2.0, 4.0]])).detach().round(decimals=3)
        tensor([[-0.6060,  0.4040],
                [ 1.6160, -0.6060],
                [-1.0100, -1.2120],
                [ 0.0000,  1.4140]])

    Source: Huang et al. 2019, Algorithm 1. The iteration is run in its coupled form, equal in exact arithmetic: the published form
    amplifies rounding errors from T = 12 or so, to NaN at T = 20. The authors' code halves d until it divides C, and cannot train more than
    one group on a current PyTorch.
    """

    facts: ClassVar[Facts] = Facts(
        name="iterative",
        title="Iterative Normalization (IterNorm)",
        paper=Paper(
            authors="Huang et al.",
            title="Iterative Normalization: Beyond Standardization towards Efficient Whitening",
            year=2019,
            venue="CVPR",
            arxiv="1904.03441",
            equation="Algorithm 1",
        ),
        family="whitening",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and covariance per group",
        invariances=frozenset({"shift", "scale"}),
        batch_of_one="whitens over the positions of the one sample; refused when there is one position",
        one_position="whitens over the samples",
        reads_writes="3R+1W",
    )

    def __init__(
        self,
        num_features: int,
        channels_per_group: int = 64,
        T: int | Literal["auto"] = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        running: Literal["projection", "covariance"] = "projection",
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, channels_per_group, eps, momentum, affine, running, process_group, device, dtype)
        if T != "auto" and (isinstance(T, bool) or not isinstance(T, int) or T < 0):
            raise ValueError(f'IterNorm: T must be an integer of at least 0, or "auto"; got {T!r}')
        self.T = ceil(log(self.channels_per_group**0.5) / log(1.5)) + 3 if T == "auto" else T

    @classmethod
    def for_channels(cls, channels: int, *, channels_per_group: int = 64, **options: Any) -> Self:
        """The norm with ``channels_per_group`` channels in a group, or the largest smaller number that divides ``channels``."""
        return cls(channels, divisor(channels, channels_per_group), **options)

    def projection(self, cov: Tensor, noise: float) -> Tensor:
        """P_T / sqrt(tr S)."""
        # A step multiplies what is small by 1.5. Once everything above the noise has converged, further steps would only raise the noise,
        # and an eigenvalue that rounding made negative would end in NaN.
        useful = int(log(1 / noise) / (2 * log(1.5)))
        return newton(cov, self.eps, min(self.T, useful))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, T={self.T}"
