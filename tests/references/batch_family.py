"""Filter response norm, ActNorm and the relatives of batch norm, retyped from their papers: naive, differentiable, float64."""

from __future__ import annotations

import torch

from tests.references.norms import everything, padded_as_zero, per_channel


def filter_response(x, p, *, mask=None, eps=1e-6, **_):
    mask = everything(x) if mask is None else mask
    rows = []
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[i, c][mask[i]]
            nu2 = (values**2).sum() / values.numel()
            divisor = torch.sqrt(nu2 + eps + torch.abs(per_channel(p, "eps_l", 0.0, c)))
            rows.append(x[i, c] / divisor * per_channel(p, "weight", 1.0, c) + per_channel(p, "bias", 0.0, c))
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), {}


def thresholded_linear(x, p, **_):
    return torch.stack([torch.relu(x[:, c] - p["tau"][c]) + p["tau"][c] for c in range(x.shape[1])], 1), {}


def filter_response_tlu(x, p, *, mask=None, **options):
    inner = {name.removeprefix("norm.").removeprefix("tlu."): value for name, value in p.items()}
    y, _ = thresholded_linear(filter_response(x, inner, mask=mask, **options)[0], inner)
    return padded_as_zero(y, everything(x) if mask is None else mask), {}


def activation(x, p, *, mask=None, logscale_factor=1.0, **_):
    mask = everything(x) if mask is None else mask
    scale = torch.exp(logscale_factor * p["log_scale"])
    return padded_as_zero(torch.stack([(x[:, c] + p["bias"][c]) * scale[c] for c in range(x.shape[1])], 1), mask), {}
