"""Adaptive layer normalization with a gate that starts at zero."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.conditional.ada_layer import generated, modulated
from equinorm.conditional.condition import Projection
from equinorm.core.base import check_count, check_eps, check_trailing
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


class AdaLayerNormZero(nn.Module):
    r"""Adaptive layer norm in front of a residual branch, with a gate behind the branch; the block starts as the identity.

    Formula:
        x <- x + gate * branch((x - mu) / sqrt(var + eps) * (1 + scale) + shift), with (shift, scale, gate) = A silu(condition) + b, and
        A = 0, b = 0 at first. The layer returns the branch's input and the gate.

    Use it when: building residual blocks of a diffusion transformer: one layer in front of attention, one in front of the MLP.
    Not when: there is no residual branch to gate (AdaLayerNorm).
    Known trouble: while the gate is 0, only its own rows of A and b receive gradient. An initialisation applied to the whole model after
        construction undoes the zeros: apply it first and call ``reset_parameters()`` of these layers last.

    Args:
        dim: D, the last dimension.
        cond_dim: length of the condition.
        eps: added to the variance inside the root.
        device, dtype: of the parameters.

    Shape:
        x: (N, ..., D). condition: (N | 1, cond_dim) for all rows of a sample, or one vector per row, (N | 1, ..., cond_dim) with as many
        dimensions as x. mask: boolean, broadcastable to x, True where data is; the rest enters no statistic and comes out as 0.

    Returns:
        the modulated x, of its shape and dtype, and the gate, of its dtype and broadcastable to it: (N | 1, 1, ..., D) for a condition per
        sample.

    Raises:
        TypeError: an input is not floating point.
        ValueError: another last dimension, a condition that does not fit, a mask that does not broadcast, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm, mlp, x = equinorm.AdaLayerNormZero(16, cond_dim=8), torch.nn.Linear(16, 16), torch.randn(2, 5, 16)
        >>> y, gate = norm(x, torch.randn(2, 8))
        >>> torch.equal(x + gate * mlp(y), x)
        True

    Source: Peebles and Xie 2022, section 3.2 (adaLN-Zero). The authors' code computes six chunks for two branches in one linear layer, in
    the order shift, scale, gate for attention and again for the MLP: its first 3 D rows are the first layer's ``projection``, its last 3 D
    rows the second's.
    """

    facts: ClassVar[Facts] = Facts(
        name="ada_layer_zero",
        title="Adaptive Layer Normalization with Zero Gate",
        paper=Paper(
            authors="Peebles and Xie",
            title="Scalable Diffusion Models with Transformers",
            year=2022,
            venue="ICCV 2023",
            arxiv="2212.09748",
            equation="section 3.2",
        ),
        family="conditional",
        pools="D",
        invariances=frozenset({"shift", "scale", "per-sample"}),
        one_position="normalizes the features of the one position",
    )
    takes_condition: ClassVar[bool] = True

    def __init__(self, dim: int, cond_dim: int, eps: float = 1e-6, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_count(self, dim=dim, cond_dim=cond_dim)
        check_eps(self, eps)
        self.dim, self.cond_dim, self.eps = dim, cond_dim, eps
        self.projection = Projection(cond_dim, 3 * dim, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The layer for a last dimension of ``channels`` features; ``cond_dim`` must be among the options."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """A and b at 0."""
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
        check_trailing(self, x, (self.dim,), mask)
        shift, scale, gate = generated(self, self.projection, x, condition).chunk(3, -1)  # each (N | 1, ..., D)
        return modulated(x, shift, scale, self.eps, mask, impl), gate.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, cond_dim={self.cond_dim}, eps={self.eps}"
