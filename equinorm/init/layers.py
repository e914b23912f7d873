"""Which layers are initialised, and their weights seen alike: per group, a map of ``in`` to ``out`` channels for each kernel position."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer: TypeAlias = nn.Linear | Convolution | Transposed

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)

Fan = Literal["fan_in", "fan_out", "fan_avg"]


def checked(caller: str, layer: nn.Module, name: str = "") -> Layer:
    """The layer, if it is one whose weight can be set.

    Raises:
        TypeError: not a linear or convolution layer.
        ValueError: its weight does not exist yet (lazy), or is recomputed before every forward from another parameter.
    """
    where = f" {name}" if name else ""
    if not isinstance(layer, LAYERS):
        raise TypeError(
            f"{caller}: the layer{where} must be Linear, Conv or ConvTranspose of 1 to 3 dimensions, got {type(layer).__name__}"
        )
    if parametrize.is_parametrized(layer, "weight"):
        return layer
    if "weight" not in layer._parameters:
        raise ValueError(
            f"{caller}: the weight of{where or ' the layer'} is computed by a hook (old-style weight or spectral norm) and cannot be set; "
            "initialise before adding the hook, or use torch.nn.utils.parametrizations"
        )
    if is_lazy(layer.weight):
        raise ValueError(f"{caller}: the weight of{where or ' the layer'} has no shape yet; run the model once before")
    return layer


def blocks(layer: Layer) -> Tensor:
    """A view of the weight as (groups, out channels per group, in channels per group, *kernel)."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return weight.unsqueeze(0)
    parts = weight.unflatten(0, (layer.groups, -1))
    return parts.transpose(1, 2) if isinstance(layer, TRANSPOSED) else parts


@torch.no_grad()
def assign(layer: Layer, values: Tensor) -> None:
    """Set the weight to ``values``, (groups, out per group, in per group, *kernel); of a parametrized one through its right inverse."""
    if isinstance(layer, TRANSPOSED):
        values = values.transpose(1, 2)
    weight = values.flatten(0, 1) if values.ndim > 2 and not isinstance(layer, nn.Linear) else values.squeeze(0)
    if parametrize.is_parametrized(layer, "weight"):
        layer.weight = weight.to(layer.weight.dtype)  # type: ignore[assignment]
    else:
        layer.weight.copy_(weight)


def identity_of(layer: Layer) -> int:
    """What tells whether two layers share their weight."""
    if parametrize.is_parametrized(layer, "weight"):
        return id(next(layer.parametrizations["weight"].parameters()))  # type: ignore[index]
    return id(layer.weight)


def fans(layer: Layer) -> tuple[float, float]:
    """How many weights an output is summed over, and how many outputs an input goes into.

    Groups and strides count: with groups an output sees the channels of its group only; an input of a convolution of stride s meets one
    in s^d kernel positions on average, and so does an output of a transposed one. Borders are not counted.

    Returns:
        fan in, fan out.

    Example:
        >>> from torch import nn
        >>> fans(nn.Conv2d(8, 16, 3, groups=4)), fans(nn.ConvTranspose2d(8, 16, 4, stride=2))
        ((18.0, 36.0), (32.0, 256.0))

    Source: torch.nn.init counts the fan out over all groups, takes a transposed convolution's fans for those of a convolution, and does not
    know strides. For a convolution without groups and stride both agree.
    """
    _, out, into, *kernel = blocks(layer).shape
    positions = math.prod(kernel)
    stride = 1 if isinstance(layer, nn.Linear) else math.prod(layer.stride)
    if isinstance(layer, TRANSPOSED):
        return into * positions / stride, float(out * positions)
    return float(into * positions), out * positions / stride
