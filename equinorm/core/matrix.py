"""The square root of a symmetric matrix and its inverse, with derivatives that do not fear equal eigenvalues.

The derivative of the root R of S solves the Lyapunov equation R dR + dR R = dS. In the basis of eigenvectors that is a division by
sqrt(l_i) + sqrt(l_j), a sum: nothing blows up where eigenvalues meet, as in the derivative of the eigenvectors themselves, which divides by
l_i - l_j. The solution is again a differentiable function of R, by another equation of the same kind, so derivatives of every order are
right; all of them reuse the one eigendecomposition of the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def roots(s: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """The positive square root of ``s`` and its inverse.

    Args:
        s: (..., d, d), symmetric, positive semi-definite up to rounding.
        floor: eigenvalues below this share of the largest are rounding noise and count as so large.

    Returns:
        root and inverse root. Where an eigenvalue is 0 the inverse is the pseudo-inverse; where ``s`` is not finite, both are NaN.
    """
    finite = s.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    root, inverse, _, _ = _Roots.apply(torch.where(finite, s, 1), floor)
    return torch.where(finite, root, torch.nan), torch.where(finite, inverse, torch.nan)


class _Roots(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(s)
        largest = values.abs().amax(-1, keepdim=True)
        a = torch.maximum(values, floor * largest).sqrt().unsqueeze(-2)  # (..., 1, d)
        inverse = torch.where(a > 0, 1 / a, 0)
        return (vectors * a) @ vectors.mT, (vectors * inverse) @ vectors.mT, a, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        root, inverse, a, vectors = output
        ctx.mark_non_differentiable(a, vectors)
        ctx.save_for_backward(root, inverse, a, vectors)

    @staticmethod
    def backward(ctx: Any, to_root: Tensor, to_inverse: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        root, inverse, a, vectors = ctx.saved_tensors
        received = to_root - inverse @ to_inverse @ inverse  # the derivative of the inverse: -inverse dR inverse
        return _Lyapunov.apply(root, (received + received.mT) / 2, a, vectors), None


class _Lyapunov(torch.autograd.Function):
    """The solution Z of root Z + Z root = Q, given the eigenvalues ``a`` and the eigenvectors of the root."""

    generate_vmap_rule = True

    @staticmethod
    def forward(root: Tensor, q: Tensor, a: Tensor, vectors: Tensor) -> Tensor:
        sums = a.mT + a
        inner = torch.where(sums > 0, (vectors.mT @ q @ vectors) / sums, 0)
        return vectors @ inner @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        root, _, a, vectors = inputs
        ctx.save_for_backward(root, output, a, vectors)

    @staticmethod
    def backward(ctx: Any, to_z: Tensor) -> tuple[Tensor, Tensor, None, None]:
        root, z, a, vectors = ctx.saved_tensors
        to_q = _Lyapunov.apply(root, to_z, a, vectors)
        return -(to_q @ z.mT + z.mT @ to_q), to_q, None, None
