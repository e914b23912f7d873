"""Conditional norms retyped from their papers: naive, differentiable, float64; the condition follows x in every signature."""

from __future__ import annotations

import torch

from tests.references.norms import everything, moments, padded_as_zero


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
