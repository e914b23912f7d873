"""Dynamic erf (Derf): an error function of learned slope and shift in the place of a norm."""

from __future__ import annotations

from math import pi
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.core.pointwise import Point
from equinorm.facts import Facts, Paper
from equinorm.residual.bounded import Bounded


def scaled_erf(x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The rule."""
    return torch.erf(alpha * x + shift) * weight + bias


def _pull(dy: Tensor, x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    argument = (alpha * x).add_(shift)
    bounded = argument.erf()
    inside = argument.square_().neg_().exp_().mul_(dy).mul_(weight * (2 / pi**0.5))
    return inside * alpha, (inside * x, inside, bounded.mul_(dy), dy)


ERF = Point(scaled_erf, _pull)


class DynamicErf(Bounded):
    r"""Squash every value with an error function of one learned slope and one learned shift, in the place of layer norm.

    Formula:
        y = weight * erf(alpha * x + shift) + bias

        alpha (0.5 at the start) and shift (0) are one learned number each; weight 1 and bias 0, per channel.

    Use it when: as :class:`DynamicTanh`, which it succeeds: its authors report better results than with tanh, and than layer norm, on image
        classification and generation, and equal ones on a small language model.
    Not when: as :class:`DynamicTanh`.
    Known trouble: it does not keep the variance: standard normal input leaves with root mean square 0.465. Copies that make the slope or
        the shift a number per channel are another method. Keep weight decay away from both.

    Args:
        normalized_shape: the last dimensions, or C with ``channels_last=False``.
        alpha_init: the slope at the start (1.0 in the authors' language model).
        elementwise_affine: learn weight and bias.
        bias: False leaves out the bias.
        channels_last: False for (N, C, *S).
        shift_init: the shift at the start.
        device, dtype: of the parameters.

    Shape: ``(..., *normalized_shape)`` or ``(N, C, *S)``, same out. Half types are computed in float32. Parameters: ``alpha`` (1,),
        ``shift`` (1,), ``weight``, ``bias``.

    Raises:
        TypeError: the input is not floating point.
        ValueError: sizes below 1, or an input of another shape.

    Example:
        >>> import torch, equinorm
        >>> equinorm.DynamicErf(2)(torch.tensor([1.0, -100.0])).detach()
        tensor([ 0.5205, -1.0000])

    Source: Chen et al., 2025, arXiv:2512.10938.
    """

    facts: ClassVar[Facts] = Facts(
        name="dynamic_erf",
        title="Dynamic erf (Derf)",
        paper=Paper(
            authors="Chen et al.", title="Stronger Normalization-Free Transformers", year=2025, venue="CVPR 2026", arxiv="2512.10938"
        ),
        family="bounded",
        pools="",
        invariances=frozenset({"per-sample", "per-channel"}),
        reads_writes="1R+1W",
    )

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        alpha_init: float = 0.5,
        elementwise_affine: bool = True,
        bias: bool = True,
        channels_last: bool = True,
        shift_init: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, alpha_init, elementwise_affine, bias, channels_last, device, dtype)
        self.shift_init = shift_init
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Slope and shift at their initial values, weight 1, bias 0."""
        super().reset_parameters()
        nn.init.constant_(self.shift, self.shift_init)

    def bend(self) -> tuple[Point, tuple[Tensor, ...]]:
        """erf(alpha x + shift)."""
        return ERF, (self.alpha, self.shift)
