"""The GPU kernels, written in Triton, with the interface of :mod:`equinorm.kernels.cpu`.

Triton comes with CUDA builds of PyTorch. It is imported when the first CUDA tensor is met, and compiles each kernel for the device at first
use, into its own cache. The kernels are operators ``torch.ops.equinorm.triton_*``: no call waits for the device, none asks the host for
a value, and all memory comes from PyTorch's allocator, so that CUDA graphs can capture them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from equinorm.kernels.cpu import DTYPES as DTYPES
from equinorm.kernels.cpu import Per

_reason: str | None = None


def reason() -> str:
    """Why there are no kernels; empty where there are. The first call imports Triton."""
    global _reason
    if _reason is None:
        if torch.version.hip:
            _reason = "they have been written for CUDA, and this is a ROCm build of PyTorch"
        else:
            try:
                from equinorm.kernels import triton_channel, triton_row  # noqa: F401 - registers the operators

                _reason = ""
            except ImportError as error:
                _reason = f"Triton cannot be imported ({error}): CUDA builds of PyTorch bring it, or `pip install triton`"
    return _reason


def available() -> bool:
    """Whether the kernels are there. The first call warns where they are not, with the reason."""
    first = _reason is None
    why = reason()
    if first and why:
        warnings.warn(f"equinorm runs without its GPU kernels, in plain PyTorch operations, because {why}", RuntimeWarning, stacklevel=3)
    return not why


def info() -> dict[str, Any]:
    """What became of the kernels: ``state``, "ready" or "unavailable", the ``reason`` for the latter, and Triton's version."""
    why = reason()
    if why:
        return {"state": "unavailable", "reason": why}
    import triton

    return {"state": "ready" if torch.cuda.is_available() else "ready, without a device", "reason": "", "triton": triton.__version__}


INTERLEAVED = False  # channels_last groups take the channel geometry


def fused(_: object) -> None:
    """No activation: those that follow a map run behind it, as PyTorch operations."""


def moments(x: Tensor, per: Per) -> tuple[Tensor, Tensor]:
    """See :func:`equinorm.kernels.cpu.moments`."""
    return torch.ops.equinorm.triton_moments.default(x, per == "sample")


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See :func:`equinorm.kernels.cpu.affine`."""
    return torch.ops.equinorm.triton_affine.default(x, center, scale, shift)


def reduce(dy: Tensor, x: Tensor, center: Tensor, per: Per) -> tuple[Tensor, Tensor]:
    """See :func:`equinorm.kernels.cpu.reduce`."""
    return torch.ops.equinorm.triton_reduce.default(dy, x, center, per == "sample")


def backward(dy: Tensor, x: Tensor, center: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """See :func:`equinorm.kernels.cpu.backward`."""
    return torch.ops.equinorm.triton_backward.default(dy, x, center, scale, slope, offset)


def row_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`equinorm.kernels.cpu.row_forward`; only rows with ``s = 1`` may be measured in part.

    Returns:
        the output; two tensors (rows, 2) for :func:`row_backward`, in the units of the kernels.
    """
    return torch.ops.equinorm.triton_row_forward.default(x, weight, bias, rows, groups, k, s, measured, eps, centered)


def row_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    center: Tensor,
    rstd: Tensor,
    *,
    wanted: tuple[bool, bool, bool],
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    centered: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`equinorm.kernels.cpu.row_backward`."""
    dx, dweight, dbias = torch.ops.equinorm.triton_row_backward.default(
        dy, x, weight, center, rstd, any(wanted[1:]), rows, groups, k, s, measured, centered
    )
    return dx, dweight if wanted[1] else None, dbias if wanted[2] else None


def running_update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, weight: float, bessel: float) -> None:
    """See :func:`equinorm.kernels.cpu.running_update`."""
    torch.ops.equinorm.triton_running_update.default(running_mean, running_var, mean, var, weight, bessel)
