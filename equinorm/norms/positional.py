"""Positional normalization, and the shortcuts that bring the removed moments back."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import check_count, check_eps, check_floating
from equinorm.core.position import position_norm
from equinorm.core.row import row_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl, reference


class PositionalNorm(nn.Module):
    """Standardize the features at each position over the channels, and hand out the moments that this removes.

    Formula:
        y = (x - mean) / std, std = sqrt(var + eps), with mean and var over the channels at each position of each sample. A moment shortcut
        further up computes y' = z * std + mean of its own input z.

    Use it when: a generator (image translation, U-Net) encodes structure that its decoder needs again: the moments at each position are an
        image of it, which :class:`MomentShortcut` or :class:`DynamicMomentShortcut` injects there.
    Not when: there are few channels, so that a position's moments are all that it has.
    Known trouble: with one channel the output is 0. The shortcut needs the spatial size that the moments have. The authors place it right
        behind a convolution and in front of batch or instance norm.

    Args:
        eps: added to the variance inside the root.
        unbiased: divide the squares by C - 1: the authors' PyTorch code, for weights trained with it.
        return_moments: False returns y alone, as other norms do (so does the catalogue's ``create``).

    Shape:
        x: (N, C, *S) to y of the same shape and dtype, mean and std of shape (N, 1, *S) and that dtype. Gradients flow through all three.

    Raises:
        TypeError: the input is not floating point.
        ValueError: fewer than two dimensions, one channel with ``unbiased``, or eps out of range.

    Example:
        >>> import torch, equinorm
        >>> y, mean, std = equinorm.PositionalNorm(eps=0.0)(torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
        >>> y, mean, std
        (tensor([[-1.0690, -0.5345,  0.0000,  1.6036]]), tensor([[3.]]), tensor([[1.8708]]))

    Source: Li et al. 2019, section 3. The authors' PyTorch file divides by C - 1, their TensorFlow file by C, as the paper does; so does
    this by default.
    """

    facts: ClassVar[Facts] = Facts(
        name="positional",
        title="Positional Normalization (PONO)",
        paper=Paper(
            authors="Li et al.",
            title="Positional Normalization",
            year=2019,
            venue="NeurIPS",
            arxiv="1907.04312",
            equation="section 3",
        ),
        family="sample",
        pools="C",
        invariances=frozenset({"shift", "scale", "per-sample"}),
        one_position="standardizes the features of the one position",
        reads_writes="2R+1W",
    )

    def __init__(self, eps: float = 1e-5, unbiased: bool = False, *, return_moments: bool = True) -> None:
        super().__init__()
        check_eps(self, eps)
        self.eps, self.unbiased, self.return_moments = eps, unbiased, return_moments

    @classmethod
    def for_channels(cls, channels: int, *, return_moments: bool = False, **options: Any) -> Self:
        """Positional norm for any number of channels that returns its output alone."""
        return cls(return_moments=return_moments, **options)

    def forward(self, x: Tensor, *, impl: Impl = "auto") -> Tensor | tuple[Tensor, Tensor, Tensor]:
        check_floating(self, x)
        if x.ndim < 2:
            raise ValueError(f"PositionalNorm: the input must have shape (N, C, *spatial), got {tuple(x.shape)}")
        if self.unbiased and x.shape[1] < 2:
            raise ValueError("PositionalNorm: an unbiased variance over the channels needs at least two, got one; use unbiased=False")
        if self.return_moments or self.unbiased:
            y, mean, std = self._standardized(x)
            return (y, mean, std) if self.return_moments else y
        rows = x.movedim(1, -1)
        if rows.is_contiguous():
            return row_norm(rows, 1, None, None, self.eps, impl=impl).movedim(-1, 1)
        return position_norm(x, lambda x: self._standardized(x)[0], 1, self.eps, centered=True, impl=impl)

    def _standardized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, var, _ = reference.moments(x, (1,))  # (N, 1, *S)
        std = (var * (x.shape[1] / (x.shape[1] - 1) if self.unbiased else 1) + self.eps).sqrt()
        return reference.affine(x, mean, 1 / std, mean.new_zeros(())), mean.to(x.dtype), std.to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}" + ", unbiased=True" * self.unbiased + ", return_moments=False" * (not self.return_moments)


class MomentShortcut(nn.Module):
    """Give a decoder's features the moments that a :class:`PositionalNorm` removed in the encoder: y = x * std + mean.

    Args:
        detach: stop gradients into the moments.

    Shape:
        x: (N, C, *S), mean and std: (N, 1, *S) or (N, C, *S), to the shape and dtype of x. Nothing is changed in place.

    Raises:
        TypeError: x is not floating point.
        ValueError: moments of another shape.

    Example:
        >>> import torch, equinorm
        >>> x = torch.randn(2, 8, 5, 5)
        >>> torch.allclose(equinorm.MomentShortcut()(*equinorm.PositionalNorm()(x)), x, atol=1e-6)
        True

    Source: Li et al. 2019 (arXiv:1907.04312).
    """

    def __init__(self, detach: bool = False) -> None:
        super().__init__()
        self.detach = detach

    def forward(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        check_floating(self, x)
        _check_moments(self, x, mean, std, channels=(1, *x.shape[1:2]))
        if self.detach:
            mean, std = mean.detach(), std.detach()
        return (reference.wide(x) * reference.wide(std) + reference.wide(mean)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"detach={self.detach}"


class DynamicMomentShortcut(nn.Module):
    """A moment shortcut whose shift and scale a small convolutional network makes of the moments.

    Formula:
        y = x * gamma + beta, (beta, gamma) = (mean, std) + conv(relu(conv(mean, std)))

        The second convolution starts at 0, so that the layer starts as :class:`MomentShortcut`.

    Args:
        channels: of beta and gamma: 1 for one pair per position, or the channels of x for one per feature.
        hidden_channels: between the two convolutions.
        kernel_size: of both, odd; the borders are padded with zeros.
        spatial_dims: 1, 2 or 3.
        detach: stop gradients into the moments.
        device, dtype: of the convolutions.

    Shape:
        x: (N, C, *S), mean and std: (N, 1, *S), to the shape and dtype of x.

    Raises:
        TypeError: x is not floating point.
        ValueError: moments of another shape, x with another number of dimensions or channels, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> y, mean, std = equinorm.PositionalNorm()(torch.randn(2, 8, 5, 5))
        >>> equinorm.DynamicMomentShortcut(channels=4)(torch.randn(2, 4, 5, 5), mean, std).shape
        torch.Size([2, 4, 5, 5])

    Source: Li et al. 2019 (arXiv:1907.04312). The authors suggest a small network and published none; two convolutions around the static
    shortcut, starting from it, are ours.
    """

    def __init__(
        self,
        channels: int = 1,
        hidden_channels: int = 16,
        kernel_size: int = 3,
        spatial_dims: int = 2,
        detach: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(self, channels=channels, hidden_channels=hidden_channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"DynamicMomentShortcut: kernel_size must be odd, got {kernel_size}")
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(spatial_dims)
        if conv is None:
            raise ValueError(f"DynamicMomentShortcut: spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        self.channels, self.spatial_dims, self.detach = channels, spatial_dims, detach
        where = {"padding": kernel_size // 2, "device": device, "dtype": dtype}
        self.hidden = conv(2, hidden_channels, kernel_size, **where)
        self.change = conv(hidden_channels, 2 * channels, kernel_size, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The static shortcut: the second convolution is 0."""
        self.hidden.reset_parameters()
        for parameter in self.change.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        check_floating(self, x)
        if x.ndim != 2 + self.spatial_dims or self.channels not in (1, x.shape[1]):
            raise ValueError(
                f"DynamicMomentShortcut: the input must have shape (N, C, *spatial) with {self.spatial_dims} spatial dimensions"
                + (f" and {self.channels} channels" if self.channels > 1 else "")
                + f", got {tuple(x.shape)}"
            )
        _check_moments(self, x, mean, std, channels=(1,))
        if self.detach:
            mean, std = mean.detach(), std.detach()
        moments = torch.cat((mean, std), 1).to(self.hidden.weight.dtype)
        to_mean, to_std = self.change(self.hidden(moments).relu()).chunk(2, 1)
        beta, gamma = reference.wide(mean) + to_mean, reference.wide(std) + to_std
        return (reference.wide(x) * gamma + beta).to(x.dtype)

    def extra_repr(self) -> str:
        return f"detach={self.detach}"


def _check_moments(module: nn.Module, x: Tensor, *moments: Tensor, channels: tuple[int, ...]) -> None:
    for name, value in zip(("mean", "std"), moments, strict=True):
        if value.shape[:1] + value.shape[2:] != x.shape[:1] + x.shape[2:] or value.ndim != x.ndim or value.shape[1] not in channels:
            raise ValueError(
                f"{type(module).__name__}: {name} must have shape {(x.shape[0], 1, *x.shape[2:])} for the input {tuple(x.shape)}, got "
                f"{tuple(value.shape)}; moments of another resolution are brought to that of the input first, as by interpolate()"
            )
