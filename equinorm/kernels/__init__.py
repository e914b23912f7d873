"""How fast: which implementation a call runs, decided here and nowhere else, per call and in sight."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch.autograd import forward_ad

from equinorm.kernels import cpu, empty, gpu

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from torch import Tensor

Impl = Literal["auto", "plain"]

_BY_DEVICE = {"cpu": cpu, "cuda": gpu}
_ruled_out = threading.local()


@contextmanager
def plain() -> Iterator[None]:
    """Within this context every norm runs in plain PyTorch operations: the definition, without kernels.

    Example:
        >>> import torch, equinorm
        >>> x, norm = torch.randn(4, 8, 5, 5), equinorm.BatchNorm(8)
        >>> with equinorm.plain():
        ...     y = norm(x)
        >>> torch.allclose(y, norm(x), atol=1e-6)
        True
    """
    depth = getattr(_ruled_out, "depth", 0)
    _ruled_out.depth = depth + 1
    try:
        yield
    finally:
        _ruled_out.depth = depth


def pick(x: Tensor, impl: Impl = "auto") -> ModuleType | None:
    """The module of kernels that serves ``x``, or None for the plain path.

    The plain path takes whatever looks at the operations instead of running them (``torch.compile``, ``torch.export``, ``torch.func``,
    forward-mode derivatives, tensor subclasses), other devices, and calls that ask for it.

    Raises:
        ValueError: ``impl`` is neither "auto" nor "plain".
    """
    if torch.compiler.is_compiling():
        return None
    if impl != "auto":
        if impl != "plain":
            raise ValueError(f'impl must be "auto" or "plain", got {impl!r}')
        return None
    if getattr(_ruled_out, "depth", 0):
        return None
    kernels = _BY_DEVICE.get(x.device.type)
    if kernels is None or observed(x):
        return None
    if x.dtype not in kernels.DTYPES or not kernels.available():
        return None
    return kernels if x.numel() else empty


def observed(x: Tensor) -> bool:
    """Whether something looks at the operations on ``x`` instead of running them: a compiler, a transform, a tensor subclass."""
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def dense(x: Tensor) -> Tensor:
    """``x`` itself if it is contiguous or channels_last, of any rank, else a contiguous copy (differentiable)."""
    return x if x.is_contiguous() or _channels_last(x) else x.contiguous()


def like(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` in the dtype and memory layout of ``x``: incoming gradients may be expanded, transposed or of another layout."""
    if dy.dtype == x.dtype and dy.stride() == x.stride():
        return dy
    return torch.empty_like(x).copy_(dy)


def _channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.movedim(1, -1).is_contiguous()
