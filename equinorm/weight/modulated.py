"""Weight modulation and demodulation: a convolution whose input channels a style scales, with the effect on the output's size undone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.equalized import EqualizedLinear
from equinorm.weight.units import wide

MODULATED = Facts(
    name="modulated",
    title="Weight Modulation and Demodulation",
    paper=Paper(
        authors="Karras et al.",
        title="Analyzing and Improving the Image Quality of StyleGAN",
        year=2019,
        venue="CVPR 2020",
        arxiv="1912.04958",
        equation="Eq. 1 and 3",
    ),
    family="weight",
    pools="W",
    invariances=frozenset({"weight-scale", "per-sample"}),
    reads_writes="2R+2W",
)


def resampling_filter(taps: tuple[float, ...]) -> Tensor:
    """The separable filter ``taps`` x ``taps`` with sum 1, ``(L, L)``."""
    f = torch.tensor(taps, dtype=torch.float32)
    f = f.outer(f)
    return f / f.sum()


def filtered(x: Tensor, f: Tensor, before: int, after: int) -> Tensor:
    """Each channel of zero-padded ``x`` convolved with ``f``; a negative padding crops."""
    x = F.pad(x, (before, after, before, after))
    return F.conv2d(x, f.flip(0, 1).to(x.dtype).expand(x.shape[1], 1, *f.shape), groups=x.shape[1])


def upsampled(x: Tensor, f: Tensor, factor: int, before: int, after: int) -> Tensor:
    """``factor - 1`` zeros after every pixel, zero padding, then ``f``."""
    size = [n * factor + before + after - f.shape[0] + 1 for n in x.shape[2:]]
    y = F.conv_transpose2d(x, f.to(x.dtype).expand(x.shape[1], 1, *f.shape), stride=factor, groups=x.shape[1])
    start = f.shape[0] - 1 - before
    y = F.pad(y, (0, max(0, start + size[1] - y.shape[3]), 0, max(0, start + size[0] - y.shape[2])))
    return y[:, :, start : start + size[0], start : start + size[1]]


def resampled_conv2d(x: Tensor, weight: Tensor, f: Tensor | None, up: int, down: int, groups: int) -> Tensor:
    """Convolution that keeps the size, between resampling by ``up`` or ``down``, in the cheapest order.

    With ``up``, the kernel is applied as a transposed convolution, which is a true convolution: published weights are stored so.
    """
    k = weight.shape[-1]
    if f is None or up == down == 1:
        return F.conv2d(x, weight, padding=k // 2, groups=groups)
    taps = f.shape[0]
    if down > 1:
        before, after = k // 2 + (taps - down + 1) // 2, k // 2 + (taps - down) // 2
        if k == 1:
            x = filtered(x, f, before, after)[:, :, ::down, ::down]
            return F.conv2d(x, weight, groups=groups)
        return F.conv2d(filtered(x, f, before, after), weight, stride=down, groups=groups)
    before, after = k // 2 + (taps + up - 1) // 2, k // 2 + (taps - up) // 2
    f = f * up**2  # the zeros in between carry no signal
    if k == 1:
        return upsampled(F.conv2d(x, weight, groups=groups), f, up, before, after)
    transposed = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (G * in, out, k, k)
    y = F.conv_transpose2d(x, transposed, stride=up, groups=groups)
    return filtered(y, f, before - (k - 1), after - (k - up))


@describes(MODULATED)
def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    demodulate: bool = True,
    eps: float = 1e-8,
    up: int = 1,
    down: int = 1,
    resample_filter: Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    r"""Convolve every sample with filters whose input channels its style scales, and divide by the length the filters then have.

    Formula:
        w'[n, o, i, k] = s[n, i] * w[o, i, k]
        y[n, o] = sum_i x[n, i] * w'[n, o, i] / sqrt(sum_{i, k} w'[n, o, i, k]^2 + eps)

        so that independent inputs of variance 1 give outputs of variance 1, whatever the style. See :class:`ModulatedConv2d`.

    Args:
        x: ``(N, in, H, W)``.
        weight: ``(out, in, k, k)``, k odd.
        styles: ``(N, in)``.
        demodulate: divide by the length.
        eps: added to the squared length.
        up, down: resampling factors; at most one differs from 1.
        resample_filter: ``(L, L)``, needed for resampling.
        fused: build one set of filters per sample and convolve in groups, instead of scaling input and output around one convolution.
            Both compute the same; the second is faster for more than one sample on most devices and needs less memory.

    Returns:
        ``(N, out, H * up / down, W * up / down)`` in the dtype of ``x``. For half types with ``demodulate``, weight and styles are first
        divided by their largest magnitudes, which cancels in the quotient and keeps the convolution in range.

    Raises:
        ValueError: shapes that do not belong together, an even kernel, both factors above 1, or resampling without filter.

    Example:
        >>> import torch, equinorm
        >>> x, styles = torch.randn(2, 64, 16, 16), 5 + torch.rand(2, 64)
        >>> round(equinorm.modulated_conv2d(x, torch.randn(32, 64, 1, 1), styles).std().item(), 1)
        1.0
    """
    _check(x, weight, styles, up, down, resample_filter)
    w, s = wide(weight), wide(styles)
    if demodulate and x.dtype in (torch.float16, torch.bfloat16):
        w = w / (w[0].numel() ** 0.5 * w.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12))
        s = s / s.abs().amax(1, keepdim=True).clamp(min=1e-12)
    d = (s.square() @ w.square().sum((2, 3)).T + eps).rsqrt() if demodulate else None  # (N, out)
    if not fused:
        y = resampled_conv2d(x * s.to(x.dtype)[:, :, None, None], w.to(x.dtype), resample_filter, up, down, 1)
        return y if d is None else y * d.to(x.dtype)[:, :, None, None]
    per_sample = w * s[:, None, :, None, None]  # (N, out, in, k, k)
    if d is not None:
        per_sample = per_sample * d[:, :, None, None, None]
    y = resampled_conv2d(x.flatten(0, 1)[None], per_sample.flatten(0, 1).to(x.dtype), resample_filter, up, down, len(x))
    return y[0].unflatten(0, (len(x), -1))


def _check(x: Tensor, weight: Tensor, styles: Tensor, up: int, down: int, f: Tensor | None) -> None:
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"modulated_conv2d: weight must have shape (out, in, k, k) with k odd, got {tuple(weight.shape)}")
    if x.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"modulated_conv2d: x must have shape (N, {weight.shape[1]}, H, W), got {tuple(x.shape)}")
    if styles.shape != x.shape[:2]:
        raise ValueError(f"modulated_conv2d: styles must have shape (N, in) = {tuple(x.shape[:2])}, got {tuple(styles.shape)}")
    if up < 1 or down < 1 or (up > 1 and down > 1):
        raise ValueError(f"modulated_conv2d: up and down must be at least 1 and not both above it, got up={up}, down={down}")
    if (up > 1 or down > 1) and (f is None or f.ndim != 2 or f.shape[0] != f.shape[1] or f.shape[0] < max(up, down)):
        came = None if f is None else tuple(f.shape)
        raise ValueError(f"modulated_conv2d: resampling needs resample_filter of shape (L, L) with L at least {max(up, down)}, got {came}")


class ModulatedConv2d(nn.Module):
    r"""Convolution whose input channels are scaled by a style, per sample, with the effect on the output's variance divided out.

    Formula:
        s = affine(style)
        w'[n, o, i, k] = s[n, i] * w[o, i, k],  w'' = w' / sqrt(sum_{i, k} w'^2 + eps),  y[n] = w''[n] * x[n]

        with a learned affine map of the style vector that starts around 1. Without ``demodulate`` the style is multiplied by
        1 / sqrt(fan_in) instead, as in the layers that produce colours.

    Use it when: a style controls a generator's feature maps: it replaces adaptive instance normalization without its droplet artifacts,
        because it normalizes expected instead of actual statistics.
    Not when: the statistics of the actual feature maps must be removed; it assumes inputs of equal variance that are not correlated.
    Known trouble: with ``fused`` the filters of a batch take N * out * in * k * k numbers. An upsampling layer leaves white noise with
        variance 25/64: the filter keeps the mean, not the noise power. A style of all zeros gives zeros.

    Args:
        in_channels, out_channels: sizes.
        kernel_size: odd; the padding keeps the size.
        style_dim: length of the style vector.
        demodulate: divide by the length of the filters.
        eps: added to their squared length.
        up, down: resampling factors; at most one differs from 1.
        resample_filter: taps of the separable low-pass filter for resampling.
        fused: build one set of filters per sample; see :func:`modulated_conv2d`.
        device, dtype: of the parameters.

    Shape: x ``(N, in, H, W)`` and style ``(N, style_dim)`` to ``(N, out, H * up / down, W * up / down)`` in the dtype of x.
    Parameters: ``weight`` (out, in, k, k), N(0, 1); ``affine.weight``, N(0, 1) with equalized learning rate; ``affine.bias``, 1.

    Raises:
        ValueError: an even kernel, both factors above 1, too few taps; an input or a style of another shape.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.ModulatedConv2d(8, 16, 3, style_dim=32, up=2)
        >>> layer(torch.randn(4, 8, 10, 10), torch.randn(4, 32)).shape
        torch.Size([4, 16, 20, 20])

    Source: Karras et al., 2019, arXiv:1912.04958, Eq. 1 and 3; pre-normalization for half types and resampling after the authors' code,
        whose kernels of upsampling layers are true convolutions while all others are correlations: weights load as they are. Widespread
        copies err: the sum in the root is of squares, not the square of the sum.
    """

    facts: ClassVar[Facts] = MODULATED
    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        demodulate: bool = True,
        eps: float = 1e-8,
        up: int = 1,
        down: int = 1,
        resample_filter: tuple[float, ...] = (1, 3, 3, 1),
        fused: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ModulatedConv2d: kernel_size must be odd, got {kernel_size}")
        if up < 1 or down < 1 or (up > 1 and down > 1):
            raise ValueError(f"ModulatedConv2d: up and down must be at least 1 and not both above it, got up={up}, down={down}")
        if len(resample_filter) < max(up, down):
            raise ValueError(f"ModulatedConv2d: resample_filter must have at least {max(up, down)} taps, got {len(resample_filter)}")
        if not eps > 0:
            raise ValueError(f"ModulatedConv2d: eps must be positive, got {eps}")
        self.in_channels, self.out_channels, self.style_dim = in_channels, out_channels, style_dim
        self.demodulate, self.eps, self.up, self.down, self.fused = demodulate, eps, up, down, fused
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size, device=device, dtype=dtype))
        self.affine = EqualizedLinear(style_dim, in_channels, bias_init=1.0, device=device, dtype=dtype)
        f = resampling_filter(resample_filter).to(self.weight.device) if max(up, down) > 1 else None
        self.register_buffer("resample_filter", f, persistent=False)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        if style.ndim != 2 or style.shape != (len(x), self.style_dim):
            raise ValueError(
                f"ModulatedConv2d: style must have shape (N, style_dim) = {(len(x), self.style_dim)}, got {tuple(style.shape)}"
            )
        styles = self.affine(style)
        if not self.demodulate:
            styles = styles * self.weight[0].numel() ** -0.5
        return modulated_conv2d(x, self.weight, styles, self.demodulate, self.eps, self.up, self.down, self.resample_filter, self.fused)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.weight.shape[-1]}, style_dim={self.style_dim}, "
            f"demodulate={self.demodulate}, up={self.up}, down={self.down}, fused={self.fused}"
        )
