"""Stable rank normalization: bound the stable rank of a layer's weight, and its spectral norm, with the least change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.power import MatrixOperator, PowerIterated, full_precision
from equinorm.weight.units import named_weight, register, safe_sqrt, units_of, wide


def stable_rank(weight: Tensor, dim: int = 0) -> Tensor:
    """Squared Frobenius norm over squared spectral norm of a weight seen as a matrix: between 1 and its rank.

    Args:
        weight: floating, at least 2 dimensions; half types are computed in float32.
        dim: dimension that becomes the rows.

    Returns:
        A scalar; 0 for an all-zero weight.

    Example:
        >>> import torch, equinorm
        >>> equinorm.stable_rank(torch.eye(3)).item()
        3.0
    """
    w = wide(weight).movedim(dim, 0).flatten(1)
    s = torch.linalg.svdvals(w)
    s = s / torch.where(s[0] > 0, s[0], 1)
    return s.square().sum()


def stable_rank_projection(weight: Tensor, rank: float, preserve: int = 1) -> Tensor:
    """The matrix nearest to ``weight`` in the Frobenius norm with stable rank at most ``rank``, by a full singular value decomposition.

    Args:
        weight: ``(m, n)``, float32 or float64.
        rank: wanted stable rank, at least 1. A weight at or below it comes back as it is.
        preserve: how many of the largest singular values stay as they are; with 0 the first may change, too, and the result is nearer.

    Raises:
        ValueError: not a matrix, ``rank`` below 1, or the preserved values alone have a larger stable rank.

    Example:
        >>> import torch, equinorm
        >>> equinorm.stable_rank(equinorm.stable_rank_projection(torch.diag(torch.tensor([2.0, 2.0, 1.0])), 1.5)).item()
        1.5

    Source: Sanyal, Torr and Dokania, 2020, arXiv:1906.04659, Theorem 1, in our own derivation.
    """
    if weight.ndim != 2:
        raise ValueError(f"stable_rank_projection: weight must be a matrix, got shape {tuple(weight.shape)}")
    if not rank >= 1:
        raise ValueError(f"stable_rank_projection: rank must be at least 1, the stable rank of a matrix of rank one; got {rank}")
    if preserve < 0:
        raise ValueError(f"stable_rank_projection: preserve must be at least 0, got {preserve}")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    kept = max(1, preserve)
    total, head = s.square().sum(), s[:kept].square().sum()
    first = s[0].square()
    if not total > rank * first:
        return weight
    if head > rank * first:
        raise ValueError(
            f"stable_rank_projection: the {kept} preserved singular values alone have stable rank {head / first:.4g}, more than the wanted "
            f"{rank}; preserve fewer"
        )
    tail = (total - head).sqrt()
    gain = (rank * first - head).sqrt() / tail
    scale = torch.cat((torch.ones_like(s[:kept]), gain.expand(len(s) - kept)))
    if preserve == 0:
        scale = scale * (1 / rank + (rank - 1) ** 0.5 * tail / (rank * s[0]))
    return (u * (s * scale)) @ vh


class _StableRankNorm(PowerIterated):
    operator: MatrixOperator

    def __init__(
        self, operator: MatrixOperator, weight: Tensor, steps: int, rank: float, preserve: int, spectral: bool, eps: float
    ) -> None:
        super().__init__(operator, weight, steps)
        self.rank, self.preserve, self.spectral, self.eps = rank, preserve, spectral, eps

    def forward(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            u, v, sigma = self.top(wide(weight))
            size = sigma.clamp(min=self.eps)
            # In units of sigma: the first singular component is u v^T, and what is left may have norm sqrt(rank - 1).
            first = sigma / size * u.outer(v)
            rest = self.operator.matrix(wide(weight)) / size - first
            norm, allowed = safe_sqrt(rest.square().sum()), (self.rank - 1) ** 0.5
            over = norm > allowed
            w = first + torch.where(over, allowed / torch.where(over, norm, 1), 1) * rest
            if self.preserve == 0:
                w = w * torch.where(over, (1 + allowed * norm) / self.rank, 1)
            return self.operator.back(w if self.spectral else w * size, weight).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank:g}, preserve={self.preserve}, spectral={self.spectral}, n_power_iterations={self.n_power_iterations}"


@describes(
    Facts(
        name="stable_rank",
        title="Stable Rank Normalization",
        paper=Paper(
            authors="Sanyal, Torr and Dokania",
            title="Stable Rank Normalization for Improved Generalization in Neural Networks and GANs",
            year=2020,
            venue="ICLR",
            arxiv="1906.04659",
            equation="Algorithm 1",
        ),
        family="weight",
        pools="W",
        train_differs=True,
        invariances=frozenset({"per-sample"}),
        reads_writes="0R+0W",
    )
)
def stable_rank_norm(
    module: nn.Module,
    name: str = "weight",
    rank: float | None = None,
    ratio: float = 0.7,
    preserve: int = 1,
    spectral: bool = True,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    r"""Bound the stable rank of a layer's weight, after dividing it by its largest singular value.

    Formula:
        srank(W) = ||W||_F^2 / sigma^2
        w = u v^T + R min(1, sqrt(r - 1) / ||R||_F),  R = W / sigma - u v^T

        with the top singular triple (u, sigma, v) by power iteration as in spectral normalization, u and v constants of the derivative. Of
        all matrices of spectral norm 1 and stable rank at most r with this first component, w is the nearest to W / sigma.

    Use it when: spectral normalization alone leaves too much capacity: classifiers (ratio 0.3 to 0.5), discriminators (0.7).
    Not when: the layer has one output or input (its stable rank is always 1), or a norm behind it divides the scale out again.
    Known trouble: while u and v lag behind the weight, what leaks of the first component into R makes the stable rank slightly larger
        than r. Of a convolution it sees the matrix of one patch. ``spectral_norm`` says what power iteration asks of training loops.

    Args:
        module: the layer.
        name: its parameter, at least 2 dimensions.
        rank: wanted stable rank r, at least 1; None takes it from ``ratio``.
        ratio: r = max(1, ratio * min(rows, columns)), between 0 (excluded) and 1. At 1 nothing but the spectral norm is changed.
        preserve: 1 keeps the first singular value; 0 lets it grow, which is nearer to the weight: only with ``spectral=False``, because
            normalizing it afterwards gives the result of 1.
        spectral: divide by sigma; False bounds the stable rank and keeps the scale.
        n_power_iterations: iterations per training forward.
        eps: smallest value that W is divided by.
        dim: dimension that becomes the rows; None: 1 for transposed convolutions, else 0.

    Returns:
        The same module, with state as for ``spectral_norm`` (``parametrizations.<name>.0._u`` and ``_v``).

    Raises:
        ValueError: an argument out of range, a weight with one dimension, no such parameter, or already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.stable_rank_norm(torch.nn.Linear(20, 30), rank=3, n_power_iterations=50)
        >>> round(equinorm.stable_rank(layer.weight).item(), 2)
        3.0

    Source: Sanyal, Torr and Dokania, 2020, arXiv:1906.04659. We derived the solution anew (``stable_rank_projection`` has the general
        one) and follow the first author's code in the one-step form. That code takes the square root of a negative number when
        ratio * min(rows, columns) < 1, where we take r = 1; and it scrambles the entries of transposed convolutions, where we undo the
        permutation. It advances v before u and starts without warm-up; we do as in ``spectral_norm``.
    """
    weight = named_weight("stable_rank_norm", module, name)
    rows = units_of("stable_rank_norm", module, name, dim).dim
    if weight.ndim < 2:
        raise ValueError(f"stable_rank_norm: the weight must have at least 2 dimensions, got shape {tuple(weight.shape)}; use weight_norm")
    if rank is not None and not rank >= 1:
        raise ValueError(f"stable_rank_norm: rank must be at least 1, the stable rank of a matrix of rank one; got {rank}")
    if not 0 < ratio <= 1:
        raise ValueError(f"stable_rank_norm: ratio must lie in (0, 1], got {ratio}")
    if preserve not in (0, 1):
        raise ValueError(f"stable_rank_norm: preserve must be 0 or 1, got {preserve}; stable_rank_projection takes more")
    if preserve == 0 and spectral:
        raise ValueError(
            "stable_rank_norm: preserve=0 has no effect with spectral=True, which sets the first value to 1; pass spectral=False"
        )
    if not isinstance(n_power_iterations, int) or n_power_iterations < 1:
        raise ValueError(f"stable_rank_norm: n_power_iterations must be an integer of at least 1, got {n_power_iterations!r}")
    if not eps > 0:
        raise ValueError(f"stable_rank_norm: eps must be positive, got {eps}")
    operator = MatrixOperator(rows)
    if rank is None:
        rank = max(1.0, ratio * min(operator.matrix(weight).shape))
    register("stable_rank_norm", module, name, _StableRankNorm(operator, weight, n_power_iterations, rank, preserve, spectral, eps))
    return module
