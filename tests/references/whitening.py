"""Whitening norms retyped from their papers: naive, differentiable, float64, one group at a time, importing nothing of the library.

The signatures are those of tests/references/norms.py.
"""

from __future__ import annotations

import torch

from tests.references.norms import everything, padded_as_zero, per_channel, rate


def whitened(x, p, inverse_root, *, training, mask, d, eps, momentum, running):
    mask = everything(x) if mask is None else mask
    channels = x.shape[1]
    d = min(d, channels)
    identity = torch.eye(d, dtype=x.dtype)
    columns, means, matrices = [], [], []
    for g in range(channels // d):
        rows = torch.stack([x[:, g * d + k][mask] for k in range(d)])  # (d, M)
        mu = rows.sum(1) / rows.shape[1]
        cov = sum(torch.outer(v, v) for v in (rows - mu[:, None]).unbind(1)) / rows.shape[1]
        means.append(mu.detach())
        if training:
            w = inverse_root(cov + eps * identity)
            matrices.append((w if running == "projection" else cov).detach())
        else:
            mu = p["running_mean"][g]
            w = p["running_projection"][g] if running == "projection" else inverse_root(p["running_covariance"][g] + eps * identity)
        for i in range(d):
            c = g * d + i
            y = sum(w[i, k] * (x[:, g * d + k] - mu[k]) for k in range(d))
            columns.append(y * per_channel(p, "weight", 1.0, c) + per_channel(p, "bias", 0.0, c))
    y = padded_as_zero(torch.stack(columns, 1), mask)
    if not training:
        return y, {}
    r, name = rate(p, momentum), f"running_{running}"
    return y, {
        "running_mean": (1 - r) * p["running_mean"] + r * torch.stack(means),
        name: (1 - r) * p[name] + r * torch.stack(matrices),
        "num_batches_tracked": p["num_batches_tracked"] + 1,
    }


def by_eigenvectors(s):
    values, vectors = torch.linalg.eigh(s)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def decorrelated_batch(x, p, *, training, mask=None, channels_per_group=16, eps=1e-5, momentum=0.1, running="projection", **_):
    options = {"training": training, "mask": mask, "d": channels_per_group, "eps": eps, "momentum": momentum, "running": running}
    return whitened(x, p, by_eigenvectors, **options)


def iterative(x, p, *, training, mask=None, channels_per_group=64, T=5, eps=1e-5, momentum=0.1, running="projection", **_):
    def published_form(s):
        trace = s.diagonal().sum()
        power = torch.eye(len(s), dtype=s.dtype)
        for _ in range(T):
            power = (3 * power - power @ power @ power @ (s / trace)) / 2
        return power / torch.sqrt(trace)

    options = {"training": training, "mask": mask, "d": channels_per_group, "eps": eps, "momentum": momentum, "running": running}
    return whitened(x, p, published_form, **options)
