"""The geometry every weight norm shares: which entries of a weight tensor belong to one output unit.

A unit is one row of a linear layer or one filter of a convolution. In ``Linear`` and ``Conv*d`` weights, ``(out, in / groups, *kernel)``,
the units lie along dimension 0. In ``ConvTranspose*d`` weights, ``(in, out / groups, *kernel)``, they lie along dimension 1, and with
groups also along the group blocks of dimension 0: pooling over all of dimension 0 would mix inputs that a unit never sees.

Names in this package: ``out`` output units, ``fan_in`` weights of one unit (``in / groups * prod(kernel)``), ``G`` groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize


def wide(x: Tensor) -> Tensor:
    """``x`` in the type its norm is computed in: float32 for half types, otherwise its own."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of ``x >= 0`` whose derivative at 0 is 0, where autograd's is infinite and turns into NaN in the next product."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


@dataclass(frozen=True)
class Units:
    """Where the output units of a weight tensor lie.

    Attributes:
        dim: the dimension that counts the units of one group.
        groups: blocks along dimension 0 that hold different units; 1 except in grouped transposed convolutions.
    """

    dim: int = 0
    groups: int = 1

    def unfold(self, weight: Tensor) -> Tensor:
        """``weight`` with the group blocks on a dimension of their own, ``(G, in / G, out / G, *kernel)``; itself without groups."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def fold(self, unfolded: Tensor) -> Tensor:
        """Undo :meth:`unfold`."""
        return unfolded if self.groups == 1 else unfolded.flatten(0, 1)

    def within(self, unfolded: Tensor) -> tuple[int, ...]:
        """The dimensions of an unfolded weight that run inside one unit, to reduce over."""
        units = (self.dim,) if self.groups == 1 else (0, self.dim + 1)
        return tuple(d for d in range(unfolded.ndim) if d not in units)

    def count(self, weight: Tensor) -> int:
        """Number of output units."""
        return weight.shape[self.dim] * self.groups

    def fan_in(self, weight: Tensor) -> int:
        """Number of weights of one output unit, ``in / groups * prod(kernel)``."""
        return math.prod([n for d, n in enumerate(weight.shape) if d != self.dim]) // self.groups

    def spread(self, values: Tensor, unfolded: Tensor) -> Tensor:
        """One value per unit, ``(out,)``, in a shape that broadcasts against an unfolded weight."""
        within = self.within(unfolded)
        return values.reshape([1 if d in within else n for d, n in enumerate(unfolded.shape)])

    def norm(self, unfolded: Tensor) -> Tensor:
        """Euclidean norm of every unit, broadcastable against ``unfolded``."""
        return safe_sqrt(unfolded.square().sum(self.within(unfolded), keepdim=True))


def named_weight(method: str, module: nn.Module, name: str) -> Tensor:
    """The tensor ``module.<name>``, or an error in the name of ``method`` that says what the module has instead."""
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        own = ", ".join(key for key, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(f"{method}: {type(module).__name__} must have a parameter named {name!r}; its own parameters are: {own}")
    if isinstance(weight, UninitializedParameter):
        raise ValueError(f"{method}: {type(module).__name__}.{name} has no shape yet; run one batch through the lazy module first")
    if not weight.is_floating_point():
        raise TypeError(f"{method}: {type(module).__name__}.{name} must be real floating point, got {weight.dtype}")
    if weight.ndim == 0:
        raise ValueError(f"{method}: {type(module).__name__}.{name} must have at least one dimension, got a scalar")
    return weight


def units_of(method: str, module: nn.Module, name: str, dim: int | None) -> Units:
    """Where the output units of ``module.<name>`` lie; ``dim=None`` finds out from the kind of module, a number overrides it."""
    weight = named_weight(method, module, name)
    if dim is None:
        if isinstance(module, _ConvTransposeNd) and name == "weight":
            return Units(dim=1, groups=module.groups)
        return Units()
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(
            f"{method}: dim must lie in [{-weight.ndim}, {weight.ndim - 1}] for a weight of shape {tuple(weight.shape)}, got {dim}"
        )
    return Units(dim=dim % weight.ndim)


def register(method: str, module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Register ``parametrization`` on ``module.<name>``; refuse to stack the same method twice."""
    if parametrize.is_parametrized(module, name):
        present = module.parametrizations[name]  # type: ignore[index]
        if any(type(step) is type(parametrization) for step in present):  # type: ignore[union-attr]
            raise ValueError(
                f"{method}: {type(module).__name__}.{name} already has it; remove it with "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) before you register it with other options"
            )
    parametrize.register_parametrization(module, name, parametrization)
