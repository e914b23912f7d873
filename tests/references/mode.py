"""Mode normalization and its group form, one mode at a time."""

from __future__ import annotations

import torch

from tests.references.norms import everything, padded_as_zero, per_channel, rate


def weighted(values, weights):
    """Mean and biased variance of values that count ``weights`` times each."""
    total = weights.sum()
    mean = (weights * values).sum() / total
    return mean, (weights * (values - mean) ** 2).sum() / total, total


def mode(x, p, *, training, mask=None, num_modes=2, eps=1e-5, momentum=0.1, count_weighted=False, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    phi = torch.stack([torch.stack([x[i, j][mask[i]].mean() for j in range(c)]) for i in range(n)])
    gates = torch.softmax(phi @ p["gate_weight"].T + p["gate_bias"], 1)
    means, variances, shares = torch.zeros(num_modes, c).double(), torch.zeros(num_modes, c).double(), torch.zeros(num_modes).double()
    y = torch.zeros_like(x)
    for k in range(num_modes):
        channels = []
        for j in range(c):
            if training:
                weights = gates[:, k].reshape(n, *[1] * (x.ndim - 2)).expand(mask.shape)[mask]
                mu, var, total = weighted(x[:, j][mask], weights)
                means[k, j], variances[k, j], shares[k] = mu.detach(), var.detach(), total.detach() / mask.sum()
            else:
                mu, var = p["running_mean"][k, j], p["running_var"][k, j]
            channels.append((x[:, j] - mu) / torch.sqrt(var + eps))
        y = y + torch.stack(channels, 1) * gates[:, k].reshape(n, *[1] * (x.ndim - 1))
    y = torch.stack([y[:, j] * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j) for j in range(c)], 1)
    y = padded_as_zero(y, mask)
    if not training:
        return y, {}
    r = rate(p, momentum)
    # Averages of first and second moments; a batch counts for a mode by its share of it where that is asked for.
    old_share, new_share = (p["running_share"], shares) if count_weighted else torch.ones(2, num_modes).double()
    old, new = (1 - r) * old_share.unsqueeze(1), r * new_share.unsqueeze(1)
    first = (old * p["running_mean"] + new * means) / (old + new)
    second = (old * (p["running_var"] + p["running_mean"] ** 2) + new * (variances + means**2)) / (old + new)
    return y, {
        "running_mean": first,
        "running_var": second - first**2,
        "running_share": (1 - r) * p["running_share"] + r * shares,
        "num_batches_tracked": p["num_batches_tracked"] + 1,
    }


def mode_group(x, p, *, mask=None, num_modes=2, eps=1e-5, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    samples = []
    for i in range(n):
        kept = torch.stack([x[i, j][mask[i]] for j in range(c)])  # (C, positions with data)
        kept = kept.reshape(c, -1)
        gates = torch.softmax(kept.mean(1, keepdim=True) * p["gate_weight"] + p["gate_bias"], 1)  # (C, K)
        y = torch.zeros_like(x[i])
        for k in range(num_modes):
            weights = gates[:, k]
            mu, var, _ = weighted(kept, weights.unsqueeze(1).expand(kept.shape))
            y = y + (x[i] - mu) / torch.sqrt(var + eps) * weights.reshape(c, *[1] * (x.ndim - 2))
        samples.append(torch.stack([y[j] * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j) for j in range(c)]))
    return padded_as_zero(torch.stack(samples), mask), {}
