"""Orthonormal weights by Björck's iteration: a linear layer that keeps the length of what it does not project away."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.power import MatrixOperator, full_precision
from equinorm.weight.units import named_weight, register, units_of, wide

Scaling = Literal["norm", "size", "none"]

# Coefficients of W (1 + c_1 Q + c_2 Q^2 + ...) with Q = 1 - W^T W: the Taylor series of (1 - Q)^(-1/2).
SERIES = {1: (1 / 2,), 2: (1 / 2, 3 / 8), 3: (1 / 2, 3 / 8, 5 / 16), 4: (1 / 2, 3 / 8, 5 / 16, 35 / 128)}


def bjorck(w: Tensor, n_iter: int, order: int, beta: float) -> Tensor:
    """The rule: repeat ``W <- W (1 + beta Q)`` with ``Q = 1 - W^T W``, or the series of the given order."""
    coefficients = (beta,) if order == 1 else SERIES[order]
    wide_matrix = w.shape[0] < w.shape[1]
    w = w.mT if wide_matrix else w  # the small Gram matrix
    eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    for _ in range(n_iter):
        q = eye - w.mT @ w
        series = coefficients[-1] * q
        for c in reversed(coefficients[:-1]):
            series = q @ (c * eye + series)
        w = w + w @ series
    return w.mT if wide_matrix else w


class _Bjorck(nn.Module):
    def __init__(self, dim: int, beta: float, n_iter: int, order: int, scaling: Scaling) -> None:
        super().__init__()
        self.operator = MatrixOperator(dim)
        self.beta, self.n_iter, self.order = beta, n_iter, order
        self.scaling: Scaling = scaling

    def forward(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            w = self.operator.matrix(wide(weight))
            if self.scaling == "norm":
                square = w.abs().sum(0).amax() * w.abs().sum(1).amax()
                w = w / torch.where(square > 0, square, 1).sqrt()
            elif self.scaling == "size":
                w = w / (w.shape[0] * w.shape[1]) ** 0.5
            return self.operator.back(bjorck(w, self.n_iter, self.order, self.beta), weight).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"beta={self.beta}, n_iter={self.n_iter}, order={self.order}, scaling={self.scaling!r}"


@describes(
    Facts(
        name="bjorck",
        title="Björck Orthonormalization",
        paper=Paper(
            authors="Anil, Lucas and Grosse",
            title="Sorting out Lipschitz function approximation",
            year=2019,
            venue="ICML",
            arxiv="1811.05381",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"per-sample"}),
        reads_writes="0R+0W",
    )
)
def bjorck_orthonormal(
    module: nn.Module,
    name: str = "weight",
    beta: float = 0.5,
    n_iter: int = 20,
    order: int = 1,
    scaling: Scaling = "norm",
    dim: int | None = None,
) -> nn.Module:
    r"""Replace a layer's weight by the nearby matrix with all singular values 1, differentiably and without a decomposition.

    Formula:
        W_0 = W / bound,  W_{k+1} = (1 + beta) W_k - beta W_k W_k^T W_k

        which is W_k (1 + Q / 2) with Q = 1 - W_k^T W_k at beta 1/2; orders 2 to 4 add the next terms 3/8 Q^2, 5/16 Q^3, 35/128 Q^4. The
        matrix is (dim, everything else); the smaller side becomes orthonormal.

    Use it when: a network must be 1-Lipschitz without losing gradient norm (Wasserstein critics, certified robustness), with activations
        that keep gradient norms, such as sorting.
    Not when: a cheaper bound will do (``spectral_norm``), or exactness matters more than speed
        (``torch.nn.utils.parametrizations.orthogonal``).
    Known trouble: singular values converge to 1 only if they start in (0, sqrt(3)); above sqrt(5) they diverge. Small ones grow by half per
        iteration (order 1): after 20, a singular value of 0.00075 of the bound has reached 0.998. A matrix without full rank stays so.
        A convolution is orthonormal as the matrix of one patch, not as an operator.

    Args:
        module: the layer.
        name: its parameter, at least 2 dimensions.
        beta: step of order 1.
        n_iter: iterations.
        order: terms of the series, 1 to 4; above 1 with beta 1/2.
        scaling: "norm" first divides by sqrt(||W||_1 ||W||_inf), which bounds the largest singular value; "size" divides by
            sqrt(rows * columns), which bounds it only if no entry exceeds 1; "none" leaves it to you.
        dim: dimension that becomes the rows; None: 1 for transposed convolutions, else 0.

    Returns:
        The same module. The gradient runs through all iterations. Half types are computed in float32.

    Raises:
        ValueError: an argument out of range, a weight with one dimension, no such parameter, or already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> w = equinorm.bjorck_orthonormal(torch.nn.Linear(4, 3), n_iter=40).weight
        >>> (w @ w.T).allclose(torch.eye(3), atol=1e-5)
        True

    Source: Björck and Bowie, 1971; Anil, Lucas and Grosse, 2019, arXiv:1811.05381. The authors' code divides by sqrt(rows * columns)
        ("size"), which is no bound for large entries and makes a poor start for a layer's usual weights.
    """
    weight = named_weight("bjorck_orthonormal", module, name)
    rows = units_of("bjorck_orthonormal", module, name, dim).dim
    if weight.ndim < 2:
        raise ValueError(
            f"bjorck_orthonormal: the weight must have at least 2 dimensions, got shape {tuple(weight.shape)}; use weight_norm"
        )
    if not isinstance(n_iter, int) or n_iter < 1:
        raise ValueError(f"bjorck_orthonormal: n_iter must be an integer of at least 1, got {n_iter!r}")
    if order not in SERIES:
        raise ValueError(f"bjorck_orthonormal: order must be 1, 2, 3 or 4, got {order!r}")
    if not 0 < beta <= 0.5:
        raise ValueError(f"bjorck_orthonormal: beta must lie in (0, 0.5], got {beta}; larger steps need not converge")
    if order > 1 and beta != 0.5:
        raise ValueError(
            f"bjorck_orthonormal: beta is the step of order 1; orders above have fixed coefficients, got beta={beta} with {order}"
        )
    if scaling not in get_args(Scaling):
        raise ValueError(f"bjorck_orthonormal: scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
    register("bjorck_orthonormal", module, name, _Bjorck(rows, beta, n_iter, order, scaling))
    return module
