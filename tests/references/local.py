"""Response, local and per-position norms retyped from their papers: naive, differentiable, float64, one position at a time.

The signatures are those of tests/references/norms.py.
"""

from __future__ import annotations

import itertools
import math

import torch

from tests.references.norms import everything, layer, padded_as_zero, rms


def length(values):
    """Euclidean norm whose derivative at zero is zero."""
    square = (values**2).sum()
    return torch.sqrt(square) if square > 0 else square * 0


def global_response(x, p, *, mask=None, eps=1e-6, **_):
    mask = everything(x) if mask is None else mask
    samples = []
    for sample, kept in zip(x, mask, strict=True):
        g = torch.stack([length(channel[kept]) for channel in sample])
        n = g / (g.sum() / len(g) + eps)
        samples.append(torch.stack([p["weight"][c] * (sample[c] * n[c]) + p["bias"][c] + sample[c] for c in range(len(g))]))
    return padded_as_zero(torch.stack(samples), mask), {}


def local_response(x, p, *, mask=None, size, alpha=1e-4, beta=0.75, k=1.0, mode="across", **_):
    """One value at a time: sum the squares of those neighbours that exist, divide by the size of the whole window."""
    mask = everything(x) if mask is None else mask
    x = padded_as_zero(x, mask)
    before, after = size // 2, (size - 1) // 2
    dims = (1,) if mode == "across" else tuple(range(2, x.ndim))
    values = []
    for index in itertools.product(*(range(length) for length in x.shape)):
        window = x[tuple(slice(max(0, i - before), i + after + 1) if dim in dims else slice(i, i + 1) for dim, i in enumerate(index))]
        values.append(x[index] / (k + alpha / size ** len(dims) * (window**2).sum()) ** beta)
    return torch.stack(values).reshape(x.shape), {}


class Returning(torch.autograd.Function):
    """max(p, bound); the gradient passes where p is not below the bound, or where it is negative."""

    @staticmethod
    def forward(ctx, p, bound):
        ctx.save_for_backward(p, bound)
        return torch.maximum(p, bound)

    @staticmethod
    def backward(ctx, grad):
        p, bound = ctx.saved_tensors
        return torch.where(torch.logical_or(p >= bound, grad < 0), grad, torch.zeros_like(grad)), None


def generalized_divisive(x, p, *, inverse=False, beta_min=1e-6, alpha=2.0, epsilon=0.5, rectify=False, **_):
    pedestal = 2.0**-36

    def stored(root, least):
        return Returning.apply(root, torch.tensor((least + pedestal) ** 0.5, dtype=x.dtype)) ** 2 - pedestal

    beta, gamma = stored(p["beta"], beta_min), stored(p["gamma"], 0.0)
    x = torch.where(x > 0, x, 0.0) if rectify else x
    channels = []
    for i in range(x.shape[1]):
        pool = beta[i] + sum(gamma[i, j] * x[:, j].abs() ** alpha for j in range(x.shape[1]))
        channels.append(x[:, i] * pool**epsilon if inverse else x[:, i] / pool**epsilon)
    return torch.stack(channels, 1), {}


def pixel(x, p, *, eps=1e-8, **_):
    """One position at a time."""
    flat = x.reshape(*x.shape[:2], -1)
    y = torch.stack(
        [torch.stack([v / torch.sqrt((v**2).sum() / len(v) + eps) for v in sample.unbind(1)], 1) for sample in flat],
    )
    return y.reshape(x.shape), {}


def positional(x, p, *, eps=1e-5, unbiased=False, return_moments=False, **_):
    flat = x.reshape(*x.shape[:2], -1)
    samples = []
    for sample in flat:
        columns = []
        for v in sample.unbind(1):
            mu = v.sum() / len(v)
            sigma = torch.sqrt(((v - mu) ** 2).sum() / (len(v) - unbiased) + eps)
            columns.append(torch.cat(((v - mu) / sigma, mu[None], sigma[None])))
        samples.append(torch.stack(columns, 1))
    y, mean, std = torch.stack(samples).split((x.shape[1], 1, 1), 1)
    y, mean, std = (part.reshape(x.shape[0], -1, *x.shape[2:]) for part in (y, mean, std))
    return ((y, mean, std) if return_moments else y), {}


def scale(x, p, *, mask=None, eps=1e-5, **_):
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    rows = []
    for row, kept in zip(x.reshape(-1, x.shape[-1]), keep.reshape(-1, x.shape[-1]), strict=True):
        norm = length(row[kept])
        rows.append(torch.where(kept, p["scale"] * row / (norm if norm > eps else eps), 0.0))
    return torch.stack(rows).reshape(x.shape), {}


def query_key(q, p, k, *, kind="rms", eps=None, init_scale=None, learnable_scale=True, training=True, mask=None, **options):
    """The queries; keys are treated alike, except that they never carry the scale."""
    if kind == "l2":
        return scale(q, p, eps=1e-12 if eps is None else eps)
    own = {"weight": p.get("q_norm.weight"), "bias": p.get("q_norm.bias")}
    return (rms if kind == "rms" else layer)(q, own, eps=1e-6 if eps is None else eps, **options)


def window_weights(size, sigma):
    bell = [1.0 if sigma is None else math.exp(-0.5 * ((k - size // 2) / sigma) ** 2) for k in range(size)]
    return [value / sum(bell) for value in bell]


def for_each_window(values, mask, kernel_size, sigma, across_channels):
    """Weighted mean of ``values`` (N, C, *S) over those positions of the window around each position that exist and count."""
    spatial = values.shape[2:]
    sizes = (kernel_size,) * len(spatial) if isinstance(kernel_size, int) else kernel_size
    weights = [window_weights(size, sigma) for size in sizes]
    averages = []
    for position in itertools.product(*(range(n) for n in spatial)):
        total, share = 0.0, 0.0
        for offset in itertools.product(*(range(-(size // 2), size // 2 + 1) for size in sizes)):
            where = tuple(i + o for i, o in zip(position, offset, strict=True))
            if all(0 <= i < n for i, n in zip(where, spatial, strict=True)):
                counts = mask[(slice(None), *where)][:, None]  # (N, 1)
                w = math.prod(row[o + len(row) // 2] for row, o in zip(weights, offset, strict=True)) * counts.to(values.dtype)
                total = total + w * torch.where(counts, values[(slice(None), slice(None), *where)], 0.0)
                share = share + w
        average = total / torch.where(share > 0, share, 1.0)
        averages.append(average.mean(1, keepdim=True).expand_as(average) if across_channels else average)
    return torch.stack(averages, -1).reshape(values.shape)


def subtractive(x, p, *, mask=None, kernel_size=9, sigma=2.0, across_channels=True, **_):
    mask = everything(x) if mask is None else mask
    return padded_as_zero(x - for_each_window(x, mask, kernel_size, sigma, across_channels), mask), {}


def divisive(x, p, *, mask=None, kernel_size=9, sigma=2.0, across_channels=True, eps=1e-4, threshold="mean", detach_threshold=False, **_):
    mask = everything(x) if mask is None else mask
    square = for_each_window(x**2, mask, kernel_size, sigma, across_channels)
    deviation = torch.where(square > 0, torch.sqrt(torch.where(square > 0, square, 1.0)), 0.0)
    samples = []
    for sample, sigmas, kept in zip(x, deviation, mask, strict=True):
        rows = []
        for row, s in zip(sample, sigmas, strict=True):
            c = s[kept].sum() / kept.sum().clamp(min=1) if threshold == "mean" else torch.tensor(threshold, dtype=x.dtype)
            c = c.detach() if detach_threshold else c
            rows.append(row / torch.maximum(s, c.clamp(min=eps) if threshold == "mean" else c))
        samples.append(torch.stack(rows))
    return padded_as_zero(torch.stack(samples), mask), {}


def local_contrast(x, p, *, mask=None, **options):
    v, _ = subtractive(x, p, mask=mask, **options)
    return divisive(v, p, mask=mask, **options)
