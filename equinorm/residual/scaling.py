"""Residual scaling: a sum of branches divided by what uncorrelated branches would grow by."""

from __future__ import annotations

from torch import Tensor, nn

from equinorm.facts import Facts, Paper, describes


def _norm(weights: tuple[float, ...]) -> float:
    return sum(w * w for w in weights) ** 0.5


@describes(
    Facts(
        name="residual_scaling",
        title="Variance-preserving Residual Scaling",
        paper=Paper(
            authors="Karras et al.",
            title="Analyzing and Improving the Image Quality of StyleGAN",
            year=2019,
            venue="CVPR 2020",
            arxiv="1912.04958",
            equation="section 4.1",
        ),
        family="residual",
        pools="",
        invariances=frozenset({"per-sample", "per-channel"}),
        reads_writes="2R+1W",
    )
)
def variance_preserving_sum(*parts: Tensor, weights: tuple[float, ...] | None = None) -> Tensor:
    r"""Add tensors so that uncorrelated parts of variance 1 give a sum of variance 1.

    Formula:
        y = sum_i w_i x_i / sqrt(sum_i w_i^2)

        with all w_i = 1: the sum over the square root of the number of parts. For one residual branch that is (x + f(x)) / sqrt(2).

    Use it when: branches of similar scale are added again and again without a norm in between: each plain sum would multiply the variance
        by the number of branches.
    Not when: the parts are correlated. Two equal parts of variance 1 give variance 2 even so; nothing can be known without measuring.
    Known trouble: the first of L successive sums reaches the end with the factor 2^(-L/2); deep networks lose the input unless ``weights``
        favour the skip.

    Args:
        *parts: tensors that broadcast to a common shape.
        weights: one per part; None for equal ones.

    Returns:
        The scaled sum.

    Raises:
        ValueError: no parts, another number of weights, or all weights zero.

    Example:
        >>> import torch, equinorm
        >>> a, b = torch.randn(2, 100_000)
        >>> round((a + b).std().item(), 1), round(equinorm.variance_preserving_sum(a, b).std().item(), 1)
        (1.4, 1.0)

    Source: the factor 1/sqrt(2) behind the residual sum of StyleGAN2's discriminator (arXiv:1912.04958), for any number of parts. The
        authors' code puts sqrt(1/2) into both branches instead of behind the sum, which is the same.
    """
    weights = (1.0,) * len(parts) if weights is None else weights
    _check("variance_preserving_sum", weights, len(parts))
    total = parts[0] * (weights[0] / _norm(weights))
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part * (weight / _norm(weights))
    return total


def _check(method: str, weights: tuple[float, ...], parts: int) -> None:
    if parts == 0 or len(weights) != parts:
        raise ValueError(f"{method}: there must be at least one part and one weight for each, got {parts} parts and {len(weights)} weights")
    if not _norm(weights) > 0:
        raise ValueError(f"{method}: at least one weight must differ from 0, got {weights}")


class ScaledResidual(nn.Module):
    r"""A residual block whose sum keeps the variance: ``(w_0 shortcut(x) + w_1 branch(x)) / sqrt(w_0^2 + w_1^2)``.

    See :func:`variance_preserving_sum`. With the default weights the factor is the 1/sqrt(2) of StyleGAN2's discriminator.

    Args:
        branch: the residual function.
        shortcut: what the input passes on the other way; None for nothing.
        weights: of the shortcut and of the branch.

    Shape: that of the branch; the shortcut's output must broadcast to it.

    Raises:
        ValueError: not two weights, or both zero.

    Example:
        >>> import torch, equinorm
        >>> block = equinorm.ScaledResidual(torch.nn.Identity())
        >>> block(torch.tensor([1.0]))
        tensor([1.4142])
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, weights: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        _check("ScaledResidual", weights, 2)
        self.branch, self.shortcut, self.weights = branch, shortcut, weights

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        return variance_preserving_sum(skip, self.branch(x), weights=self.weights)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"
