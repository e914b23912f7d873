"""Norms with a learned gate or mixture, retyped from their papers: naive, differentiable, float64."""

from __future__ import annotations

import math

import torch

from tests.references.norms import everything, moments, padded_as_zero, per_channel, running

HEADS = {  # activations behind each linear map, and whether a norm stands before them
    "sigmoid": ("sigmoid", False),
    "hidden_sigmoid": ("relu sigmoid", False),
    "norm_hsigmoid": ("hsigmoid", True),
    "hidden_norm_hsigmoid": ("relu hsigmoid", True),
    "hsigmoid": ("hsigmoid", False),
    "norm_sigmoid": ("sigmoid", True),
    "norm_softmax": ("softmax", True),
}
ACTIVATIONS = {
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "hsigmoid": lambda z: torch.clamp(z + 3, 0, 6) / 6,
    "relu": lambda z: torch.where(z > 0, z, 0 * z),
    "softmax": lambda z: torch.exp(z) / torch.exp(z).sum(),
}


def attentive(
    x,
    p,
    *,
    training,
    mask=None,
    norm="batch",
    num_groups=32,
    attention="norm_hsigmoid",
    normalize_attention=False,
    eps=1e-5,
    momentum=0.1,
    track_running_stats=True,
    **_,
):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    tracked, updates = track_running_stats and not training, {}

    # what the head reads: mean over deviation of every channel of every sample
    z = []
    for i in range(n):
        cells = [moments(x[i, j][mask[i]]) for j in range(c)]
        z.append(torch.stack([mean / torch.sqrt(var + 1e-3) for mean, var in cells]))
    activations, normed = HEADS[attention]
    for k, activation in enumerate(activations.split()):
        weight = p[f"head.{k}.weight"]
        z = [torch.stack([(row * sample).sum() for row in weight]) for sample in z]
        if not normed:
            z = [sample + p[f"head.{k}.bias"] for sample in z]
        elif norm == "group":
            z = [(sample - sample.mean()) / torch.sqrt(moments(sample)[1] + eps) for sample in z]
        else:
            units = range(weight.shape[0])
            of_batch = [moments(torch.stack([sample[u] for sample in z])) for u in units]
            if training and track_running_stats:
                own = {name: p[f"head.{k}.{name}"] for name in ("running_mean", "running_var", "num_batches_tracked")}
                moved = running(own, [m.detach() for m, _ in of_batch], [v.detach() * n / (n - 1) for _, v in of_batch], momentum)
                updates |= {f"head.{k}.{name}": value for name, value in moved.items()}
            means = p[f"head.{k}.running_mean"] if tracked else torch.stack([m for m, _ in of_batch])
            variances = p[f"head.{k}.running_var"] if tracked else torch.stack([v for _, v in of_batch])
            z = [(sample - means) / torch.sqrt(variances + eps) for sample in z]
        if normed:
            z = [sample * p[f"head.{k}.norm_weight"] + p[f"head.{k}.norm_bias"] for sample in z]
        z = [ACTIVATIONS[activation](sample) for sample in z]
    if normalize_attention:
        z = [sample / sample.sum() for sample in z]

    of_channel = [moments(x[:, j][mask]) for j in range(c)]
    counts = mask.sum().item()
    if norm == "batch" and training and track_running_stats:
        updates |= running(p, [m.detach() for m, _ in of_channel], [v.detach() * counts / (counts - 1) for _, v in of_channel], momentum)
    rows = []
    for i in range(n):
        for j in range(c):
            if norm == "group":
                k = c // num_groups
                mu, var = moments(torch.stack([x[i, g][mask[i]] for g in range(j // k * k, j // k * k + k)]))
            elif tracked:
                mu, var = p["running_mean"][j], p["running_var"][j]
            else:
                mu, var = of_channel[j]
            gamma, beta = ((z[i] * p[name][:, j]).sum() for name in ("weight", "bias"))
            rows.append(gamma * (x[i, j] - mu) / torch.sqrt(var + eps) + beta)
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), updates


def ilm(x, p, *, mask=None, norm="group", num_groups=32, key_group_size=16, eps=1e-5, **_):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    size = {"group": c // num_groups if num_groups <= c else c, "instance": 1, "layer": c}[norm]
    samples = []
    for i in range(n):
        keys = [moments(torch.stack([x[i, j][mask[i]] for j in range(g, g + key_group_size)])) for g in range(0, c, key_group_size)]
        key_mean, key_var = (torch.stack([key[part] for key in keys]) for part in (0, 1))
        codes = [[(row * z).sum().clamp(min=0) for row in p["encoder"]] for z in (key_var, key_mean)]
        omega = [1 / (1 + torch.exp(-sum(w * e for w, e in zip(row, codes[0], strict=True)))) for row in p["to_weight"]]
        beta = [torch.tanh(sum(w * e for w, e in zip(row, codes[1], strict=True))) for row in p["to_bias"]]
        channels = []
        for j in range(c):
            first = j // size * size
            mu, var = moments(torch.stack([x[i, g][mask[i]] for g in range(first, first + size)]))
            key = j // key_group_size
            channels.append((omega[key] + p["weight"][j]) * (x[i, j] - mu) / torch.sqrt(var + eps) + beta[key] + p["bias"][j])
        samples.append(torch.stack(channels))
    return padded_as_zero(torch.stack(samples), mask), {}


def sparsemax(z):
    """The projection of a vector on the simplex."""
    order = sorted(range(len(z)), key=lambda k: -z[k].item())
    total, support = 0.0, []
    for k in order:
        total = total + z[k]
        if 1 + (len(support) + 1) * z[k].item() <= total.item():
            total = total - z[k]
            break
        support.append(k)
    tau = (total - 1) / len(support)
    return [z[k] - tau if k in support else 0 * z[k] for k in range(len(z))]


def sparsestmax(z, radius, center):
    """Pushed away from the centre of the simplex, face by face."""
    p = sparsemax(z)
    face = [k for k in range(len(z)) if center == "simplex" or p[k].item() > 0]
    while True:
        middle = {k: 1 / len(face) for k in face}
        away = [p[k] - middle.get(k, 0.0) for k in range(len(z))]
        distance = torch.sqrt(sum(a**2 for a in away))
        if len([q for q in p if q.item() > 0]) == 1 or distance.item() >= radius:
            return p
        pushed = [middle.get(k, 0.0) + radius * away[k] / distance for k in range(len(z))]
        if min(q.item() for q in pushed) >= 0:
            return pushed
        p = sparsemax(pushed)
        smaller = [k for k in face if p[k].item() > 0]
        apart = sum((1 / len(face) - (1 / len(smaller) if k in smaller else 0.0)) ** 2 for k in face)
        radius, face = math.sqrt(max(radius**2 - apart, 0.0)), smaller


def sparse_switch(
    x,
    p,
    *,
    training,
    mask=None,
    eps=1e-5,
    momentum=0.003,
    using=("instance", "layer", "batch"),
    transform="sparsestmax",
    center="simplex",
    track_running_stats=True,
    **_,
):
    mask = everything(x) if mask is None else mask
    n, c = x.shape[:2]
    shares = []
    for kind in ("mean", "var"):
        logits, choice = list(p[f"{kind}_weight"]), int(p[f"{kind}_choice"])
        share = sparsemax(logits) if transform == "sparsemax" else sparsestmax(logits, p["radius"].item(), center)
        shares.append(share if choice < 0 else [torch.tensor(float(k == choice), dtype=x.dtype) for k in range(len(using))])
    of_channel = [moments(x[:, j][mask]) for j in range(c)]
    estimated = track_running_stats and not training
    rows = []
    for i in range(n):
        of_sample = moments(torch.stack([x[i, j][mask[i]] for j in range(c)]))
        for j in range(c):
            known = {"instance": moments(x[i, j][mask[i]]), "layer": of_sample, "batch": of_channel[j]}
            if "batch" in using and estimated:
                known["batch"] = p["running_mean"][j], p["running_var"][j]
            mu = sum(w * known[name][0] for w, name in zip(shares[0], using, strict=True))
            var = sum(w * known[name][1] for w, name in zip(shares[1], using, strict=True))
            rows.append((x[i, j] - mu) / torch.sqrt(var + eps) * per_channel(p, "weight", 1.0, j) + per_channel(p, "bias", 0.0, j))
    updates = {}
    if training and track_running_stats and "batch" in using:
        updates = running(p, [m.detach() for m, _ in of_channel], [v.detach() for _, v in of_channel], momentum)
    for kind, share in zip(("mean", "var"), shares, strict=True):
        sole = [k for k, w in enumerate(share) if w.item() >= 1 - 1e-6]
        if training and sole:
            updates[f"{kind}_choice"] = torch.tensor(sole[0])
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), updates
