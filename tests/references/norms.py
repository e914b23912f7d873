"""Activation norms retyped from their papers: naive, differentiable, float64, one value at a time where that is clearest.

Every function takes the input ``x``, the parameters and buffers ``p`` by name, ``training``, an optional ``mask`` and the options of the
constructor, and returns the output and the buffers that a training step moves.
"""

from __future__ import annotations

import math

import torch


def moments(values):
    """Mean and biased variance of all given values, by two passes."""
    mean = values.sum() / values.numel()
    return mean, ((values - mean) ** 2).sum() / values.numel()


def everything(x):
    """A mask (N, *S) that is True everywhere."""
    return torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)


def padded_as_zero(y, mask):
    """Positions without data come out as 0."""
    return torch.where(mask.unsqueeze(1), y, torch.zeros((), dtype=y.dtype))


def per_channel(p, name, default, c):
    """Parameter ``name`` of channel ``c``, or the default where there is none."""
    return p[name][c] if p.get(name) is not None else torch.tensor(default, dtype=torch.float64)


def rate(p, momentum):
    """Weight of the new value in a running estimate."""
    return 1 / (p["num_batches_tracked"].item() + 1) if momentum is None else momentum


def batch(x, p, *, training, mask=None, eps=1e-5, momentum=0.1, track_running_stats=True, **_):
    mask = everything(x) if mask is None else mask
    channels, means, variances = [], [], []
    for c in range(x.shape[1]):
        values = x[:, c][mask]
        if training or not track_running_stats:
            mu, var = moments(values)
        else:
            mu, var = p["running_mean"][c], p["running_var"][c]
        means.append(mu.detach())
        variances.append(var.detach() * values.numel() / (values.numel() - 1))
        channels.append((x[:, c] - mu) / torch.sqrt(var + eps) * per_channel(p, "weight", 1.0, c) + per_channel(p, "bias", 0.0, c))
    y = padded_as_zero(torch.stack(channels, 1), mask)
    return y, running(p, means, variances, momentum) if training and track_running_stats else {}


def running(p, means, variances, momentum):
    r = rate(p, momentum)
    return {
        "running_mean": (1 - r) * p["running_mean"] + r * torch.stack(means),
        "running_var": (1 - r) * p["running_var"] + r * torch.stack(variances),
        "num_batches_tracked": p["num_batches_tracked"] + 1,
    }


def instance(x, p, *, training, mask=None, eps=1e-5, momentum=0.1, track_running_stats=False, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    y = torch.zeros_like(x)
    means, variances = torch.zeros(n, c, dtype=x.dtype), torch.zeros(n, c, dtype=x.dtype)
    rows = []
    for i in range(n):
        for j in range(c):
            values = x[i, j][mask[i]]
            mu, var = moments(values)
            means[i, j], variances[i, j] = mu.detach(), var.detach() * values.numel() / (values.numel() - 1)
            if track_running_stats and not training:
                mu, var = p["running_mean"][j], p["running_var"][j]
            rows.append((x[i, j] - mu) / torch.sqrt(var + eps) * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j))
    y = padded_as_zero(torch.stack(rows).reshape(x.shape), mask)
    learned = training and track_running_stats
    return y, running(p, list(means.mean(0)), list(variances.mean(0)), momentum) if learned else {}


def group(x, p, *, mask=None, num_groups, eps=1e-5, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    k = c // num_groups
    rows = []
    for i in range(n):
        for j in range(c):
            first = j // k * k
            mu, var = moments(torch.stack([x[i, m][mask[i]] for m in range(first, first + k)]))
            rows.append((x[i, j] - mu) / torch.sqrt(var + eps) * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j))
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), {}


def layer(x, p, *, mask=None, eps=1e-5, **_):
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    rows = []
    for row, kept in zip(x.reshape(-1, x.shape[-1]), keep.reshape(-1, x.shape[-1]), strict=True):
        if not kept.any():
            rows.append(row * 0)
            continue
        mu, var = moments(row[kept])
        z = (row - mu) / torch.sqrt(var + eps)
        z = z if p.get("weight") is None else z * p["weight"]
        z = z if p.get("bias") is None else z + p["bias"]
        rows.append(torch.where(kept, z, torch.zeros_like(z)))
    return torch.stack(rows).reshape(x.shape), {}


def rms(x, p, *, mask=None, eps=None, partial=None, eps_inside=True, weight_offset=0.0, **_):
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    measured = x.shape[-1] if partial is None else math.ceil(partial * x.shape[-1])
    rows = []
    for row, kept in zip(x.reshape(-1, x.shape[-1]), keep.reshape(-1, x.shape[-1]), strict=True):
        values = row[:measured][kept[:measured]]
        mean_square = (values**2).sum() / max(values.numel(), 1)
        z = row / torch.sqrt(mean_square + eps) if eps_inside else row / (torch.sqrt(mean_square) + eps)
        z = z if p.get("weight") is None else z * (p["weight"] + weight_offset)
        z = z if p.get("bias") is None else z + p["bias"]
        rows.append(torch.where(kept, z, torch.zeros_like(z)))
    return torch.stack(rows).reshape(x.shape), {}


def switch(x, p, *, training, mask=None, eps=1e-5, momentum=0.1, using=("instance", "layer", "batch"), **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    active = [k for k, name in enumerate(using) if x.ndim > 2 or name != "instance"]
    share_mean, share_var = torch.softmax(p["mean_weight"][active], 0), torch.softmax(p["var_weight"][active], 0)
    rows, means, variances = [], [], []
    for j in range(c):
        batch_moments = moments(x[:, j][mask])
        means.append(batch_moments[0].detach())
        variances.append(batch_moments[1].detach())
    for i in range(n):
        layer_moments = moments(torch.stack([x[i, j][mask[i]] for j in range(c)]))
        for j in range(c):
            known = {"instance": moments(x[i, j][mask[i]]), "layer": layer_moments}
            if "batch" in using:
                known["batch"] = moments(x[:, j][mask]) if training else (p["running_mean"][j], p["running_var"][j])
            mu = sum(w * known[using[k]][0] for w, k in zip(share_mean, active, strict=True))
            var = sum(w * known[using[k]][1] for w, k in zip(share_var, active, strict=True))
            rows.append((x[i, j] - mu) / torch.sqrt(var + eps) * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j))
    y = padded_as_zero(torch.stack(rows).reshape(x.shape), mask)
    return y, running(p, means, variances, momentum) if training and "batch" in using else {}


def batch_channel(x, p, *, training, mask=None, num_groups, eps=1e-5, momentum=0.1, estimate=False, variance="drift", **_):
    mask = everything(x) if mask is None else mask
    c = x.shape[1]
    if not estimate:
        z, updates = batch(x, p, training=training, mask=mask, eps=eps, momentum=momentum)
    else:
        channels, means, variances = [], [], []
        for j in range(c):
            values = x[:, j][mask].detach()
            old_mean, old_var = p["running_mean"][j], p["running_var"][j]
            means.append(moments(values)[0])
            about = old_mean if variance == "drift" else means[-1]
            variances.append(((values - about) ** 2).mean())
            r = rate(p, momentum) if training else 0.0
            mu = (1 - r) * old_mean + r * means[-1]
            var = (1 - r) * old_var + r * variances[-1]
            channels.append((x[:, j] - mu) / torch.sqrt(var + eps) * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j))
        z, updates = torch.stack(channels, 1), running(p, means, variances, momentum) if training else {}
    affine = {}
    if p.get("channel_weight") is not None:
        affine = {name: p[f"channel_{name}"].repeat_interleave(c // num_groups) for name in ("weight", "bias")}
    return group(z, affine, mask=mask, num_groups=num_groups, eps=eps)[0], updates
