"""Signal preservation without statistics, retyped naively in float64, importing nothing of the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def affine(y: Tensor, p: dict[str, Tensor]) -> Tensor:
    return y * p.get("weight", 1.0) + p.get("bias", 0.0)


def dynamic_tanh(x: Tensor, p: dict[str, Tensor], **_):
    """Zhu et al. 2025, Eq. 1, with tanh written out."""
    z = p["alpha"] * x
    return affine((torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)), p), {}


def dynamic_erf(x: Tensor, p: dict[str, Tensor], **_):
    """Chen et al. 2025; the error function by a series whose terms all have one sign, 2^n z^(2n+1) / (2n+1)!! times exp(-z^2)."""
    z = p["alpha"] * x + p["shift"]
    term, series = z, z
    for n in range(1, 150):
        term = term * 2 * z**2 / (2 * n + 1)
        series = series + term
    return affine(2 / math.sqrt(math.pi) * torch.exp(-(z**2)) * series, p), {}


def layer_scale(x: Tensor, p: dict[str, Tensor], **_):
    """Touvron et al. 2021, Eq. 4, without the sum."""
    return torch.stack([x[..., c] * p["gamma"][c] for c in range(x.shape[-1])], -1), {}


def deep_norm(x: Tensor, p: dict[str, Tensor], branch: Tensor, *, alpha: float, eps: float = 1e-5, mask: Tensor | None = None, **_):
    """Wang et al. 2022: layer norm of alpha x + G(x), row by row."""
    total = alpha * x + branch
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    rows = []
    for row, kept in zip(total.reshape(-1, x.shape[-1]), keep.reshape(-1, x.shape[-1]), strict=True):
        if not kept.any():
            rows.append(row * 0)
            continue
        values = row[kept]
        mean = values.sum() / values.numel()
        var = ((values - mean) ** 2).sum() / values.numel()
        rows.append(torch.where(kept, affine((row - mean) / torch.sqrt(var + eps), p), torch.zeros_like(row)))
    return torch.stack(rows).reshape(x.shape), {}


def adaptive_clip(weight: Tensor, grad: Tensor, clip_factor: float, eps: float, order: float) -> Tensor:
    """Brock et al. 2021, Eq. 3, for one unit's weights and gradient."""
    w = (weight.abs() ** order).sum() ** (1 / order)
    g = (grad.abs() ** order).sum() ** (1 / order)
    largest = clip_factor * max(w.item(), eps)
    return grad * (largest / max(g.item(), 1e-6)) if g.item() > largest else grad
