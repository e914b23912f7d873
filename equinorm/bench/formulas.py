"""Published formulas from tensor operations, as authors' implementations compose them: peers for methods that no library has.

Each is ``formula(x, p, training)`` with the parameters and buffers of ours in ``p``; x is (N, C, H, W), or (..., D) for rows. None updates
running estimates, which costs next to nothing and is in the formula's favour.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
POSITIONS, BATCH, SAMPLE = (2, 3), (0, 2, 3), (1, 2, 3)


def affine(y: Tensor, p: State) -> Tensor:
    """Scale and shift per channel."""
    return y * p["weight"].view(1, -1, 1, 1) + p["bias"].view(1, -1, 1, 1)


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over ``dims``, which are kept."""
    return x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)


def batch_moments(x: Tensor, p: State, training: bool) -> tuple[Tensor, Tensor]:
    """The batch's in training, the running estimates otherwise."""
    if training:
        return moments(x, BATCH)
    return p["running_mean"].view(1, -1, 1, 1), p["running_var"].view(1, -1, 1, 1)


def mean_only_batch(x: Tensor, p: State, training: bool) -> Tensor:
    """Mean-only batch norm."""
    mean = x.mean(BATCH, keepdim=True) if training else p["running_mean"].view(1, -1, 1, 1)
    return x - mean + p["bias"].view(1, -1, 1, 1)


def batch_renorm(x: Tensor, p: State, training: bool) -> Tensor:
    """Batch renormalization before its limits open, at the start of the warm-up: r = 1 and d = 0."""
    running_mean, running_std = p["running_mean"].view(1, -1, 1, 1), p["running_std"].view(1, -1, 1, 1)
    if not training:
        return affine((x - running_mean) / running_std, p)
    mean, var = moments(x, BATCH)
    std = (var + 1e-3).sqrt()
    r = (std.detach() / running_std).clamp(1.0, 1.0)
    d = ((mean.detach() - running_mean) / running_std).clamp(0.0, 0.0)
    return affine((x - mean) / std * r + d, p)


def ghost_batch(x: Tensor, p: State, training: bool, parts: int = 4) -> Tensor:
    """Ghost batch norm: batch norm of each part of the batch."""
    if not training:
        return F.batch_norm(x, p["running_mean"], p["running_var"], p["weight"], p["bias"])
    return torch.cat([F.batch_norm(part, None, None, p["weight"], p["bias"], training=True) for part in x.chunk(parts)])


def batch_channel(x: Tensor, p: State, training: bool, groups: int = 32) -> Tensor:
    """Batch norm and channel norm one after the other, each from tensor operations."""
    mean, var = batch_moments(x, p, training)
    z = affine((x - mean) / (var + 1e-5).sqrt(), p)
    grouped = z.reshape(x.shape[0], groups, -1)
    mean, var = moments(grouped, (2,))
    y = (grouped - mean) / (var + 1e-5).sqrt()
    return (y * p["channel_weight"][:, None] + p["channel_bias"][:, None]).view(x.shape)


def batch_channel_layers(x: Tensor, p: State, training: bool, groups: int = 32) -> Tensor:
    """The same with torch's two layers, the channel norm's map repeated for the channels of a group."""
    running = (None, None) if training else (p["running_mean"], p["running_var"])
    z = F.batch_norm(x, *running, p["weight"], p["bias"], training=training)
    weight, bias = (p[f"channel_{name}"].repeat_interleave(x.shape[1] // groups) for name in ("weight", "bias"))
    return F.group_norm(z, groups, weight, bias)


def evonorm_b(x: Tensor, p: State, training: bool) -> Tensor:
    """EvoNorm-B0."""
    var = x.var(BATCH, correction=0, keepdim=True) if training else p["running_var"].view(1, -1, 1, 1)
    instance = (x.var(POSITIONS, correction=0, keepdim=True) + 1e-5).sqrt()
    return affine(x / torch.maximum((var + 1e-5).sqrt(), p["v"].view(1, -1, 1, 1) * x + instance), p)


def evonorm_s(x: Tensor, p: State, training: bool, groups: int = 32) -> Tensor:
    """EvoNorm-S0."""
    grouped = x.reshape(x.shape[0], groups, -1)
    std = (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    gated = (x * (x * p["v"].view(1, -1, 1, 1)).sigmoid()).reshape(grouped.shape)
    return affine((gated / std).view(x.shape), p)


def filter_response(x: Tensor, p: State, training: bool) -> Tensor:
    """Filter response norm."""
    return affine(x * (x.square().mean(POSITIONS, keepdim=True) + 1e-6).rsqrt(), p)


def filter_response_tlu(x: Tensor, p: State, training: bool) -> Tensor:
    """Filter response norm and its thresholded linear unit."""
    y = filter_response(x, {"weight": p["norm.weight"], "bias": p["norm.bias"]}, training)
    return torch.maximum(y, p["tlu.tau"].view(1, -1, 1, 1))


def global_response(x: Tensor, p: State, training: bool) -> Tensor:
    """Global response norm."""
    energy = x.norm(p=2, dim=POSITIONS, keepdim=True)
    share = energy / (energy.mean(1, keepdim=True) + 1e-6)
    return x + p["weight"].view(1, -1, 1, 1) * (x * share) + p["bias"].view(1, -1, 1, 1)


def pixel(x: Tensor, p: State, training: bool) -> Tensor:
    """Pixel norm."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def positional(x: Tensor, p: State, training: bool) -> Tensor:
    """Positional norm."""
    mean, var = moments(x, (1,))
    return (x - mean) / (var + 1e-5).sqrt()


def layer_scaling(x: Tensor, p: State, training: bool) -> Tensor:
    """Layer scaling."""
    return x * (x.square().mean(SAMPLE, keepdim=True) + 1e-5).rsqrt()


def switch(x: Tensor, p: State, training: bool) -> Tensor:
    """Switchable norm, with the layer's and the batch's moments from the instances'."""
    mean_in, var_in = moments(x, POSITIONS)
    square = var_in + mean_in**2
    mean_ln = mean_in.mean(1, keepdim=True)
    var_ln = square.mean(1, keepdim=True) - mean_ln**2
    if training:
        mean_bn = mean_in.mean(0, keepdim=True)
        var_bn = square.mean(0, keepdim=True) - mean_bn**2
    else:
        mean_bn, var_bn = p["running_mean"].view(1, -1, 1, 1), p["running_var"].view(1, -1, 1, 1)
    mean_share, var_share = p["mean_weight"].softmax(0), p["var_weight"].softmax(0)
    mean = mean_share[0] * mean_in + mean_share[1] * mean_ln + mean_share[2] * mean_bn
    var = var_share[0] * var_in + var_share[1] * var_ln + var_share[2] * var_bn
    return affine((x - mean) / (var + 1e-5).sqrt(), p)


def mode(x: Tensor, p: State, training: bool) -> Tensor:
    """Mode norm, with a loop over the modes."""
    gates = F.linear(x.mean(POSITIONS), p["gate_weight"], p["gate_bias"]).softmax(1)  # (N, K)
    y = torch.zeros_like(x)
    for k in range(gates.shape[1]):
        gate = gates[:, k].view(-1, 1, 1, 1)
        if training:
            share = gate / (gate.sum() * x.shape[2] * x.shape[3])
            mean = (share * x).sum(BATCH, keepdim=True)
            var = (share * (x - mean) ** 2).sum(BATCH, keepdim=True)
        else:
            mean, var = p["running_mean"][k].view(1, -1, 1, 1), p["running_var"][k].view(1, -1, 1, 1)
        y = y + gate * (x - mean) / (var + 1e-5).sqrt()
    return affine(y, p)


def mode_group(x: Tensor, p: State, training: bool) -> Tensor:
    """Mode group norm, with a loop over the modes."""
    gates = (x.mean(POSITIONS).unsqueeze(2) * p["gate_weight"] + p["gate_bias"]).softmax(2)  # (N, C, K)
    y = torch.zeros_like(x)
    for k in range(gates.shape[2]):
        gate = gates[:, :, k, None, None]
        share = gate / (gate.sum(1, keepdim=True) * x.shape[2] * x.shape[3])
        mean = (share * x).sum(SAMPLE, keepdim=True)
        var = (share * (x - mean) ** 2).sum(SAMPLE, keepdim=True)
        y = y + gate * (x - mean) / (var + 1e-5).sqrt()
    return affine(y, p)


def conditional_instance(x: Tensor, p: State, training: bool, classes: Tensor) -> Tensor:
    """Conditional instance norm: torch's instance norm, then the map of each sample's class."""
    y = F.instance_norm(x)
    return y * p["weight"][classes][:, :, None, None] + p["bias"][classes][:, :, None, None]


def whiten(x: Tensor, p: State, training: bool, root: object, size: int) -> Tensor:
    """Whitening of groups of ``size`` channels by ``root`` of their covariance."""
    groups = x.shape[1] // size
    data = x.transpose(0, 1).reshape(groups, size, -1)  # (G, D, N H W)
    if training:
        mean = data.mean(2, keepdim=True)
        centred = data - mean
        cov = centred @ centred.transpose(1, 2) / data.shape[2]
        projection = root(cov)  # type: ignore[operator]
    else:
        centred, projection = data - p["running_mean"].unsqueeze(2), p["running_projection"]
    y = (projection @ centred).reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
    return affine(y, p)


def decorrelated_batch(x: Tensor, p: State, training: bool) -> Tensor:
    """Decorrelated batch norm by eigenvectors."""

    def root(cov: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(cov + 1e-5 * torch.eye(cov.shape[-1], dtype=cov.dtype))
        return vectors @ (values.rsqrt().unsqueeze(2) * vectors.transpose(1, 2))

    return whiten(x, p, training, root, 16)


def iterative(x: Tensor, p: State, training: bool) -> Tensor:
    """Iterative normalization by five of Newton's steps."""

    def root(cov: Tensor) -> Tensor:
        identity = torch.eye(cov.shape[-1], dtype=cov.dtype)
        s = cov + 1e-5 * identity
        trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        s = s / trace
        root = identity.expand_as(s)
        for _ in range(5):
            root = 1.5 * root - 0.5 * root @ root @ root @ s
        return root / trace.sqrt()

    return whiten(x, p, training, root, 64)


def local_contrast(x: Tensor, p: State, training: bool, size: int = 9, sigma: float = 2.0) -> Tensor:
    """Local contrast norm by convolutions with the whole window over all channels."""
    taps = torch.exp(-(torch.arange(size, dtype=torch.float64) - size // 2).square() / (2 * sigma**2))
    window = torch.outer(taps, taps)
    kernel = (window / window.sum() / x.shape[1]).to(x).expand(1, x.shape[1], size, size)
    inside = F.conv2d(torch.ones_like(x[:1]), kernel, padding=size // 2)
    v = x - F.conv2d(x, kernel, padding=size // 2) / inside
    deviation = (F.conv2d(v.square(), kernel, padding=size // 2) / inside).sqrt()
    return v / torch.maximum(deviation, deviation.mean(POSITIONS, keepdim=True).clamp(min=1e-4))


def generalized_divisive(x: Tensor, p: State, training: bool) -> Tensor:
    """Generalized divisive norm by a 1x1 convolution of the squares."""
    pedestal = 2.0**-36
    beta = p["beta"].clamp(min=(1e-6 + pedestal) ** 0.5).square() - pedestal
    gamma = p["gamma"].clamp(min=pedestal**0.5).square() - pedestal
    return x * F.conv2d(x.square(), gamma[:, :, None, None], beta).rsqrt()


def scale(x: Tensor, p: State, training: bool) -> Tensor:
    """Scale norm."""
    return p["scale"] * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5)


def dynamic_tanh(x: Tensor, p: State, training: bool) -> Tensor:
    """Dynamic tanh."""
    return torch.tanh(p["alpha"] * x) * p["weight"] + p["bias"]


def dynamic_erf(x: Tensor, p: State, training: bool) -> Tensor:
    """Dynamic erf."""
    return torch.erf(p["alpha"] * x + p["shift"]) * p["weight"] + p["bias"]


def thresholded_linear(x: Tensor, p: State, training: bool) -> Tensor:
    """The thresholded linear unit."""
    return torch.maximum(x, p["tau"].view(1, -1, 1, 1))


def film(x: Tensor, p: State, training: bool, condition: Tensor) -> Tensor:
    """Feature-wise linear modulation."""
    delta, beta = F.linear(condition, p["projection.weight"], p["projection.bias"]).chunk(2, 1)
    return (1 + delta[:, :, None, None]) * x + beta[:, :, None, None]


def adaptive_instance(x: Tensor, p: State, training: bool, style: Tensor) -> Tensor:
    """Adaptive instance norm with the moments of a second feature map."""
    mean, var = moments(x, POSITIONS)
    style_mean, style_var = moments(style, POSITIONS)
    return (x - mean) / (var + 1e-5).sqrt() * (style_var + 1e-5).sqrt() + style_mean


def conditional_batch(x: Tensor, p: State, training: bool, classes: Tensor) -> Tensor:
    """Conditional batch norm: torch's without a map, then the map of each sample's class."""
    running = (None, None) if training else (p["running_mean"], p["running_var"])
    y = F.batch_norm(x, *running, training=training)
    return y * p["weight"][classes][:, :, None, None] + p["bias"][classes][:, :, None, None]
