"""Recurrent layers with layer norm inside, retyped from the paper's supplement: one sample and one step at a time, float64."""

from __future__ import annotations

import torch

from tests.references.norms import moments


def norm(z, p, name, eps, groups=1):
    """Layer norm of a vector, or of each of its equal parts, with gain and shift of the whole length."""
    parts = []
    for part in z.chunk(groups):
        mean, var = moments(part)
        parts.append((part - mean) / torch.sqrt(var + eps))
    return torch.cat(parts) * p[f"{name}.weight"] + p[f"{name}.bias"]


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def lstm_step(x, h, c, p, cell, eps, gate_norm, forget_bias):
    groups = 4 if gate_norm == "per_gate" else 1
    gates = norm(p[f"{cell}.weight_ih"] @ x, p, f"{cell}.norm_ih", eps, groups)
    gates = gates + norm(p[f"{cell}.weight_hh"] @ h, p, f"{cell}.norm_hh", eps, groups)
    if f"{cell}.bias" in p:
        gates = gates + p[f"{cell}.bias"]
    size = h.shape[0]
    i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
    c = sigmoid(f + forget_bias) * c + sigmoid(i) * torch.tanh(g)
    return sigmoid(o) * torch.tanh(norm(c, p, f"{cell}.norm_c", eps)), c


def gru_step(x, h, p, cell, eps, gate_norm):
    size, groups = h.shape[0], 2 if gate_norm == "per_gate" else 1
    of_x, of_h = p[f"{cell}.weight_ih"] @ x, p[f"{cell}.weight_hh"] @ h
    gates = norm(of_x[: 2 * size], p, f"{cell}.norm_ih", eps, groups) + norm(of_h[: 2 * size], p, f"{cell}.norm_hh", eps, groups)
    r, z = sigmoid(gates[:size]), sigmoid(gates[size:])
    n = torch.tanh(norm(of_x[2 * size :], p, f"{cell}.norm_in", eps) + r * norm(of_h[2 * size :], p, f"{cell}.norm_hn", eps))
    return z * h + (1 - z) * n


def sequence(x, p, step, state, layers, directions):
    """One sequence (T, I) through all layers; the outputs (T, directions * H), and the last states (layers * directions, H) each."""
    finals = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            now, steps = tuple(part[k] for part in state), {}
            for t in range(x.shape[0]) if direction == 0 else reversed(range(x.shape[0])):
                now = step(x[t], *now, p, f"cells.{k}")
                now = now if isinstance(now, tuple) else (now,)
                steps[t] = now[0]
            outputs.append(torch.stack([steps[t] for t in range(x.shape[0])]))
            finals.append(now)
        x = torch.cat(outputs, 1)
    return x, [torch.stack(parts) for parts in zip(*finals, strict=True)]


def layers_of(x, p, parts, step, num_layers, bidirectional):
    """A batch (N, T, I) from the state 0."""
    directions, size = 1 + bidirectional, p["cells.0.weight_hh"].shape[1]
    zeros = (torch.zeros(num_layers * directions, size, dtype=x.dtype),) * parts
    return torch.stack([sequence(sample, p, step, zeros, num_layers, directions)[0] for sample in x]), {}


def lstm(x, p, *, num_layers=1, bidirectional=False, eps=1e-5, gate_norm="joint", forget_bias=0.0, **_):
    def step(x, h, c, p, cell):
        return lstm_step(x, h, c, p, cell, eps, gate_norm, forget_bias)

    return layers_of(x, p, 2, step, num_layers, bidirectional)


def gru(x, p, *, num_layers=1, bidirectional=False, eps=1e-5, gate_norm="joint", **_):
    def step(x, h, p, cell):
        return gru_step(x, h, p, cell, eps, gate_norm)

    return layers_of(x, p, 1, step, num_layers, bidirectional)
