"""Weights that keep lengths: orthogonal matrices, and convolutions that are one at their centre."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equinorm.init.layers import Layer, assign, blocks, checked
from equinorm.init.scaling import What
from equinorm.kernels.activations import find


def orthogonal_(layer: nn.Module, activation: What = "identity", *, generator: torch.Generator | None = None) -> None:
    r"""Orthonormal rows (or columns, where there are more outputs than inputs), times the activation's gain; bias 0.

    For each group the weight counts as a matrix of (out, in x kernel positions).

    Args:
        layer: linear, convolution or transposed convolution.
        activation: what stands before the layer; its gain multiplies.
        generator: for the random numbers.

    Raises:
        TypeError, ValueError: as :func:`he_`.

    Example:
        >>> import torch, equinorm
        >>> linear = torch.nn.Linear(6, 4)
        >>> equinorm.init.orthogonal_(linear)
        >>> torch.allclose(linear.weight @ linear.weight.T, torch.eye(4), atol=1e-6)
        True

    Source: Saxe, McClelland and Ganguli, 2013, arXiv:1312.6120. A convolution with orthonormal rows does not keep lengths exactly; see
    :func:`delta_orthogonal_`.
    """
    layer = checked("orthogonal_", layer)
    factor = find(activation).gain
    shape = blocks(layer).shape
    values = torch.stack([_orthonormal(shape[1], shape[2:].numel(), layer, generator).view(shape[1:]) for _ in range(shape[0])])
    assign(layer, factor * values)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def delta_orthogonal_(layer: nn.Module, activation: What = "identity", *, generator: torch.Generator | None = None) -> None:
    r"""A convolution that is 0 except at the centre of its kernel, where it is an orthogonal map: it keeps lengths exactly; bias 0.

    Formula:
        W[:, :, centre] = gain Q,  Q^T Q = 1,  W = 0 elsewhere;  hence \|W * x\| = gain \|x\|

    Use it when: a convolutional network without norms and skips is to be very deep.
    Not when: the layer has fewer outputs than inputs: no map keeps all lengths then.
    Known trouble: where a layer widens, the mean square per channel falls by in / out; a stride s looks at one position in s^d.

    Args:
        layer: linear, convolution or transposed convolution with at least as many outputs as inputs, in each group.
        activation: what stands before the layer; its gain multiplies.
        generator: for the random numbers.

    Raises:
        TypeError: as :func:`he_`.
        ValueError: fewer outputs than inputs, and as :func:`he_`.

    Example:
        >>> import torch, equinorm
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1, bias=False)
        >>> equinorm.init.delta_orthogonal_(conv)
        >>> x = torch.randn(2, 8, 5, 5)
        >>> torch.allclose(conv(x).norm(), x.norm())
        True

    Source: Xiao et al., 2018, arXiv:1806.05393, Algorithm 2. The centre of an even kernel is the position behind the middle.
    """
    layer = checked("delta_orthogonal_", layer)
    factor = find(activation).gain
    if (problem := no_delta(layer)) is not None:
        raise ValueError(f"delta_orthogonal_: {problem}; use orthogonal_ for this layer")
    groups, out, into, *kernel = blocks(layer).shape
    values = torch.zeros(groups, out, into, *kernel, dtype=torch.float32, device=layer.weight.device)
    centre = tuple(size // 2 for size in kernel)
    for group in range(groups):
        values[(group, slice(None), slice(None), *centre)] = factor * _orthonormal(out, into, layer, generator)
    assign(layer, values)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def no_delta(layer: Layer) -> str | None:
    """Why a layer cannot keep lengths; None if it can."""
    groups, out, into = blocks(layer).shape[:3]
    if out >= into:
        return None
    each = " per group" if groups > 1 else ""
    return f"a layer must have at least as many outputs as inputs to keep lengths, got {into} inputs and {out} outputs{each}"


def _orthonormal(rows: int, columns: int, layer: Layer, generator: torch.Generator | None) -> Tensor:
    wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    return nn.init.orthogonal_(torch.empty(rows, columns, dtype=wide, device=layer.weight.device), generator=generator)
