"""Response, local and per-position norms retyped from their papers: naive, differentiable, float64, one position at a time.

The signatures are those of tests/references/norms.py.
"""

from __future__ import annotations

import torch

from tests.references.norms import everything, padded_as_zero


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
