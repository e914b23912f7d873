"""The EvoNorm family, one sample and channel at a time."""

from __future__ import annotations

import torch

from tests.references.norms import everything, moments, padded_as_zero, per_channel


def series_b(x, p, *, training, mask=None, variant="B0", eps=1e-5, momentum=0.1, apply_act=True, keep_norm=False, **_):
    mask = everything(x) if mask is None else mask
    channels, variances = [], []
    for j in range(x.shape[1]):
        samples = []
        if apply_act or keep_norm:
            var_b = moments(x[:, j][mask])[1] if training else p["running_var"][j]
            variances.append(var_b.detach())
        for i in range(x.shape[0]):
            values = x[i, j]
            if apply_act:
                var_i = moments(values[mask[i]])[1]
                deviation, rms = torch.sqrt(var_i + eps), torch.sqrt((values[mask[i]] ** 2).mean() + eps)
                other = {
                    "B0": lambda values=values, s=deviation, j=j: p["v"][j] * values + s,
                    "B1": lambda values=values, q=rms: (values + 1) * q,
                    "B2": lambda values=values, q=rms: q - values,
                }[variant]()
                values = values / torch.maximum(torch.sqrt(var_b + eps), other)
            elif keep_norm:
                values = values / torch.sqrt(var_b + eps)
            samples.append(values * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j))
        channels.append(torch.stack(samples))
    y = padded_as_zero(torch.stack(channels, 1), mask)
    return y, {"running_var": (1 - momentum) * p["running_var"] + momentum * torch.stack(variances)} if training and variances else {}


def series_s(x, p, *, mask=None, groups=32, group_size=None, variant="S0", eps=1e-5, apply_act=True, keep_norm=False, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    size = c // groups if group_size is None else group_size
    rows = []
    for i in range(n):
        for j in range(c):
            values, first = x[i, j], j // size * size
            group = torch.stack([x[i, k][mask[i]] for k in range(first, first + size)])
            square = (group**2).mean() if variant == "S2" else moments(group)[1]
            if apply_act:
                values = values * torch.sigmoid(values * (p["v"][j] if variant == "S0" else 1.0))
            if apply_act or keep_norm:
                values = values / torch.sqrt(square + eps)
            rows.append(values * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j))
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), {}
