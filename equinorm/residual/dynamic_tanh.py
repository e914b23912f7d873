"""Dynamic tanh (DyT): a hyperbolic tangent of learned slope in the place of a norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from equinorm.core.pointwise import Point
from equinorm.facts import Facts, Paper
from equinorm.residual.bounded import Bounded


def scaled_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The rule."""
    return torch.tanh(alpha * x) * weight + bias


def _pull(dy: Tensor, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    bounded = (alpha * x).tanh_()
    inside = torch.ops.aten.tanh_backward(dy * weight, bounded)
    return inside * alpha, (inside * x, bounded.mul_(dy), dy)


TANH = Point(scaled_tanh, _pull)


class DynamicTanh(Bounded):
    r"""Squash every value with a hyperbolic tangent of one learned slope, in the place of layer norm.

    Formula:
        y = weight * tanh(alpha * x) + bias

        alpha is one learned number, 0.5 at the start; weight 1 and bias 0, per channel.

    Use it when: a transformer shall do without statistics: cheaper to fuse, no reduction, one sample or token at a time. Reported on par
        with layer norm for vision transformers.
    Not when: data are plentiful and the model is a language model: it then loses to layer norm in an independent study
        (arXiv:2604.23434); or inputs can grow without bound, for saturation kills the gradient.
    Known trouble: it does not keep the variance: standard normal input leaves with root mean square 0.417. Wide models need a smaller
        alpha: the authors use 0.8 in attention and 0.2 elsewhere for a language model of 7 billion parameters, and 0.2 and 0.05 at 70
        billion, with a learned factor sqrt(width) behind the embedding. Keep weight decay away from alpha.

    Args:
        normalized_shape: the last dimensions, or C with ``channels_last=False``.
        alpha_init: the slope at the start.
        elementwise_affine: learn weight and bias.
        bias: False leaves out the bias.
        channels_last: False for (N, C, *S).
        device, dtype: of the parameters.

    Shape: ``(..., *normalized_shape)`` or ``(N, C, *S)``, same out. Half types are computed in float32. Parameters: ``alpha`` (1,),
        ``weight``, ``bias``.

    Raises:
        TypeError: the input is not floating point.
        ValueError: sizes below 1, or an input of another shape.

    Example:
        >>> import torch, equinorm
        >>> equinorm.DynamicTanh(2)(torch.tensor([1.0, -100.0])).detach()
        tensor([ 0.4621, -1.0000])

    Source: Zhu et al., 2025, arXiv:2503.10622, Eq. 1.
    """

    facts: ClassVar[Facts] = Facts(
        name="dynamic_tanh",
        title="Dynamic Tanh (DyT)",
        paper=Paper(
            authors="Zhu et al.", title="Transformers without Normalization", year=2025, venue="CVPR", arxiv="2503.10622", equation="Eq. 1"
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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, alpha_init, elementwise_affine, bias, channels_last, device, dtype)
        self.reset_parameters()

    def bend(self) -> tuple[Point, tuple[Tensor, ...]]:
        """tanh(alpha x)."""
        return TANH, (self.alpha,)
