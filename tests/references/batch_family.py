"""Filter response norm, ActNorm and the relatives of batch norm, retyped from their papers: naive, differentiable, float64."""

from __future__ import annotations

import torch

from tests.references.norms import batch, everything, moments, padded_as_zero, per_channel, rate


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


def batch_renorm(
    x, p, *, training, mask=None, eps=1e-3, momentum=0.01, r_max=3.0, d_max=5.0, warmup=(5000, 40000, 25000), track="std", **_
):
    mask = everything(x) if mask is None else mask
    steps = p["num_batches_tracked"].item()
    if warmup is not None:
        start, r_end, d_end = warmup
        r_max = 1 + (r_max - 1) * min(max((steps - start) / (r_end - start), 0), 1)
        d_max = d_max * min(max((steps - start) / (d_end - start), 0), 1)
    channels, means, spreads = [], [], []
    for c in range(x.shape[1]):
        m = p["running_mean"][c]
        s = p["running_std"][c] if track == "std" else torch.sqrt(p["running_var"][c] + eps)
        if training:
            mu, var = moments(x[:, c][mask])
            s_b = torch.sqrt(var + eps)
            r = min(max(s_b.item() / s.item(), 1 / r_max), r_max)
            d = min(max((mu.item() - m.item()) / s.item(), -d_max), d_max)
            z = (x[:, c] - mu) / s_b * r + d
            means.append(mu.detach())
            spreads.append(s_b.detach() if track == "std" else var.detach())
        else:
            z = (x[:, c] - m) / s
        channels.append(z * per_channel(p, "weight", 1.0, c) + per_channel(p, "bias", 0.0, c))
    y = padded_as_zero(torch.stack(channels, 1), mask)
    if not training:
        return y, {}
    a = rate(p, momentum)
    return y, {
        "running_mean": p["running_mean"] + a * (torch.stack(means) - p["running_mean"]),
        f"running_{track}": p[f"running_{track}"] + a * (torch.stack(spreads) - p[f"running_{track}"]),
        "num_batches_tracked": p["num_batches_tracked"] + 1,
    }


def ghost_batch(
    x,
    p,
    *,
    training,
    mask=None,
    virtual_batch_size=128,
    num_splits=None,
    eps=1e-5,
    momentum=0.1,
    track_running_stats=True,
    running_stats="sequential",
    **_,
):
    if not training and track_running_stats:
        return batch(x, p, training=False, mask=mask, eps=eps)
    mask = everything(x) if mask is None else mask
    parts = num_splits or -(-len(x) // virtual_batch_size)
    outputs, updates, steps = [], {}, 0
    totals = {"running_mean": 0.0, "running_var": 0.0}
    state = {**p}
    for piece, known in zip(x.tensor_split(parts), mask.tensor_split(parts), strict=True):
        y, moved = batch(piece, state, training=True, mask=known, eps=eps, momentum=momentum, track_running_stats=track_running_stats)
        outputs.append(y)
        if track_running_stats:
            r, steps = rate(state, momentum), steps + 1
            for name in totals:
                totals[name] = totals[name] + (moved[name] - (1 - r) * state[name]) / r  # what this part alone holds
            if momentum is not None:
                state |= moved | {"num_batches_tracked": p["num_batches_tracked"]}
    if track_running_stats:
        updates = {name: state[name] for name in totals}
        if momentum is None or running_stats == "mean":
            r = rate(p, None) if momentum is None else 1 - (1 - momentum) ** steps
            updates = {name: (1 - r) * p[name] + r * total / steps for name, total in totals.items()}
        updates["num_batches_tracked"] = p["num_batches_tracked"] + 1
    return torch.cat(outputs), updates


def reference_batch(channels):
    """A fixed reference batch of five samples."""
    return torch.randn(5, channels, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 1.5 - 0.5


def virtual_batch(x, p, *, mask=None, eps=1e-5, **_):
    mask = everything(x) if mask is None else mask
    reference = reference_batch(x.shape[1])
    rows = []
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            values, others = x[i, c][mask[i]], reference[:, c]
            # Means and mean squares, of one sample among len(reference) + 1; merged as the authors do.
            a = 1 / (len(reference) + 1)
            m = a * values.sum() / values.numel() + (1 - a) * others.mean()
            q = a * (values**2).sum() / values.numel() + (1 - a) * (others**2).mean()
            z = (x[i, c] - m) / torch.sqrt(q - m**2 + eps)
            rows.append(z * per_channel(p, "weight", 1.0, c) + per_channel(p, "bias", 0.0, c))
    return padded_as_zero(torch.stack(rows).reshape(x.shape), mask), {}


def in_place_batch(
    x, p, *, training, mask=None, eps=1e-5, activation="leaky_relu", activation_param=0.01, weight_mode="abs", affine=True, **options
):
    weight = p.get("weight")
    scale = None if weight is None else weight * torch.where(weight < 0, -1.0, 1.0) + eps if weight_mode == "abs" else weight
    inner = {name: value for name, value in p.items() if name != "weight"} | ({} if scale is None else {"weight": scale})
    z, updates = batch(x, inner, training=training, mask=mask, eps=eps, **options)
    if activation == "leaky_relu":
        y = torch.where(z >= 0, z, activation_param * z)
    elif activation == "elu":
        y = torch.where(z >= 0, z, activation_param * (torch.exp(torch.where(z >= 0, 0.0, z)) - 1))
    else:
        y = z
    return padded_as_zero(y, everything(x) if mask is None else mask), updates
