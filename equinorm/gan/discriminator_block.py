"""The residual block of StyleGAN2's discriminator, whose sum is divided by sqrt(2)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts, Paper
from equinorm.residual.scaling import variance_preserving_sum
from equinorm.weight.equalized import EqualizedConv2d
from equinorm.weight.modulated import resampled_conv2d, resampling_filter

GAIN = math.sqrt(2)  # of the leaky relu with slope 0.2, as published; it keeps the second moment up to a factor 1.04


class DiscriminatorBlock(nn.Module):
    r"""Two convolutions beside a 1x1 skip, both halving the resolution, and their sum over sqrt(2).

    Formula:
        h = act(conv0(x));  branch = act(down(conv1(h)));  y = (branch + down(skip(x))) / sqrt(2),  act(x) = sqrt(2) leaky_relu(x + b, 0.2)

        Why 1 / sqrt(2): branch and skip are uncorrelated at the start and of equal variance, so that their sum has twice the variance.
        Without the factor the signal, and with it the gradient, doubles its variance in every block. sqrt(2) in the activation makes up
        for what the leaky relu takes away, and the equalized learning rate divides every weight by sqrt(fan_in).

    Use it when: building a discriminator after StyleGAN2, or any residual network of uncorrelated branches without norms.
    Not when: skip and branch are correlated; the factor then leaves a variance above 1, up to 2 for equal branches.
    Known trouble: the low-pass filter keeps the mean of its input and not the power of white noise: inputs that vary from pixel to pixel
        come out weaker.

    Args:
        in_channels, out_channels: sizes; conv0 keeps the number of channels.
        resample_filter: taps of the separable low-pass filter.
        conv_clamp: clamp activations to this magnitude (256 with half types), or None.
        device, dtype: of the parameters.

    Shape: ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 2, W / 2)``, with even H and W.
    Parameters: ``conv0.weight``, ``conv0.bias``, ``conv1.weight``, ``conv1.bias``, ``skip.weight``, named as in the authors' code;
        weights N(0, 1), biases 0.

    Raises:
        ValueError: another number of channels, an odd size, or a clamp that is not positive.

    Example:
        >>> import torch, equinorm
        >>> equinorm.DiscriminatorBlock(8, 16)(torch.randn(2, 8, 32, 32)).shape
        torch.Size([2, 16, 16, 16])

    Source: Karras et al., 2019, arXiv:1912.04958, section 4.1 and figure 7. The authors' code multiplies skip and branch by sqrt(1/2)
        each, which is the same.
    """

    facts: ClassVar[Facts] = Facts(
        name="discriminator_block",
        title="StyleGAN2 Discriminator Block",
        paper=Paper(
            authors="Karras et al.",
            title="Analyzing and Improving the Image Quality of StyleGAN",
            year=2019,
            venue="CVPR 2020",
            arxiv="1912.04958",
            equation="section 4.1",
        ),
        family="gan",
        pools="",
        invariances=frozenset({"per-sample"}),
        reads_writes="4R+4W",
    )
    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resample_filter: tuple[float, ...] = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if conv_clamp is not None and not conv_clamp > 0:
            raise ValueError(f"DiscriminatorBlock: conv_clamp must be positive or None, got {conv_clamp}")
        self.in_channels, self.out_channels, self.conv_clamp = in_channels, out_channels, conv_clamp
        options = {"device": device, "dtype": dtype}
        self.conv0 = EqualizedConv2d(in_channels, in_channels, 3, padding=1, **options)
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, **options)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, bias=False, **options)
        self.register_buffer("resample_filter", resampling_filter(resample_filter).to(self.conv0.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"DiscriminatorBlock: the input must have shape (N, {self.in_channels}, H, W) with even H and W, got {tuple(x.shape)}"
            )
        skip = self._down(x, self.skip)
        branch = self._activate(self._down(self._activate(self.conv0(x)), self.conv1) + self.conv1.bias.view(-1, 1, 1))  # type: ignore[union-attr]
        return variance_preserving_sum(branch, skip)

    def _down(self, x: Tensor, conv: EqualizedConv2d) -> Tensor:
        return resampled_conv2d(x, conv.weight * conv.weight_scale, self.resample_filter, 1, 2, 1)

    def _activate(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(x, 0.2) * GAIN
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, conv_clamp={self.conv_clamp}"
