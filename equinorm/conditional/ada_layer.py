"""Adaptive layer normalization."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.conditional.condition import Projection
from equinorm.core.base import check_count, check_eps, check_trailing
from equinorm.core.row import row_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import wide


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, mask: Tensor | None, impl: Impl) -> Tensor:
    """Layer norm without parameters, then ``* (1 + scale) + shift`` in float32 at least, where a scale of 1e-3 counts."""
    y = row_norm(wide(x), 1, None, None, eps, mask=mask, impl=impl) * (1 + scale) + shift
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)


def generated(module: nn.Module, projection: Projection, x: Tensor, condition: Tensor) -> Tensor:
    """``projection(silu(condition))``, spread to the dimensions of ``x`` (..., dim).

    Raises:
        TypeError: the condition is not floating point.
        ValueError: the condition is neither (N | 1, cond_dim) nor one vector per row of x.
    """
    name, rows, width = type(module).__name__, x.shape[:-1], projection.in_features
    if not condition.is_floating_point():
        raise TypeError(f"{name}: the condition must be floating point, got {condition.dtype}; embed class numbers or time steps first")
    fits = condition.ndim in (2, x.ndim) and condition.shape[-1] == width
    if not fits or any(c not in (1, n) for c, n in zip(condition.shape[:-1], rows, strict=False)):
        raise ValueError(
            f"{name}: the condition must have shape ({rows[0] if rows else 1}, {width}), one row per sample, or {(*rows, width)}, one per "
            f"token of the input {tuple(x.shape)}; got {tuple(condition.shape)}"
        )
    out = projection(F.silu(wide(condition)))
    return out.reshape(out.shape[0], *[1] * (x.ndim - 2), out.shape[-1]) if out.ndim < x.ndim else out


class AdaLayerNorm(nn.Module):
    r"""Layer norm over the last dimension whose scale and shift come from a condition.

    Formula:
        y = (x - mu) / sqrt(var + eps) * (1 + scale) + shift, with (shift, scale) = A silu(condition) + b.

    Use it when: a transformer is conditioned by a vector (class, time step, text), as diffusion transformers are; in front of the output
        layer of one, or everywhere in it.
    Not when: residual blocks should start as the identity; AdaLayerNormZero adds the gate for that.
    Known trouble: an initialisation applied to the whole model after construction undoes the zeros of A and b: apply it first and call
        ``reset_parameters()`` of these layers last.

    Args:
        dim: D, the last dimension.
        cond_dim: length of the condition.
        eps: added to the variance inside the root.
        zero_init: start A and b at 0: the layer starts as layer norm without parameters. False starts A as any linear layer.
        device, dtype: of the parameters.

    Shape:
        x: (N, ..., D) to the same shape and dtype. condition: (N | 1, cond_dim) for all rows of a sample, or one vector per row,
        (N | 1, ..., cond_dim) with as many dimensions as x. mask: boolean, broadcastable to x, True where data is; the rest enters no
        statistic and comes out as 0.

    Raises:
        TypeError: an input is not floating point.
        ValueError: another last dimension, a condition that does not fit, a mask that does not broadcast, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm, tokens = equinorm.AdaLayerNorm(16, cond_dim=8), torch.randn(2, 5, 16)
        >>> y = norm(tokens, torch.randn(2, 8))
        >>> torch.allclose(y, torch.nn.functional.layer_norm(tokens, (16,), eps=1e-6), atol=1e-5)
        True

    Source: Peebles and Xie 2022, section 3.2; eps, the activation in front of A and the order (shift, scale) are those of the authors'
    code, whose weights load into ``projection``.
    """

    facts: ClassVar[Facts] = Facts(
        name="ada_layer",
        title="Adaptive Layer Normalization",
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

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        eps: float = 1e-6,
        zero_init: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(self, dim=dim, cond_dim=cond_dim)
        check_eps(self, eps)
        self.dim, self.cond_dim, self.eps, self.zero_init = dim, cond_dim, eps, zero_init
        self.projection = Projection(cond_dim, 2 * dim, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """Adaptive layer norm over a last dimension of ``channels`` features; ``cond_dim`` must be among the options."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """A and b at 0, or with ``zero_init=False`` as those of any linear layer."""
        if self.zero_init:
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        else:
            self.projection.reset_parameters()

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_trailing(self, x, (self.dim,), mask)
        shift, scale = generated(self, self.projection, x, condition).chunk(2, -1)  # each (N | 1, ..., D)
        return modulated(x, shift, scale, self.eps, mask, impl)

    def extra_repr(self) -> str:
        return f"{self.dim}, cond_dim={self.cond_dim}, eps={self.eps}, zero_init={self.zero_init}"
