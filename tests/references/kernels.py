"""What the kernels compute, retyped as loops over samples, channels and rows in float64 with exactly rounded sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _values(t: Tensor) -> list[float]:
    return t.double().flatten().tolist()


def mean_and_variance(values: list[float]) -> tuple[float, float]:
    """Mean and biased variance."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


def moments(x: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Mean and variance per (sample, channel) or per channel: (N, C) or (1, C)."""
    samples = x.unbind(0) if per == "sample" else [x.transpose(0, 1).flatten(1)]
    found = [[mean_and_variance(_values(channel)) for channel in sample] for sample in samples]
    return torch.tensor(found, dtype=torch.float64).unbind(-1)


def at(small: Tensor, n: int, c: int) -> float:
    """The entry of a small tensor (N | 1, C | 1) that belongs to sample n and channel c."""
    return small[n if small.shape[0] > 1 else 0, c if small.shape[1] > 1 else 0].item()


def affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - center) * scale + shift."""
    y = x.double().clone()
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            y[n, c] = (y[n, c] - at(center, n, c)) * at(scale, n, c) + at(shift, n, c)
    return y


def reduce(dy: Tensor, x: Tensor, center: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Sums of dy and of dy * (x - center) per (sample, channel) or per channel."""
    n, c = x.shape[:2]
    rows = n if per == "sample" else 1
    parts: list[list[tuple[list[float], list[float]]]] = [[([], []) for _ in range(c)] for _ in range(rows)]
    for i in range(n):
        for j in range(c):
            first, second = parts[i if rows > 1 else 0][j]
            first += _values(dy[i, j])
            second += _values(dy[i, j].double() * (x[i, j].double() - at(center, i, j)))
    return tuple(torch.tensor([[math.fsum(cell[k]) for cell in row] for row in parts], dtype=torch.float64) for k in (0, 1))


def backward(dy: Tensor, x: Tensor, center: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """scale * dy + slope * (x - center) + offset."""
    dx = torch.empty_like(x, dtype=torch.float64)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            centered = x[n, c].double() - at(center, n, c)
            dx[n, c] = at(scale, n, c) * dy[n, c].double() + at(slope, n, c) * centered + at(offset, n, c)
    return dx


def rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, groups: int, k: int, s: int, measured: int, eps: float, centered: bool
) -> Tensor:
    """Each row of x: (rows, k * s) minus its mean, over its root mean square, times weight, plus bias; differentiable."""
    out = []
    for r, row in enumerate(x.double()):
        head = row[:measured]
        mean = head.mean() if centered else row.new_zeros(())
        normalized = (row - mean) / ((head - mean).square().mean() + eps).sqrt()
        which = [(r % groups) * k + i // s for i in range(k * s)]
        if weight is not None:
            normalized = normalized * weight.double()[which]
        if bias is not None:
            normalized = normalized + bias.double()[which]
        out.append(normalized)
    return torch.stack(out)
