"""Conditional norms retyped from their papers: naive, differentiable, float64; the condition follows x in every signature."""

from __future__ import annotations

import itertools

import torch

from tests.references.norms import batch, everything, instance, moments, padded_as_zero


def deviation(values, eps, unbiased):
    """Mean and standard deviation of all given values, eps inside the root."""
    mean, var = moments(values)
    return mean, torch.sqrt(var * (values.numel() / (values.numel() - 1) if unbiased else 1.0) + eps)


def linear(c, p, name):
    """The linear layer ``name`` of one condition vector, written out."""
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    outputs = []
    for o in range(weight.shape[0]):
        value = sum(weight[o, i] * c[i] for i in range(weight.shape[1]))
        outputs.append(value if bias is None else value + bias[o])
    return torch.stack(outputs)


def adaptive_instance(x, p, style, *, mask=None, cond_dim=None, eps=1e-5, unbiased=False, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    rows = []
    for i in range(n):
        s = style[i if style.shape[0] > 1 else 0]
        generated = linear(s, p, "projection") if cond_dim is not None else None
        for j in range(c):
            if generated is None:
                target_mean, target_std = deviation(s[j].flatten(), eps, unbiased)
            else:
                target_std, target_mean = 1 + generated[j], generated[c + j]
            mu, std = deviation(x[i, j][mask[i]], eps, unbiased)
            rows.append(target_std * (x[i, j] - mu) / std + target_mean)
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), {}


def row(table, choice, i):
    """What sample i chooses of the table (K, C): one row by its number, or a blend by its shares."""
    if not choice.is_floating_point():
        return table[int(choice[i])]
    shares = choice if choice.ndim == 1 else choice[i if choice.shape[0] > 1 else 0]
    return sum(shares[k] * table[k] for k in range(table.shape[0]))


def conditional_instance(x, p, y, *, mask=None, eps=1e-5, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    rows = []
    for i in range(n):
        gamma, beta = row(p["weight"], y, i), row(p["bias"], y, i)
        for j in range(c):
            mu, var = moments(x[i, j][mask[i]])
            rows.append(gamma[j] * (x[i, j] - mu) / torch.sqrt(var + eps) + beta[j])
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), {}


def conditional_batch(x, p, condition, *, training, mask=None, cond_dim=None, eps=1e-5, momentum=0.1, track_running_stats=True, **_):
    normalized, updates = batch(
        x,
        {k: v for k, v in p.items() if "running" in k or "tracked" in k},
        training=training,
        mask=mask,
        eps=eps,
        momentum=momentum,
        track_running_stats=track_running_stats,
    )
    samples = []
    for i in range(x.shape[0]):
        if cond_dim is None:
            gamma, beta = row(p["weight"], condition, i), row(p["bias"], condition, i)
        else:
            e = condition[i if condition.shape[0] > 1 else 0]
            hidden = [linear(e, p, f"delta_{name}.hidden") for name in ("weight", "bias")]
            gamma, beta = (
                p[name] + linear(torch.where(h > 0, h, 0 * h), p, f"delta_{name}.out")
                for h, name in zip(hidden, ("weight", "bias"), strict=True)
            )
        spread = (-1, *[1] * (x.ndim - 2))
        samples.append(gamma.reshape(spread) * normalized[i] + beta.reshape(spread))
    y = torch.stack(samples)
    return (y if mask is None else padded_as_zero(y, mask)), updates


def film(x, p, condition, **_):
    c = x.shape[1]
    samples = []
    for i in range(x.shape[0]):
        made = linear(condition[i if condition.shape[0] > 1 else 0], p, "projection")
        samples.append(torch.stack([(1 + made[j]) * x[i, j] + made[c + j] for j in range(c)]))
    return torch.stack(samples), {}


def ada_layer(x, p, condition, *, mask=None, eps=1e-6, **_):
    y, _ = _modulated_rows(x, p, condition, mask, eps, 2)
    return y, {}


def ada_layer_zero(x, p, condition, *, mask=None, eps=1e-6, **_):
    """The two outputs, branch input and gate, as the even and odd features of one, for the table."""
    y, gate = _modulated_rows(x, p, condition, mask, eps, 3)
    return torch.where(torch.arange(x.shape[-1]) % 2 == 0, y, gate), {}


def _modulated_rows(x, p, condition, mask, eps, chunks):
    """One row at a time: (N, T, D) with a condition (N, E) or (N, T, E)."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    samples, gates = [], []
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            c = condition[i] if condition.ndim == 2 else condition[i, t]
            made = linear(c * torch.sigmoid(c), p, "projection").chunk(chunks)
            gates.append(made[-1])
            if not keep[i, t].any():
                samples.append(0 * x[i, t])
                continue
            mu, var = moments(x[i, t][keep[i, t]])
            row = (x[i, t] - mu) / torch.sqrt(var + eps) * (1 + made[1]) + made[0]
            samples.append(torch.where(keep[i, t], row, torch.zeros_like(row)))
    return torch.stack(samples).reshape(x.shape), torch.stack(gates).reshape(x.shape)


def convolved(x, weight, bias):
    """A convolution with an odd kernel that keeps the size: (K, *S) to (O, *S), one shift of the input after another."""
    spatial, kernel = x.shape[1:], weight.shape[2:]
    y = bias.reshape(-1, *[1] * len(spatial)).expand(-1, *spatial)
    padded = torch.zeros(x.shape[0], *(s + k - 1 for s, k in zip(spatial, kernel, strict=True)), dtype=x.dtype)
    inside = tuple(slice(k // 2, k // 2 + s) for s, k in zip(spatial, kernel, strict=True))
    padded[(slice(None), *inside)] = x
    for offset in itertools.product(*(range(k) for k in kernel)):
        window = padded[(slice(None), *(slice(o, o + s) for o, s in zip(offset, spatial, strict=True)))]
        y = y + torch.stack([sum(w * v for w, v in zip(row, window, strict=True)) for row in weight[(..., *offset)]])
    return y


def nearest(m, size):
    """A map (L, *T) resized to (L, *size): position i takes from floor(i T / S)."""
    for d, s in enumerate(size):
        m = m.index_select(d + 1, torch.tensor([i * m.shape[d + 1] // s for i in range(s)], dtype=torch.long))
    return m


def spade(x, p, labels, *, training, mask=None, norm="batch", eps=1e-5, momentum=0.1, **_):
    own = {name: value for name, value in p.items() if "running" in name or "tracked" in name}
    if norm == "batch":
        normalized, updates = batch(x, own, training=training, mask=mask, eps=eps, momentum=momentum)
    else:
        normalized, updates = instance(x, {}, training=training, mask=mask, eps=eps)
    keep = everything(x) if mask is None else mask
    samples = []
    for i in range(x.shape[0]):
        m = nearest(labels[i if labels.shape[0] > 1 else 0], x.shape[2:]) * keep[i]
        h = convolved(m, p["mlp_shared.0.weight"], p["mlp_shared.0.bias"])
        h = torch.where((h > 0) & keep[i], h, torch.zeros_like(h))
        gamma, beta = (convolved(h, p[f"mlp_{name}.weight"], p[f"mlp_{name}.bias"]) for name in ("gamma", "beta"))
        samples.append(normalized[i] * (1 + gamma) + beta)
    return padded_as_zero(torch.stack(samples), keep), updates
