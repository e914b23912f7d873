"""LayerScale: a residual branch times a learned factor per channel, small at the start."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import check_floating
from equinorm.facts import Facts, Paper


class LayerScale(nn.Module):
    r"""Multiply a residual branch by a learned factor per channel, small at the start.

    Formula:
        y = x + gamma * f(x),  gamma of shape (C,), 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond

    Use it when: a deep vision transformer or ConvNeXt does not train stably; behind every sublayer, before the sum.
    Not when: the network is shallow; the branches then start late for nothing.
    Known trouble: keep weight decay away from gamma. This module multiplies only; the sum is yours.

    Args:
        dim: C.
        init: value of every factor at the start.
        channel_dim: where the channels are, -1 for tokens (..., C), 1 for feature maps (N, C, *S).
        device, dtype: of the parameter.

    Shape: ``(..., C)`` or ``(N, C, *S)``, same out. Parameter: ``gamma`` (C,).

    Raises:
        TypeError: the input is not floating point.
        ValueError: ``dim`` below 1, or an input with another number of channels.

    Example:
        >>> import torch, equinorm
        >>> equinorm.LayerScale(2, init=0.1)(torch.tensor([1.0, 2.0])).detach()
        tensor([0.1000, 0.2000])

    Source: Touvron et al., 2021, arXiv:2103.17239, Eq. 4.
    """

    facts: ClassVar[Facts] = Facts(
        name="layer_scale",
        title="LayerScale",
        paper=Paper(
            authors="Touvron et al.",
            title="Going deeper with Image Transformers",
            year=2021,
            venue="ICCV",
            arxiv="2103.17239",
            equation="Eq. 4",
        ),
        family="residual",
        pools="",
        folds=True,
        invariances=frozenset({"per-sample", "per-channel"}),
        reads_writes="1R+1W",
    )

    def __init__(self, dim: int, init: float = 1e-5, channel_dim: int = -1, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"LayerScale: dim must be at least 1, got {dim}")
        self.dim, self.init, self.channel_dim = dim, init, channel_dim
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The module for ``channels`` channels of (N, C, *S), as the catalogue builds it."""
        return cls(channels, **{"channel_dim": 1, **options})

    def reset_parameters(self) -> None:
        """All factors back to their initial value."""
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        check_floating(self, x)
        if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.dim:
            wanted = {-1: f"(..., {self.dim})", 1: f"(N, {self.dim}, *S)"}.get(
                self.channel_dim, f"{self.dim} in dimension {self.channel_dim}"
            )
            raise ValueError(f"LayerScale: the input must have shape {wanted}, got {tuple(x.shape)}")
        trailing = x.ndim - 1 - self.channel_dim % x.ndim
        return (x * self.gamma.view(-1, *[1] * trailing)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, init={self.init}, channel_dim={self.channel_dim}"
