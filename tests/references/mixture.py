"""Mixture normalization in raw coordinates, one point and component at a time."""

from __future__ import annotations

import math

import torch

from tests.references.norms import everything, moments, padded_as_zero, per_channel

FLOOR = 1e-3


def posteriors(points, share, mean, var, spread):
    """p (M, K) of ``points`` (M, C); no component is narrower than a share of ``spread`` (C,), the variance of the whole."""
    rows = []
    for point in points:
        logs = []
        for k in range(len(share)):
            v = torch.maximum(var[k], FLOOR * spread)
            logs.append(math.log(share[k]) - 0.5 * ((point - mean[k]) ** 2 / v + torch.log(v)).sum())
        rows.append(torch.softmax(torch.stack(logs), 0))
    return torch.stack(rows)


def maximum(points, p):
    share, means, variances = p.mean(0), [], []
    for k in range(p.shape[1]):
        weights = (p[:, k] / p[:, k].sum()).unsqueeze(1)
        means.append((weights * points).sum(0))
        variances.append((weights * (points - means[-1]) ** 2).sum(0))
    return share, torch.stack(means), torch.stack(variances)


def mixture(
    x, p, *, training, mask=None, responsibilities=None, num_components=3, em_steps=5, eps=1e-5, momentum=0.1, fisher_scale=True, **_
):
    """Where ``p`` is initialized: the fit starts at the running estimates."""
    mask = everything(x) if mask is None else mask
    c = x.shape[1]
    points = x.movedim(1, -1)[mask]  # (M, C)
    state = tuple(p[name].detach() for name in ("running_share", "running_mean", "running_var"))
    if responsibilities is not None:
        r = responsibilities.movedim(1, -1)[mask]
        r = r / r.sum(1, keepdim=True)
    elif training:
        fixed = points.detach()
        spread = torch.stack([moments(fixed[:, j])[1] for j in range(c)])
        r = posteriors(fixed, *state, spread)
        for _ in range(em_steps):
            r = posteriors(fixed, *maximum(fixed, r), spread)
    else:
        whole = (state[0].unsqueeze(1) * state[1]).sum(0)
        spread = (state[0].unsqueeze(1) * (state[2] + (state[1] - whole) ** 2)).sum(0)
        r = posteriors(points.detach(), *state, spread)
    share, mean, var = maximum(points, r) if training else state
    z = torch.zeros_like(points)
    for k in range(num_components):
        factor = 1 / torch.sqrt(share[k]) if fisher_scale else 1.0
        z = z + r[:, k : k + 1] * factor * (points - mean[k]) / torch.sqrt(var[k] + eps)
    z = torch.stack([z[:, j] * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j) for j in range(c)], 1)
    y = torch.zeros_like(x).movedim(1, -1).masked_scatter(mask.unsqueeze(-1), z).movedim(-1, 1)
    updates = {}
    if training:
        for name, old, new in zip(("running_share", "running_mean", "running_var"), state, (share, mean, var), strict=True):
            updates[name] = (1 - momentum) * old + momentum * new.detach()
    return padded_as_zero(y, mask), updates
