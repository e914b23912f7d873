"""The magnitude-preserving functions of EDM2: sums, concatenations and activations that give unit second moments back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts, Invariance, Paper, describes
from equinorm.residual.scaling import variance_preserving_sum

EDM2 = Paper(
    authors="Karras et al.",
    title="Analyzing and Improving the Training Dynamics of Diffusion Models",
    year=2023,
    venue="CVPR 2024",
    arxiv="2312.02696",
)
SILU_RMS = 0.596  # root mean square of silu of a standard normal number, as published; 0.596469 to six digits


def _facts(name: str, title: str, equation: str, reads_writes: str = "1R+1W") -> Facts:
    paper = Paper(authors=EDM2.authors, title=EDM2.title, year=EDM2.year, venue=EDM2.venue, arxiv=EDM2.arxiv, equation=equation)
    invariances: frozenset[Invariance] = frozenset({"per-sample", "per-channel"})
    return Facts(name=name, title=title, paper=paper, family="residual", pools="", invariances=invariances, reads_writes=reads_writes)


@describes(_facts("mp_silu", "Magnitude-preserving SiLU", "Eq. 81"))
def mp_silu(x: Tensor) -> Tensor:
    """The SiLU over its root mean square for standard normal input.

    Formula:
        y = silu(x) / 0.596

    Use it when: a network is built of magnitude-preserving parts (``MPLinear``, ``mp_sum``).
    Not when: a norm follows.
    Known trouble: the constant holds for standard normal input; the exact one is 0.596469.

    Args:
        x: any shape.

    Returns:
        The same shape and dtype.

    Example:
        >>> import torch, equinorm
        >>> round(equinorm.mp_silu(torch.randn(100_000)).square().mean().item(), 1)
        1.0

    Source: Karras et al., 2023, arXiv:2312.02696, Eq. 81.
    """
    return F.silu(x) / SILU_RMS


@describes(_facts("mp_sum", "Magnitude-preserving Sum", "Eq. 88", "2R+1W"))
def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Blend two tensors so that uncorrelated parts of unit magnitude give unit magnitude.

    Formula:
        y = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)

    Use it when: a residual sum of a magnitude-preserving network: t = 0.3 for blocks and attention, 0.5 for label embeddings.
    Not when: the parts are correlated: equal ones come out larger by up to sqrt(2).
    Known trouble: t is a constant: 0 passes a, 1 passes b.

    Args:
        a: the skip.
        b: the branch, of a shape that broadcasts.
        t: share of the branch.

    Returns:
        The blend.

    Raises:
        ValueError: t outside of [0, 1].

    Example:
        >>> import torch, equinorm
        >>> a, b = torch.randn(2, 100_000)
        >>> round(equinorm.mp_sum(a, b, 0.3).std().item(), 1)
        1.0

    Source: Karras et al., 2023, arXiv:2312.02696, Eq. 88.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"mp_sum: t must lie in [0, 1], got {t}")
    return variance_preserving_sum(a, b, weights=(1 - t, t))


@describes(_facts("mp_cat", "Magnitude-preserving Concatenation", "Eq. 103", "1R+1W"))
def mp_cat(a: Tensor, b: Tensor, dim: int = 1, t: float = 0.5) -> Tensor:
    """Concatenate two tensors so that, at t = 1/2, both contribute the same energy whatever their widths, and the whole has unit magnitude.

    Formula:
        y = C [(1 - t) / sqrt(N_a) a, t / sqrt(N_b) b],  C = sqrt((N_a + N_b) / ((1 - t)^2 + t^2))

        N_a and N_b are the sizes along ``dim``.

    Use it when: a skip connection of a U-Net joins features of another width.
    Not when: what follows normalizes every channel by itself.
    Known trouble: single channels no longer have unit magnitude; the mean over all has.

    Args:
        a: one part.
        b: the other, of the same shape but for ``dim``.
        dim: dimension to concatenate along.
        t: share of b.

    Returns:
        The concatenation.

    Raises:
        ValueError: t outside of [0, 1], or an empty part.

    Example:
        >>> import torch, equinorm
        >>> y = equinorm.mp_cat(torch.ones(1, 64, 1), torch.ones(1, 192, 1))
        >>> round(y[:, :64].square().sum().item(), 2), round(y[:, 64:].square().sum().item(), 2)
        (128.0, 128.0)

    Source: Karras et al., 2023, arXiv:2312.02696, Eq. 103.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"mp_cat: t must lie in [0, 1], got {t}")
    n_a, n_b = a.shape[dim], b.shape[dim]
    if n_a == 0 or n_b == 0:
        raise ValueError(f"mp_cat: both parts must have at least one entry along dimension {dim}, got {n_a} and {n_b}")
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat((a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))), dim)


class MPFourier(nn.Module):
    """Random Fourier features of a scalar, of unit magnitude: ``sqrt(2) cos(2 pi (f x + phi))``.

    f is normal with standard deviation ``bandwidth``, phi uniform; both are fixed buffers ``freqs`` and ``phases``, which already hold
    the factor 2 pi, as in the authors' checkpoints.

    Args:
        num_features: how many.
        bandwidth: standard deviation of the frequencies.
        device, dtype: of the buffers.

    Shape: ``(...)`` to ``(..., num_features)``, in the dtype of the input; computed in at least float32.

    Raises:
        ValueError: fewer than one feature, or a bandwidth that is not positive.

    Example:
        >>> import torch, equinorm
        >>> equinorm.MPFourier(8)(torch.zeros(3)).shape
        torch.Size([3, 8])

    Source: Karras et al., 2023, arXiv:2312.02696, Eq. 75.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_features: int, bandwidth: float = 1.0, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if num_features < 1 or not bandwidth > 0:
            raise ValueError(f"MPFourier: num_features must be at least 1 and bandwidth positive, got {num_features} and {bandwidth}")
        self.num_features, self.bandwidth = num_features, bandwidth
        self.register_buffer("freqs", 2 * math.pi * bandwidth * torch.randn(num_features, device=device, dtype=dtype))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        angle = x.to(wide).unsqueeze(-1) * self.freqs.to(wide) + self.phases.to(wide)
        return (math.sqrt(2) * angle.cos()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, bandwidth={self.bandwidth}"
