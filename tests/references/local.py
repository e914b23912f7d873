"""Response, local and per-position norms retyped from their papers: naive, differentiable, float64, one position at a time.

The signatures are those of tests/references/norms.py.
"""

from __future__ import annotations

import itertools

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
