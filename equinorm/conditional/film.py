"""Feature-wise linear modulation."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.conditional.condition import Projection, check_condition
from equinorm.core import Affine
from equinorm.core.base import check_channels, check_count
from equinorm.core.channel import channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def film(delta: Tensor, beta: Tensor) -> Affine:
    """Scale each channel of each sample by 1 + delta and shift it by beta, both (N | 1, C)."""
    return Affine(delta.new_zeros(()), 1 + delta, beta)


class FiLM(nn.Module):
    r"""Scale and shift each channel by what a linear map makes of a condition; nothing is normalized.

    Formula:
        y = (1 + delta) x + beta, with (delta, beta) = A condition + b for each sample, one pair per channel.

    Use it when: a network reads a second input (a question, a time step, a speaker) and keeps whatever norm it has; put it behind a norm
        without affine parameters, or where there is none.
    Not when: scale control is what is missing; this has none.
    Known trouble: delta is unbounded: scales below 0 flip a channel's sign, which the authors found useful. A norm with affine parameters
        right behind it undoes what is common to all conditions.

    Args:
        num_features: C.
        cond_dim: length of the condition.
        zero_init: start A and b at 0: the layer starts as the identity.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. condition: (N | 1, cond_dim).

    Raises:
        TypeError: an input is not floating point.
        ValueError: wrong number of channels, a condition of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> film, x = equinorm.FiLM(8, cond_dim=4, zero_init=True), torch.randn(2, 8, 5, 5)
        >>> torch.equal(film(x, torch.randn(2, 4)), x)
        True

    Source: Perez et al. 2017, Eq. 2, with the offset of 1 that the paper and the authors' code add to what is predicted. As in the code, A
    starts He-uniform; b starts at 0, where the code leaves it to the framework.
    """

    facts: ClassVar[Facts] = Facts(
        name="film",
        title="Feature-wise Linear Modulation",
        paper=Paper(
            authors="Perez et al.",
            title="FiLM: Visual Reasoning with a General Conditioning Layer",
            year=2017,
            venue="AAAI 2018",
            arxiv="1709.07871",
            equation="Eq. 2",
        ),
        family="conditional",
        pools="",
        invariances=frozenset({"per-sample", "per-channel"}),
    )
    takes_condition: ClassVar[bool] = True

    def __init__(
        self, num_features: int, cond_dim: int, zero_init: bool = False, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_count(self, num_features=num_features, cond_dim=cond_dim)
        self.num_features, self.cond_dim, self.zero_init = num_features, cond_dim, zero_init
        self.projection = Projection(cond_dim, 2 * num_features, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """FiLM for ``channels`` channels; ``cond_dim`` must be among the options."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """A He-uniform, or 0 with ``zero_init``; b = 0."""
        if self.zero_init:
            nn.init.zeros_(self.projection.weight)
        else:
            nn.init.kaiming_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor, condition: Tensor, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        check_condition(self, x, condition, self.cond_dim)
        delta, beta = self.projection(condition).chunk(2, 1)  # each (N | 1, C)
        return channel_norm(x, lambda _, d, b: film(d, b), delta, beta, per=None, impl=impl)[0]

    def extra_repr(self) -> str:
        return f"{self.num_features}, cond_dim={self.cond_dim}, zero_init={self.zero_init}"
