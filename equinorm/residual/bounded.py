"""What the bounded functions in place of norms share: a scalar slope, and a weight and bias per channel."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import check_floating
from equinorm.core.pointwise import Point, pointwise_norm
from equinorm.facts import Facts
from equinorm.kernels import Impl
from equinorm.kernels.reference import wide


class Bounded(nn.Module):
    """Abstract: ``weight * f(x) + bias``, f bounded, with a weight and bias per channel.

    Attributes:
        normalized_shape: shape of weight and bias.
        alpha: the slope, one learned number, (1,).
        channels_last: whether the channels are the last dimensions, or dimension 1 of (N, C, *S).
    """

    facts: ClassVar[Facts]
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        alpha_init: float,
        elementwise_affine: bool,
        bias: bool,
        channels_last: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        name = type(self).__name__
        if not self.normalized_shape or min(self.normalized_shape) < 1:
            raise ValueError(f"{name}: normalized_shape must hold sizes of at least 1, got {normalized_shape}")
        if not channels_last and len(self.normalized_shape) != 1:
            raise ValueError(f"{name}: with channels_last=False normalized_shape must be one number of channels, got {normalized_shape}")
        self.alpha_init, self.elementwise_affine, self.channels_last = alpha_init, elementwise_affine, channels_last
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        for key, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            self.register_parameter(key, nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype)) if wanted else None)

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The layer for ``channels`` channels of (N, C, *S), as the catalogue builds it."""
        return cls(channels, **{"channels_last": False, **options})

    def reset_parameters(self) -> None:
        """Slope at its initial value, weight 1, bias 0."""
        nn.init.constant_(self.alpha, self.alpha_init)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def bend(self) -> tuple[Point, tuple[Tensor, ...]]:
        """The bounded function of x, its own parameters, weight and bias; and these own parameters, one number each."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, impl: Impl = "auto") -> Tensor:
        check_floating(self, x)
        shape = self.normalized_shape
        own = tuple(x.shape[-len(shape) :]) if self.channels_last else tuple(x.shape[1:2])
        if own != shape:
            wanted = f"(..., {', '.join(map(str, shape))})" if self.channels_last else f"(N, {shape[0]}, *S)"
            raise ValueError(f"{type(self).__name__}: the input must have shape {wanted}, got {tuple(x.shape)}")
        point, numbers = self.bend()

        def rule(_: None, weight: Tensor | None, bias: Tensor | None, *numbers: Tensor) -> tuple[tuple[Tensor, ...], None]:
            # Wide: the slope's gradient is a sum over the whole tensor, which bfloat16 cannot hold.
            one = wide(numbers[0].detach()).new_ones(1, 1)
            weight, bias = one if weight is None else weight.reshape(1, -1), one * 0 if bias is None else bias.reshape(1, -1)
            return (*(wide(number).reshape(1, 1) for number in numbers), weight, bias), None

        rows = x.reshape(1, -1, prod(shape)).movedim(2, 1) if self.channels_last else x  # (N, C, *S)
        y, _ = pointwise_norm(rows, rule, point, self.weight, self.bias, *numbers, per=None, impl=impl)
        return y.movedim(1, 2).reshape(x.shape) if self.channels_last else y

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, alpha_init={self.alpha_init}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}, channels_last={self.channels_last}"
        )
