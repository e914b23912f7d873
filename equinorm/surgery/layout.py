"""Norms over the last dimension where channels stand second, and the reverse."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovedChannels(nn.Module):
    """Apply a norm to an input whose channels stand in another dimension than the norm takes them.

    :func:`~equinorm.surgery.swap` puts it where a norm over (N, C, *S) is replaced by one over (..., C), or the reverse.

    Args:
        norm: takes channels in dimension -1 if ``dim`` is 1, and in dimension 1 if ``dim`` is -1.
        dim: where the channels of the input stand: 1 or -1.

    Shape: that of the input.

    Raises:
        ValueError: ``dim`` is neither 1 nor -1.

    Example:
        >>> import torch, equinorm
        >>> from equinorm.surgery.layout import MovedChannels
        >>> MovedChannels(equinorm.LayerNorm(8), dim=1)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, norm: nn.Module, dim: int) -> None:
        super().__init__()
        if dim not in (1, -1):
            raise ValueError(f"MovedChannels: dim must be 1 for (N, C, *S) or -1 for (..., C), got {dim}")
        self.norm, self.dim = norm, dim

    def forward(self, x: Tensor) -> Tensor:
        # One position of one sample per row: whatever the rank, channels change places with the last dimension or the second.
        y = self.norm(x.movedim(self.dim, -self.dim))
        return torch.movedim(y, -self.dim, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
