"""What norms over (N, C, *S) share: parameters, checks of the input, and the way the catalogue builds them."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.facts import Facts


def check_eps(module: nn.Module, eps: float, name: str = "eps") -> None:
    """Raises ValueError unless ``eps`` is a finite number of at least 0."""
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{type(module).__name__}: {name} must be a finite number of at least 0, got {eps}")


def check_count(module: nn.Module, **counts: int) -> None:
    """Raises ValueError unless every named count is an integer of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{type(module).__name__}: {name} must be an integer of at least 1, got {count!r}")


def check_momentum(module: nn.Module, momentum: float | None) -> None:
    """Raises ValueError unless ``momentum`` is None or a number in [0, 1]."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"{type(module).__name__}: momentum is the weight of the new value and must be in [0, 1], or None for the plain average; "
            f"got {momentum}"
        )


def check_fraction(module: nn.Module, **fractions: float) -> None:
    """Raises ValueError unless every named number is in [0, 1]."""
    for name, fraction in fractions.items():
        if not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise ValueError(f"{type(module).__name__}: {name} must be a number in [0, 1], got {fraction!r}")


def check_floating(module: nn.Module, x: Tensor) -> None:
    """Raises TypeError unless ``x`` holds floating-point numbers."""
    if not x.is_floating_point():
        raise TypeError(f"{type(module).__name__}: the input must be floating point, got {x.dtype}; convert it first, as in x.float()")


def check_channels(module: nn.Module, x: Tensor, channels: int, *, spatial: int = 0) -> None:
    """Check an input of shape (N, C, *S).

    Raises:
        TypeError: not floating point.
        ValueError: fewer than two dimensions, another number of channels, or fewer than ``spatial`` spatial dimensions.
    """
    check_floating(module, x)
    name, shape = type(module).__name__, tuple(x.shape)
    if x.ndim < 2 or x.shape[1] != channels:
        came = f"{x.shape[1]} channels" if x.ndim >= 2 else f"{x.ndim} dimension" + "s" * (x.ndim != 1)
        raise ValueError(
            f"{name}: the input must have shape (N, {channels}, *spatial), got {shape}: {came} where {channels} channels must be"
        )
    if x.ndim < 2 + spatial:
        raise ValueError(
            f"{name}: statistics are taken over the positions of each channel, so the input must have shape (N, {channels}, *spatial) with "
            f"at least one spatial dimension, got {shape}; use LayerNorm or GroupNorm for features without positions"
        )


def check_trailing(module: nn.Module, x: Tensor, shape: tuple[int, ...], mask: Tensor | None) -> None:
    """Check an input of shape (..., *shape) and its mask.

    Raises:
        TypeError: not floating point.
        ValueError: another trailing shape; a mask that is not boolean or does not broadcast to the input.
    """
    check_floating(module, x)
    name = type(module).__name__
    if x.shape[x.ndim - len(shape) :] != tuple(shape) or x.ndim < len(shape):
        raise ValueError(f"{name}: the input must have shape (..., {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}: mask must be boolean (True where data is), got {mask.dtype}; compare it first, as in `mask > 0`")
        sizes = (1,) * (x.ndim - mask.ndim) + tuple(mask.shape)
        if len(sizes) != x.ndim or any(m not in (1, n) for m, n in zip(sizes, x.shape, strict=True)):
            raise ValueError(
                f"{name}: mask must broadcast to the input {tuple(x.shape)}, as (N, T, 1) for padded tokens; got {tuple(mask.shape)}"
            )


def check_batch(module: nn.Module, x: Tensor) -> None:
    """Raises ValueError if a channel of ``x`` (N, C, *S) holds exactly one value: it has no variance to train on."""
    if x.numel() == x.shape[1] and x.numel():
        raise ValueError(
            f"{type(module).__name__}: training needs more than one value per channel to have a variance, got shape {tuple(x.shape)}; "
            "use a larger batch (drop_last=True drops a last batch of one), eval(), or a norm within the sample such as GroupNorm"
        )


def accept_published_shapes(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Reshape entries of ``state_dict`` that published code stores as (1, C, 1, 1), say, for what is one number per channel here."""
    for name, mine in (*module._parameters.items(), *module._buffers.items()):
        theirs = state_dict.get(prefix + name)
        if mine is not None and theirs is not None and theirs.shape != mine.shape and theirs.numel() == mine.numel() == max(theirs.shape):
            state_dict[prefix + name] = theirs.reshape(mine.shape)


class ChannelNorm(nn.Module):
    """Abstract norm over (N, C, *S) with a per-channel weight and bias.

    Attributes:
        facts: what the method says about itself.
        num_features: C.
        eps: added to variances inside the root.
        affine: whether ``weight`` (ones) and ``bias`` (zeros), both (C,), exist; None otherwise.
    """

    facts: ClassVar[Facts]
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, eps: float, affine: bool, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        check_count(self, num_features=num_features)
        check_eps(self, eps)
        self.num_features, self.eps, self.affine = num_features, eps, affine
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None)

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm for ``channels`` channels with its default settings, as the catalogue builds it."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        accept_published_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"
