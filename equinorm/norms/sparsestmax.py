"""Sparse versions of softmax: sparsemax, and SparsestMax, which a growing radius drives to a single choice."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from equinorm.kernels.reference import wide

TIE = 1e-6  # distances on the simplex below which a point counts as the centre of its face, or as a corner


def sparsemax(z: Tensor, dim: int = -1) -> Tensor:
    """The point of the probability simplex nearest to ``z``: like softmax, but with exact zeros.

    Args:
        z: floating, any shape.
        dim: the dimension of the K entries.

    Returns:
        of the shape and dtype of z; not negative, with sum 1 over ``dim``.

    Raises:
        TypeError: z is not floating point.

    Example:
        >>> import torch, equinorm
        >>> equinorm.sparsemax(torch.tensor([0.5, 1.2, 0.1]))
        tensor([0.1500, 0.8500, 0.0000])

    Source: Martins and Astudillo 2016 (arXiv:1602.02068), Algorithm 1.
    """
    _check(z, "sparsemax")
    return _sparsemax(wide(z).movedim(dim, -1)).movedim(-1, dim).to(z.dtype)


def sparsestmax(z: Tensor, radius: float | Tensor, dim: int = -1, center: Literal["simplex", "support"] = "simplex") -> Tensor:
    r"""The point of the probability simplex nearest to ``z`` among those at least ``radius`` away from its centre.

    Formula:
        argmin_p |p - z|^2 over the simplex with |p - u| >= r, u = (1/K, ..., 1/K): r = 0 is sparsemax, and from r = sqrt((K - 1) / K) on,
        where only corners are left, the answer is a single 1 at the largest entry. In between, sparsemax is pushed away from u onto the
        sphere; if that leaves the simplex, the same is done on the face where it left, about the centre of that face.

    Args:
        z: floating, any shape.
        radius: r, a number or a tensor without dimensions. No gradient flows to it.
        dim: the dimension of the K entries.
        center: "support" starts from the centre of the entries that sparsemax left positive, as the authors' code does; that jumps where an
            entry reaches 0.

    Returns:
        of the shape and dtype of z; not negative, with sum 1 over ``dim``. Equal entries have no direction to be pushed in: they stay
        equal while the sphere cuts their face, then the first wins. Pushed along an edge, the result depends on z by a sign only,
        and its derivative is 0: from there on the radius decides.

    Raises:
        TypeError: z is not floating point.
        ValueError: an unknown centre.

    Example:
        >>> import torch, equinorm
        >>> equinorm.sparsestmax(torch.tensor([0.5, 0.3, 0.2]), 0.5)
        tensor([0.7191, 0.2562, 0.0247])

    Source: Shao et al. 2019. At ties the authors' code divides rounding noise by rounding noise; here they are kept.
    """
    _check(z, "sparsestmax")
    if center not in ("simplex", "support"):
        raise ValueError(f'sparsestmax: center must be "simplex" or "support", got {center!r}')
    p = _sparsemax(wide(z).movedim(dim, -1))  # (..., K)
    r = torch.as_tensor(radius, dtype=p.dtype, device=p.device).detach()
    face = p > 0 if center == "support" else torch.ones_like(p, dtype=torch.bool)
    y, settled = p, torch.zeros_like(p[..., :1], dtype=torch.bool)
    for _ in range(p.shape[-1] - 1):  # each round that does not settle loses at least one entry
        size = face.sum(-1, keepdim=True).to(p.dtype)
        middle = face / size
        away = p - middle
        squared = away.square().sum(-1, keepdim=True)
        tied = squared.detach() < TIE**2
        distance = torch.where(tied, 1.0, squared).sqrt()
        pushed = middle + r * away / distance
        corner = r >= ((size - 1) / size).sqrt() - TIE
        far = (~tied) & (distance.detach() >= r)
        end = torch.where(corner, _first_largest(p, face), torch.where(far, p, torch.where(tied, middle, pushed)))
        ends = corner | far | tied | (pushed.detach().amin(-1, keepdim=True) >= 0)
        y = torch.where(settled, y, end)
        settled = settled | ends
        p = torch.where(settled, p, _sparsemax(pushed))
        left = p.detach() > 0
        # On the smaller face the sphere is a smaller one, about that face's centre.
        below = left / left.sum(-1, keepdim=True).to(p.dtype)
        r = torch.where(settled, r, (r.square() - (middle - below).square().sum(-1, keepdim=True)).clamp(min=0).sqrt())
        face = torch.where(settled, face, left)
    return torch.where(settled, y, p).movedim(-1, dim).to(z.dtype)


def _sparsemax(z: Tensor) -> Tensor:
    z = z - z.detach().amax(-1, keepdim=True)
    descending = z.sort(-1, descending=True).values
    cumulative = descending.cumsum(-1) - 1
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    size = (rank * descending > cumulative).sum(-1, keepdim=True)  # of the support
    return (z - cumulative.gather(-1, size - 1) / size).relu()


def _first_largest(p: Tensor, face: Tensor) -> Tensor:
    """A single 1 at the first largest entry of the face."""
    largest = torch.where(face, p.detach(), -1.0).argmax(-1, keepdim=True)  # (..., 1)
    return (torch.arange(p.shape[-1], device=p.device) == largest).to(p.dtype)


def _check(z: Tensor, name: str) -> None:
    if not z.is_floating_point():
        raise TypeError(f"{name}: the input must be floating point, got {z.dtype}; convert it first, as in z.float()")
