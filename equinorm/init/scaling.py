"""Independent weights whose variance is a gain over a fan: He, Xavier, LeCun."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from equinorm.init.layers import Fan, Layer, assign, blocks, checked, fans
from equinorm.kernels.activations import find

What = str | nn.Module | Callable[[Tensor], Tensor]
Distribution = Literal["normal", "uniform", "truncated_normal"]

# A normal distribution cut at two standard deviations has this standard deviation itself.
TRUNCATED = 0.879625661034


def gain(activation: What, fan: Fan = "fan_in") -> float:
    r"""The gain of weights beside an activation: their standard deviation is gain / sqrt(fan).

    Formula:
        fan_in: 1 / sqrt(E[f(z)^2]);  fan_out: 1 / sqrt(E[f'(z)^2]);  fan_avg: the root of the mean of their squares

        z is standard normal. The first keeps the mean square of the signal through activation and layer, the second that of the gradient.

    Args:
        activation: a name of ``torch.nn.functional``, a module, or an elementwise function.
        fan: which of the two directions, or both.

    Raises:
        ValueError: unknown name; not elementwise, constant or not finite.

    Example:
        >>> import equinorm
        >>> [round(equinorm.init.gain(name), 4) for name in ("relu", "gelu", "tanh", "selu")]
        [1.4142, 1.5335, 1.5925, 1.0]

    Source: He et al., 2015, arXiv:1502.01852, section 2.2, there for relu; here integrated for any function. torch's ``calculate_gain`` has
    5/3 for tanh and 3/4 for selu, which keep no mean square.
    """
    f = find(activation)
    if fan == "fan_in":
        return f.gain
    if fan == "fan_out":
        return f.backward_gain
    if fan == "fan_avg":
        return math.sqrt((f.gain**2 + f.backward_gain**2) / 2)
    raise ValueError(f"gain: fan must be fan_in, fan_out or fan_avg, got {fan!r}")


def he_(
    layer: nn.Module,
    activation: What = "relu",
    *,
    fan: Fan = "fan_in",
    distribution: Distribution = "normal",
    generator: torch.Generator | None = None,
) -> None:
    r"""He's (Kaiming's) initialisation: variance gain^2 / fan, so that the signal keeps its mean square; bias 0.

    Known trouble: the gain holds for a signal of mean square 1. Where E[z f(z) f'(z)] / E[f(z)^2] is above 1 (mish 1.08, gelu 1.14,
        silu 1.17, hardswish 1.22) every layer multiplies the logarithm of a deviation by that number: from some 20 layers on measure
        (:func:`lsuv`) or normalize.

    Args:
        layer: linear, convolution or transposed convolution; its weight and bias are set.
        activation: what stands before the layer (fan_in), behind it (fan_out); see :func:`gain`.
        fan: "fan_in" keeps the size of the signal, "fan_out" that of the gradient, "fan_avg" halfway.
        distribution: "normal", "uniform", or "truncated_normal" at two standard deviations; all of the same variance.
        generator: for the random numbers.

    Raises:
        TypeError: another kind of layer.
        ValueError: unknown activation, fan or distribution; a weight that cannot be set.

    Example:
        >>> import torch, equinorm
        >>> conv = torch.nn.Conv2d(64, 64, 3, groups=4)
        >>> equinorm.init.he_(conv, "silu")
        >>> abs(conv.weight.std().item() * 144**0.5 / equinorm.init.gain("silu") - 1) < 0.02
        True

    Source: He et al., 2015, arXiv:1502.01852, Eq. 10 and 14; fans as in :func:`fans`.
    """
    _sample(checked("he_", layer), gain(activation, fan), fan, distribution, generator)


def xavier_(
    layer: nn.Module,
    activation: What = "identity",
    *,
    distribution: Distribution = "normal",
    generator: torch.Generator | None = None,
) -> None:
    r"""Xavier's (Glorot's) initialisation: variance gain^2 / mean of the fans, a compromise between signal and gradient; bias 0.

    Args:
        layer: linear, convolution or transposed convolution.
        activation: whose gain to use; the paper's is the identity's, 1.
        distribution: as for :func:`he_`.
        generator: for the random numbers.

    Raises:
        TypeError, ValueError: as :func:`he_`.

    Example:
        >>> import torch, equinorm
        >>> equinorm.init.xavier_(torch.nn.Linear(8, 4), distribution="uniform")

    Source: Glorot and Bengio, 2010, Eq. 12 and 16.
    """
    _sample(checked("xavier_", layer), gain(activation), "fan_avg", distribution, generator)


def lecun_(layer: nn.Module, *, distribution: Distribution = "normal", generator: torch.Generator | None = None) -> None:
    r"""LeCun's initialisation: variance 1 / fan in; bias 0. The one for selu, whose gain is 1.

    Args:
        layer: linear, convolution or transposed convolution.
        distribution: as for :func:`he_`.
        generator: for the random numbers.

    Raises:
        TypeError, ValueError: as :func:`he_`.

    Example:
        >>> import torch, equinorm
        >>> equinorm.init.lecun_(torch.nn.Linear(8, 4))

    Source: LeCun et al., "Efficient BackProp", 1998, Eq. 16; for selu Klambauer et al., 2017, arXiv:1706.02515.
    """
    _sample(checked("lecun_", layer), 1.0, "fan_in", distribution, generator)


@torch.no_grad()
def _sample(layer: Layer, factor: float, fan: Fan, distribution: Distribution, generator: torch.Generator | None) -> None:
    into, out = fans(layer)
    std = factor / math.sqrt({"fan_in": into, "fan_out": out, "fan_avg": (into + out) / 2}[fan])
    values = torch.empty_like(blocks(layer), memory_format=torch.contiguous_format)
    if distribution == "normal":
        values.normal_(0, std, generator=generator)
    elif distribution == "uniform":
        values.uniform_(-std * math.sqrt(3), std * math.sqrt(3), generator=generator)
    elif distribution == "truncated_normal":
        wide = std / TRUNCATED
        nn.init.trunc_normal_(values, 0, wide, -2 * wide, 2 * wide, generator=generator)
    else:
        raise ValueError(f"he_, xavier_, lecun_: distribution must be normal, uniform or truncated_normal, got {distribution!r}")
    assign(layer, values)
    if layer.bias is not None:
        layer.bias.zero_()
