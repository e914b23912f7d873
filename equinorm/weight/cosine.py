"""Cosine normalization: a layer whose outputs are cosines, or correlations, between its weights and its inputs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair, _single, _triple

from equinorm.facts import Facts, Paper
from equinorm.weight.power import CONV, full_precision
from equinorm.weight.standardization import centre
from equinorm.weight.units import wide

Padding = int | tuple[int, ...] | Literal["same", "valid"]

COSINE = Facts(
    name="cosine",
    title="Cosine Normalization",
    paper=Paper(
        authors="Luo et al.",
        title="Cosine Normalization: Using Cosine Similarity Instead of Dot Product in Neural Networks",
        year=2017,
        venue="ICANN 2018",
        arxiv="1702.05870",
    ),
    family="weight",
    pools="CKW",
    invariances=frozenset({"scale", "weight-scale", "per-sample"}),
    reads_writes="2R+1W",
)


def unit(x: Tensor, within: tuple[int, ...], centered: bool, eps: float) -> Tensor:
    """``x`` (minus its mean, if centred) divided by its length along ``within``; smooth at 0."""
    if centered:
        x = centre(x, within)
    return x * (x.square().sum(within, keepdim=True) + eps).rsqrt()


def check(method: str, fan_in: int, centered: bool, eps: float, scale: float | None, learnable_scale: bool) -> None:
    """Refuse what has no cosine."""
    if not eps > 0:
        raise ValueError(f"{method}: eps must be positive, got {eps}")
    if centered and fan_in < 2:
        raise ValueError(f"{method}: centered needs at least 2 inputs per output unit, got {fan_in}: one value minus its mean is 0")
    if learnable_scale and scale is None:
        raise ValueError(f"{method}: learnable_scale needs a value to start from; pass scale, for instance 16.0")


class CosineLinear(nn.Module):
    r"""Linear layer that returns cosines (or Pearson correlations) instead of dot products.

    Formula:
        y_j = scale * <w_j, x> / sqrt((||w_j||^2 + eps) (||x||^2 + eps))

        centred: x and every w_j minus their own mean first. Without ``scale`` every output lies in [-1, 1].

    Use it when: the variance of pre-activations must be bounded whatever the inputs and weights; as a classifier that compares directions.
    Not when: the length of the input carries information.
    Known trouble: a softmax over values in [-1, 1] cannot be confident: give the last layer a ``scale`` (16, or sqrt(in_features)).
        An input of all zeros gives 0. Small inputs have large gradients, up to 1 / sqrt(eps). Centred with two inputs, every output is
        -1 or 1.

    Args:
        in_features, out_features: sizes.
        centered: correlations instead of cosines.
        eps: added to the squared lengths.
        scale: factor of the outputs; None for 1.
        learnable_scale: train ``scale`` from the given value.
        device, dtype: of the parameters.

    Shape: ``(*, in_features)`` to ``(*, out_features)``, same dtype; half types are computed in float32. Parameters: ``weight`` (out, in).

    Raises:
        ValueError: eps not positive, centred with one input, a learnable scale without a value, a wrong input size.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.CosineLinear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0]]))
        >>> round(layer(torch.tensor([3.0, 4.0])).item(), 4)
        0.96

    Source: Luo et al., 2017, arXiv:1702.05870. No official code was found. The paper's unit has no bias; ``scale`` is an extension. eps
        inside the roots is ours: an exact length has no derivative at 0.
    """

    facts: ClassVar[Facts] = COSINE

    def __init__(
        self,
        in_features: int,
        out_features: int,
        centered: bool = False,
        eps: float = 1e-8,
        scale: float | None = None,
        learnable_scale: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check("CosineLinear", in_features, centered, eps, scale, learnable_scale)
        self.in_features, self.out_features, self.centered, self.eps = in_features, out_features, centered, eps
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.scale = (
            nn.Parameter(torch.tensor(float(scale), device=device, dtype=dtype)) if learnable_scale and scale is not None else scale
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as torch's linear layer does; their scale does not matter."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"CosineLinear: the input must have shape (*, {self.in_features}), got {tuple(x.shape)}")
        with full_precision(x):
            y = F.linear(unit(wide(x), (-1,), self.centered, self.eps), unit(wide(self.weight), (-1,), self.centered, self.eps))
            return (y if self.scale is None else y * self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, centered={self.centered}, eps={self.eps}"


class _CosineConv(_ConvNd):
    """Abstract: cosine between every filter and every patch."""

    facts: ClassVar[Facts] = COSINE

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sizes: tuple[tuple[int, ...], tuple[int, ...], Padding, tuple[int, ...]],
        groups: int,
        centered: bool,
        eps: float,
        scale: float | None,
        learnable_scale: bool,
        padding_mode: str,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        kernel_size, stride, padding, dilation = sizes
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,  # type: ignore[arg-type]
            dilation,
            False,
            (0,) * len(kernel_size),
            groups,
            False,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        check(type(self).__name__, self.weight[0].numel(), centered, eps, scale, learnable_scale)
        self.centered, self.eps = centered, eps
        self.scale = (
            nn.Parameter(torch.tensor(float(scale), device=device, dtype=dtype)) if learnable_scale and scale is not None else scale
        )

    def forward(self, x: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        if x.ndim not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: the input must have shape (N, {self.in_channels}, *S) or ({self.in_channels}, *S) with {spatial} "
                f"spatial dimensions, got {tuple(x.shape)}"
            )
        batched = x if x.ndim == spatial + 2 else x[None]
        with full_precision(x):
            y = self._cosines(wide(batched)).to(x.dtype)
        return y if x.ndim == spatial + 2 else y[0]

    def _cosines(self, x: Tensor) -> Tensor:
        convolve, groups = CONV[len(self.kernel_size)], self.groups
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(x, self._reversed_padding_repeated_twice, mode=mode).unflatten(1, (groups, -1))  # (N, G, C / G, *S)
        if self.centered:
            # A constant changes no correlation (and carries no gradient), but a large one costs all digits of the sums below.
            mean = x.detach().unflatten(1, (groups, -1)).flatten(2).mean(2)  # (N, G)
            padded = padded - mean.view(*mean.shape, *[1] * (padded.ndim - 2))
        w = unit(wide(self.weight), tuple(range(1, self.weight.ndim)), self.centered, self.eps)
        dots = convolve(padded.flatten(1, 2), w, None, self.stride, 0, self.dilation, groups).unflatten(
            1, (groups, -1)
        )  # (N, G, O / G, *S)
        square = self._centred_squares(padded) if self.centered else self._over_patches(padded.square())
        y = dots * (square + self.eps).rsqrt().unsqueeze(2)
        return (y if self.scale is None else y * self.scale).flatten(1, 2)

    def _over_patches(self, x: Tensor) -> Tensor:
        """Sum over the channels of a group and the positions under the kernel: ``(N, G, C / G, *S)`` to ``(N, G, *out)``."""
        ones = x.new_ones(self.groups, 1, *self.kernel_size)
        return CONV[len(self.kernel_size)](x.sum(2), ones, None, self.stride, 0, self.dilation, self.groups)

    def _centred_squares(self, x: Tensor) -> Tensor:
        """Sum of squared deviations from the patch's mean, as a difference that float32 could not hold."""
        precise = x if x.device.type == "mps" else x.double()
        total, square = self._over_patches(precise), self._over_patches(precise.square())
        deviation = (square - total.square() / self.weight[0].numel()).clamp(min=0)
        # The dot product is rounded by about eps * sqrt(square): a patch that deviates by less than that has no direction left.
        return (deviation + (16 * torch.finfo(x.dtype).eps) ** 2 * square).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, centered={self.centered}, eps={self.eps}"


class CosineConv1d(_CosineConv):
    """Convolution that returns the cosine (or correlation) between every filter and every patch; see :class:`CosineLinear`.

    A patch is what a filter sees: the channels of its group under the kernel. Padding belongs to the patch: padded zeros count in the
    mean of the centred form, as an explicit unfolding would have it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype: those of
            :class:`torch.nn.Conv1d`. There is no bias.
        centered, eps, scale, learnable_scale: those of :class:`CosineLinear`.

    Shape: ``(N, C, *S)`` or ``(C, *S)``, as in :class:`torch.nn.Conv1d`, same dtype; half types are computed in float32.

    Raises:
        ValueError: as :class:`CosineLinear`, or an input of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        centered: bool = False,
        eps: float = 1e-8,
        scale: float | None = None,
        learnable_scale: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (_single(kernel_size), _single(stride), padding if isinstance(padding, str) else _single(padding), _single(dilation))
        super().__init__(in_channels, out_channels, sizes, groups, centered, eps, scale, learnable_scale, padding_mode, device, dtype)


class CosineConv2d(_CosineConv):
    """Convolution that returns the cosine (or correlation) between every filter and every patch; see :class:`CosineLinear`.

    A patch is what a filter sees: the channels of its group under the kernel. Padding belongs to the patch: padded zeros count in the
    mean of the centred form, as an explicit unfolding would have it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype: those of
            :class:`torch.nn.Conv2d`. There is no bias.
        centered, eps, scale, learnable_scale: those of :class:`CosineLinear`.

    Shape: ``(N, C, *S)`` or ``(C, *S)``, as in :class:`torch.nn.Conv2d`, same dtype; half types are computed in float32.

    Raises:
        ValueError: as :class:`CosineLinear`, or an input of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        centered: bool = False,
        eps: float = 1e-8,
        scale: float | None = None,
        learnable_scale: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (_pair(kernel_size), _pair(stride), padding if isinstance(padding, str) else _pair(padding), _pair(dilation))
        super().__init__(in_channels, out_channels, sizes, groups, centered, eps, scale, learnable_scale, padding_mode, device, dtype)


class CosineConv3d(_CosineConv):
    """Convolution that returns the cosine (or correlation) between every filter and every patch; see :class:`CosineLinear`.

    A patch is what a filter sees: the channels of its group under the kernel. Padding belongs to the patch: padded zeros count in the
    mean of the centred form, as an explicit unfolding would have it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype: those of
            :class:`torch.nn.Conv3d`. There is no bias.
        centered, eps, scale, learnable_scale: those of :class:`CosineLinear`.

    Shape: ``(N, C, *S)`` or ``(C, *S)``, as in :class:`torch.nn.Conv3d`, same dtype; half types are computed in float32.

    Raises:
        ValueError: as :class:`CosineLinear`, or an input of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        centered: bool = False,
        eps: float = 1e-8,
        scale: float | None = None,
        learnable_scale: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (_triple(kernel_size), _triple(stride), padding if isinstance(padding, str) else _triple(padding), _triple(dilation))
        super().__init__(in_channels, out_channels, sizes, groups, centered, eps, scale, learnable_scale, padding_mode, device, dtype)
