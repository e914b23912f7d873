"""Local contrast normalization, and its two halves: the subtractive and the divisive norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import check_count, check_floating
from equinorm.core.channel import canonical_mask
from equinorm.core.window import box, gaussian, window_sum
from equinorm.facts import Facts, Paper
from equinorm.kernels.reference import wide

Taps = tuple[tuple[float, ...], ...]  # one window per spatial dimension

JARRETT = Paper(
    authors="Jarrett et al.",
    title="What is the Best Multi-Stage Architecture for Object Recognition?",
    year=2009,
    venue="ICCV",
    equation="section 2.1",
)


def local_mean(x: Tensor, taps: Taps, across_channels: bool, mask: Tensor | None) -> Tensor:
    """Weighted mean of x in the window around each position, over those positions that exist: (N, 1 | C, *S)."""
    weight = x.new_ones(1, 1, *x.shape[2:]) if mask is None else mask.to(x.dtype)
    x = x.mean(1, keepdim=True) if across_channels else x
    for dim, window in enumerate(taps, 2):
        x, weight = window_sum(x, window, dim), window_sum(weight, window, dim)
    return x / torch.where(weight > 0, weight, 1)


def subtract_mean(x: Tensor, taps: Taps, across_channels: bool, mask: Tensor | None) -> Tensor:
    """X minus its local mean."""
    # A constant changes nothing here but the rounding: what float32 sums of large values would lose is subtracted first.
    over = tuple(range(1 if across_channels else 2, x.ndim))
    data = x.detach()
    if mask is None:
        offset = data.mean(over, keepdim=True)
    else:
        held = mask.expand_as(data).sum(over, keepdim=True).clamp(min=1)
        offset = data.sum(over, keepdim=True) / held  # what is masked is 0 already
    x = x - offset
    if mask is not None:
        x = torch.where(mask, x, 0)
    return x - local_mean(x, taps, across_channels, mask)


def divide_deviation(
    v: Tensor, taps: Taps, across_channels: bool, mask: Tensor | None, threshold: float | Literal["mean"], eps: float, detach: bool
) -> Tensor:
    """V divided by its local root mean square where that exceeds a threshold, and by the threshold elsewhere."""
    square = local_mean(v.square(), taps, across_channels, mask)
    flat = square == 0
    sigma = torch.where(flat, 1, square).sqrt() * ~flat  # (N, 1 | C, *S), with derivative 0 where all is flat
    if threshold != "mean":
        return v / sigma.clamp(min=threshold)
    spatial = tuple(range(2, v.ndim))
    if mask is None:
        c = sigma.mean(spatial, keepdim=True)
    else:
        c = torch.where(mask, sigma, 0).sum(spatial, keepdim=True) / mask.sum(spatial, keepdim=True).clamp(min=1)
    c = c.detach() if detach else c
    return v / torch.maximum(sigma, c.clamp(min=eps))


class _WindowNorm(nn.Module):
    """Abstract norm over windows of positions.

    Attributes:
        kernel_size: length of the window along each spatial dimension, or one for all.
        sigma: width of its Gaussian; None for a uniform window.
        across_channels: whether all channels share one mean and deviation.
    """

    facts: ClassVar[Facts]

    def __init__(self, kernel_size: int | Sequence[int], sigma: float | None, across_channels: bool) -> None:
        super().__init__()
        sizes = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        for size in sizes or (0,):
            check_count(self, kernel_size=size)
            if size % 2 == 0:
                raise ValueError(f"{type(self).__name__}: kernel_size must be odd, so that a window has a centre; got {kernel_size}")
        if sigma is not None and not 0 < sigma < float("inf"):
            raise ValueError(f"{type(self).__name__}: sigma must be finite and positive, or None for a uniform window; got {sigma}")
        self.kernel_size = kernel_size if isinstance(kernel_size, int) else sizes
        self.sigma, self.across_channels = sigma, across_channels

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm with its default settings, for any number of channels."""
        return cls(**options)

    def prepare(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Taps, Tensor | None]:
        """The input in the type of the arithmetic, with zeros where it is masked; the windows; the mask as (N, 1, *S).

        Raises:
            TypeError: not floating point.
            ValueError: no spatial dimensions, or another number of them than ``kernel_size`` has; a mask of another shape.
        """
        check_floating(self, x)
        spatial = x.ndim - 2
        wanted = "at least one spatial dimension" if isinstance(self.kernel_size, int) else f"{len(self.kernel_size)} spatial dimensions"
        if spatial < 1 or (not isinstance(self.kernel_size, int) and len(self.kernel_size) != spatial):
            raise ValueError(f"{type(self).__name__}: the input must have shape (N, C, *spatial) with {wanted}, got {tuple(x.shape)}")
        sizes = (self.kernel_size,) * spatial if isinstance(self.kernel_size, int) else self.kernel_size
        taps = tuple(box(size) if self.sigma is None else gaussian(size, self.sigma) for size in sizes)
        if mask is None:
            return wide(x), taps, None
        mask = canonical_mask(x, mask)
        return torch.where(mask, wide(x), 0), taps, mask

    def finish(self, y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The result in the type of the input, 0 where it is masked."""
        return (y if mask is None else torch.where(mask, y, 0)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, sigma={self.sigma}, across_channels={self.across_channels}"


class LocalContrastNorm(_WindowNorm):
    """Remove the local mean and divide by the local standard deviation, over a window of positions and all channels.

    Formula:
        v = x - sum_cp w_p x_c(. + p), sigma = sqrt(sum_cp w_p v_c(. + p)^2), y = v / max(sigma, c), c = the mean of sigma over the
        positions of the sample.

        w is a Gaussian window (or a uniform one) whose sum over positions and channels is 1; at the border it is divided by the sum of
        the part that lies inside, for the mean and, inside the root, for the deviation. One mean and one sigma serve all channels.

    Use it when: images of uneven lighting are prepared, or an early layer should see contrast rather than brightness.
    Not when: absolute brightness or the size of activations carries information.
    Known trouble: flat regions are divided by c, not by their own small deviation; a flat image comes out as 0. Implementations differ in
        the window, the border and the threshold: see the options.

    Args:
        kernel_size: length of the window, odd; one for all spatial dimensions or one for each. It may exceed the input.
        sigma: width of the Gaussian in positions; None for a uniform window (Torch7's default).
        eps: floor of the threshold c.
        threshold: "mean" for c, or a positive constant in its place (Torch7: 1e-4).
        across_channels: False gives every channel its own mean, sigma and c.
        detach_threshold: stop gradients into c.

    Shape:
        x: (N, C, *S) with at least one spatial dimension, to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data
        is; the rest is treated as lying beyond the border and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: another number of spatial dimensions, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> x = torch.zeros(1, 1, 5, 5)
        >>> x[0, 0, 2, 2] = 1.0
        >>> equinorm.LocalContrastNorm(3, sigma=None)(x)[0, 0, 2, 2]
        tensor(2.8284)

    Source: Jarrett et al. 2009, section 2.1, after Pinto, Cox and DiCarlo 2008. Torch7 divides the deviation at the border by the part of
    the window inside instead of its root, which doubles it in corners, and takes a constant threshold; widespread copies take c over the
    batch. Here c is per sample, as in the paper, and the border is divided out inside the root.
    """

    facts: ClassVar[Facts] = Facts(
        name="local_contrast",
        title="Local Contrast Normalization (LCN)",
        paper=JARRETT,
        family="local",
        pools="CK",
        invariances=frozenset({"shift", "scale", "per-sample"}),
        one_position="standardizes the channels of the one position",
        reads_writes="3R+2W",
    )

    def __init__(
        self,
        kernel_size: int | Sequence[int] = 9,
        sigma: float | None = 2.0,
        eps: float = 1e-4,
        threshold: float | Literal["mean"] = "mean",
        across_channels: bool = True,
        detach_threshold: bool = False,
    ) -> None:
        super().__init__(kernel_size, sigma, across_channels)
        _check_threshold(self, eps, threshold)
        self.eps, self.detach_threshold = eps, detach_threshold
        self.threshold: float | Literal["mean"] = threshold

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        data, taps, mask = self.prepare(x, mask)
        v = subtract_mean(data, taps, self.across_channels, mask)
        if mask is not None:
            v = torch.where(mask, v, 0)
        y = divide_deviation(v, taps, self.across_channels, mask, self.threshold, self.eps, self.detach_threshold)
        return self.finish(y, x, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, threshold={self.threshold}"


class SubtractiveNorm(_WindowNorm):
    """Remove the local mean over a window of positions and all channels: the first half of local contrast normalization.

    Formula:
        y = x - sum_cp w_p x_c(. + p), with the window of :class:`LocalContrastNorm`.

    Use it when: brightness varies slowly over an image and contrast is to be kept as it is.
    Not when: contrast must be equal everywhere too.
    Known trouble: what remains has the sign of an edge on each side of it, which the next layer must cope with.

    Args:
        kernel_size: length of the window, odd; one for all spatial dimensions or one for each. It may exceed the input.
        sigma: width of the Gaussian in positions; None for a uniform window.
        across_channels: False gives every channel its own mean.

    Shape:
        x: (N, C, *S) with at least one spatial dimension, to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data
        is; the rest is treated as lying beyond the border and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: another number of spatial dimensions, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.SubtractiveNorm(3, sigma=None)(torch.tensor([[[0.0, 3.0, 0.0]]]))
        tensor([[[-1.5000,  2.0000, -1.5000]]])

    Source: Jarrett et al. 2009, section 2.1; the division at the border is Torch7's.
    """

    facts: ClassVar[Facts] = Facts(
        name="subtractive",
        title="Subtractive Normalization",
        paper=JARRETT,
        family="local",
        pools="CK",
        invariances=frozenset({"shift", "per-sample"}),
        one_position="centres the channels of the one position",
        reads_writes="2R+1W",
    )

    def __init__(self, kernel_size: int | Sequence[int] = 9, sigma: float | None = 2.0, across_channels: bool = True) -> None:
        super().__init__(kernel_size, sigma, across_channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        data, taps, mask = self.prepare(x, mask)
        return self.finish(subtract_mean(data, taps, self.across_channels, mask), x, mask)


class DivisiveNorm(_WindowNorm):
    """Divide by the local root mean square over a window of positions and all channels: the second half of local contrast normalization.

    Formula:
        y = x / max(sigma, c), sigma = sqrt(sum_cp w_p x_c(. + p)^2), c = the mean of sigma over the positions of the sample; window and
        border as in :class:`LocalContrastNorm`.

    Use it when: the input is centred already (an edge map, a subtractive norm with another window) and contrast is to be evened out.
    Not when: the local mean is large: it would dominate sigma.
    Known trouble: flat regions are divided by c, not by their own small deviation.

    Args:
        kernel_size: length of the window, odd; one for all spatial dimensions or one for each. It may exceed the input.
        sigma: width of the Gaussian in positions; None for a uniform window.
        eps: floor of the threshold c.
        threshold: "mean" for c, or a positive constant in its place.
        across_channels: False gives every channel its own sigma and c.
        detach_threshold: stop gradients into c.

    Shape:
        x: (N, C, *S) with at least one spatial dimension, to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data
        is; the rest is treated as lying beyond the border and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: another number of spatial dimensions, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.DivisiveNorm(1, threshold=2.0)(torch.tensor([[[1.0, -2.0, 6.0]]]))
        tensor([[[ 0.5000, -1.0000,  1.0000]]])

    Source: Jarrett et al. 2009, section 2.1. Torch7 takes the constant threshold 1e-4 and over-estimates sigma at the border.
    """

    facts: ClassVar[Facts] = Facts(
        name="divisive",
        title="Divisive Normalization",
        paper=JARRETT,
        family="local",
        pools="CK",
        invariances=frozenset({"scale", "per-sample"}),
        one_position="divides by the root mean square of the channels of the one position",
        reads_writes="2R+1W",
    )

    def __init__(
        self,
        kernel_size: int | Sequence[int] = 9,
        sigma: float | None = 2.0,
        eps: float = 1e-4,
        threshold: float | Literal["mean"] = "mean",
        across_channels: bool = True,
        detach_threshold: bool = False,
    ) -> None:
        super().__init__(kernel_size, sigma, across_channels)
        _check_threshold(self, eps, threshold)
        self.eps, self.detach_threshold = eps, detach_threshold
        self.threshold: float | Literal["mean"] = threshold

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        data, taps, mask = self.prepare(x, mask)
        y = divide_deviation(data, taps, self.across_channels, mask, self.threshold, self.eps, self.detach_threshold)
        return self.finish(y, x, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, threshold={self.threshold}"


def _check_threshold(module: nn.Module, eps: float, threshold: float | str) -> None:
    if not 0 < eps < float("inf"):
        raise ValueError(f"{type(module).__name__}: eps must be finite and positive, it is what flat inputs are divided by; got {eps}")
    if (isinstance(threshold, str) and threshold != "mean") or (not isinstance(threshold, str) and not 0 < threshold < float("inf")):
        raise ValueError(f'{type(module).__name__}: threshold must be "mean" or a finite positive number, got {threshold!r}')
