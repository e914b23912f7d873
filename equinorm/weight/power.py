"""Power iteration: the largest singular value of a layer's linear map, and the state that follows it through training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from equinorm.weight.units import wide

WARM_UP = 15  # iterations at registration and after an assignment to the weight; torch's number

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: it would run the products below in half precision."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


class Operator(Protocol):
    """A linear map that a weight stands for, or one map per group: then the vectors have a leading dimension G."""

    lead: int

    def sizes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of an output vector u and of an input vector v."""
        ...

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        """The map."""
        ...

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """Its transpose."""
        ...


class MatrixOperator:
    """The weight as the matrix (units, rest): a linear layer's own map, for a convolution the map of one patch.

    Args:
        dim: dimension of the weight that becomes the rows.
        groups: None for one matrix of everything; a number for one matrix per group of a grouped convolution.
    """

    def __init__(self, dim: int, groups: int | None = None) -> None:
        self.dim, self.groups = dim, groups
        self.lead = 0 if groups is None else 1

    def matrix(self, weight: Tensor) -> Tensor:
        """``(rows, rest)`` or ``(G, rows, rest)``."""
        if self.groups is None:
            return weight.movedim(self.dim, 0).flatten(1)
        return weight.unflatten(0, (self.groups, -1)).movedim(self.dim + 1, 1).flatten(2)

    def back(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The weight whose (single) matrix is ``matrix``."""
        rest = [n for d, n in enumerate(weight.shape) if d != self.dim]
        return matrix.unflatten(1, rest).movedim(0, self.dim)

    def sizes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *lead, rows, rest = self.matrix(weight).shape
        return (*lead, rows), (*lead, rest)

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        return (self.matrix(weight) @ v.unsqueeze(-1)).squeeze(-1)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        return (self.matrix(weight).mT @ u.unsqueeze(-1)).squeeze(-1)


class ConvOperator:
    """The convolution itself on inputs of one size, with its stride, dilation, groups and padding of any mode.

    Padding other than with zeros is a product with a matrix of zeros and ones along each dimension, so that its transpose is at hand.
    """

    lead = 0

    def __init__(self, module: _ConvNd, spatial: tuple[int, ...]) -> None:
        self.spatial = spatial
        self.stride, self.dilation, self.groups = module.stride, module.dilation, module.groups
        self.channels = (module.out_channels, module.in_channels)
        self.kernel_size = module.kernel_size
        self.mode = module.padding_mode
        self.flat_pads = list(module._reversed_padding_repeated_twice)  # last dimension first, as F.pad takes it
        self.pads = [(self.flat_pads[2 * d], self.flat_pads[2 * d + 1]) for d in reversed(range(len(spatial)))]

    def sizes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        padded = [n + before + after for n, (before, after) in zip(self.spatial, self.pads, strict=True)]
        out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)]
        return (self.channels[0], *out), (self.channels[1], *self.spatial)

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        if self.mode == "zeros":
            v = F.pad(v, self.flat_pads)
        else:
            for dim, pad in enumerate(self._paddings(v), start=1):
                v = (v.movedim(dim, -1) @ pad).movedim(-1, dim)
        return CONV[len(self.spatial)](v[None], weight, None, self.stride, 0, self.dilation, self.groups)[0]

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        left_over = [
            n + before + after - ((o - 1) * s + d * (k - 1) + 1)
            for n, (before, after), o, k, s, d in zip(
                self.spatial, self.pads, u.shape[1:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        v = CONV_TRANSPOSE[len(self.spatial)](u[None], weight, None, self.stride, 0, left_over, self.groups, self.dilation)[0]
        if self.mode == "zeros":
            return F.pad(v, [-pad for pad in self.flat_pads])
        for dim, pad in enumerate(self._paddings(u), start=1):
            v = (v.movedim(dim, -1) @ pad.mT).movedim(-1, dim)
        return v

    def _paddings(self, like: Tensor) -> list[Tensor]:
        """One matrix (size, padded size) per spatial dimension."""
        eyes = [torch.eye(n, dtype=like.dtype, device=like.device) for n in self.spatial]
        return [F.pad(eye[None], pad, mode=self.mode)[0] for eye, pad in zip(eyes, self.pads, strict=True)]


class ConvTransposeOperator:
    """The transposed convolution itself on inputs of one size."""

    lead = 0

    def __init__(self, module: _ConvTransposeNd, spatial: tuple[int, ...]) -> None:
        self.spatial = spatial
        self.stride, self.dilation, self.groups = module.stride, module.dilation, module.groups
        self.padding = tuple(int(p) for p in module.padding)
        self.output_padding, self.kernel_size = module.output_padding, module.kernel_size
        self.channels = (module.out_channels, module.in_channels)

    def sizes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out = [
            (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for n, s, p, d, k, extra in zip(
                self.spatial, self.stride, self.padding, self.dilation, self.kernel_size, self.output_padding, strict=True
            )
        ]
        return (self.channels[0], *out), (self.channels[1], *self.spatial)

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        convolve = CONV_TRANSPOSE[len(self.spatial)]
        return convolve(v[None], weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation)[0]

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        return CONV[len(self.spatial)](u[None], weight, None, self.stride, self.padding, self.dilation, self.groups)[0]


class PowerIterated(nn.Module):
    """Abstract parametrization that follows the top singular vectors of an operator.

    Buffers ``_u`` and ``_v`` (torch's names; persistent; float32 even in a half-precision module) advance once per training forward, in
    place, and are copied before use: two forwards may precede one backward. The repetition of a forward by activation checkpointing
    does not advance them. Evaluation uses them as they are.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, operator: Operator, weight: Tensor, n_power_iterations: int) -> None:
        super().__init__()
        self.operator, self.n_power_iterations = operator, n_power_iterations
        u_shape, v_shape = operator.sizes(weight)
        like = wide(weight)
        self.register_buffer("_u", like.new_empty(u_shape).normal_())
        self.register_buffer("_v", like.new_empty(v_shape).normal_())

    @torch.no_grad()
    def restart(self, weight: Tensor, n_power_iterations: int = WARM_UP) -> None:
        """Forget the vectors and find them anew, for instance after the weight was changed by hand.

        Args:
            weight: the raw weight, ``module.parametrizations.<name>.original``.
            n_power_iterations: how many iterations to take from a random start.
        """
        self._u.normal_()
        self._v.normal_()
        with full_precision(weight):
            self._advance(wide(weight), n_power_iterations)

    def right_inverse(self, value: Tensor) -> Tensor:
        self.restart(value)
        return value

    def top(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``u``, ``v`` (constants, unit length) and ``sigma = <u, W v>``, differentiable in ``weight`` (already wide)."""
        # Inside a backward pass a forward is a repetition: it must see the vectors that the forward saw.
        if self.training and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
            with torch.no_grad():
                self._advance(weight, self.n_power_iterations)
        u, v = self._u.to(weight.dtype, copy=True), self._v.to(weight.dtype, copy=True)
        return u, v, (u * self.operator.apply(weight, v)).flatten(self.operator.lead).sum(-1)

    def _advance(self, weight: Tensor, steps: int) -> None:
        u, v = self._u.to(weight.dtype), self._v.to(weight.dtype)
        for _ in range(steps):
            u = self._unit(self.operator.apply(weight, v), u)
            v = self._unit(self.operator.adjoint(weight, u), v)
        self._u.copy_(u)
        self._v.copy_(v)

    def _unit(self, x: Tensor, before: Tensor) -> Tensor:
        """``x`` divided by its length; where that is 0 the vector from before, because a zero vector would never leave zero again."""
        length = x.flatten(self.operator.lead).norm(dim=-1)
        length = length.view(length.shape + (1,) * (x.ndim - self.operator.lead))
        return torch.where(length > 0, x / length, before)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in ("_u", "_v")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and buffer is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(after.device)
        return self
