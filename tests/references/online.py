"""Online normalization and layer scaling, sample by sample, forward and backward as the paper writes them."""

from __future__ import annotations

import torch

from tests.references.norms import everything, padded_as_zero


def broadcast(small, like):
    return small.reshape(-1, *[1] * (like.ndim - 2))


def mean(values, mask):
    """Per channel over the positions with data: (C, *S), (*S) to (C,)."""
    return values[:, mask].reshape(len(values), -1).mean(1)


class Stream(torch.autograd.Function):
    """Normalize samples in order; ``state`` is a dict that both passes move."""

    @staticmethod
    def forward(ctx, x, mask, state, f, b, eps, clip):
        mu, var = state["running_mean"].clone(), state["running_var"].clone()
        ys, sigmas = [], []
        for t in range(len(x)):
            sigma = torch.sqrt(var + eps)
            ys.append((x[t] - broadcast(mu, x)) / broadcast(sigma, x))
            sigmas.append(sigma)
            if mask[t].any():
                m = mean(x[t], mask[t])
                s = mean((x[t] - broadcast(m, x)) ** 2, mask[t])
                var = f * var + (1 - f) * s + f * (1 - f) * (m - mu) ** 2
                mu = f * mu + (1 - f) * m
        state["running_mean"], state["running_var"] = mu, var
        ctx.y, ctx.sigmas, ctx.mask, ctx.state, ctx.b, ctx.clip = torch.stack(ys), sigmas, mask, state, b, clip
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, g):
        u, v, b = ctx.state["u"].clone(), ctx.state["v"].clone(), ctx.b
        dxs = []
        for t in range(len(g)):
            y, kept = ctx.y[t], ctx.mask[t]
            h = g[t] - (1 - b) * broadcast(v, g) * y
            dx = h / broadcast(ctx.sigmas[t], g) - (1 - b) * broadcast(u, g)
            if kept.any():
                if ctx.clip:
                    v = (1 - (1 - b) * mean(y**2, kept)).clamp(0, 1) * v + mean(g[t] * y, kept)
                else:
                    v = v + mean(h * y, kept)
                u = u + mean(dx, kept)
            dxs.append(torch.where(kept, dx, 0.0))
        ctx.state["u"], ctx.state["v"] = u, v
        return torch.stack(dxs), None, None, None, None, None, None


def online(
    x, p, *, training, mask=None, alpha_fwd=0.999, alpha_bkw=0.99, eps=1e-5, ecm="ls", ls_eps=1e-5, clamp_val=5.0, clip_control=False, **_
):
    """``updates`` also receives u and v, once the backward pass has run."""
    mask = everything(x) if mask is None else mask
    state = {name: p[name].detach().clone() for name in ("running_mean", "running_var", "u", "v")}
    if training:
        y = Stream.apply(x, mask, state, alpha_fwd, alpha_bkw, eps, clip_control)
    else:
        y = (x - broadcast(state["running_mean"], x)) / torch.sqrt(broadcast(state["running_var"], x) + eps)
    if p.get("weight") is not None:
        y = y * broadcast(p["weight"], x) + broadcast(p["bias"], x)
    if ecm == "ls":
        y, _ = layer_scaling(y, {}, mask=mask, eps=ls_eps)
    elif ecm == "ac":
        y = y.clamp(-clamp_val, clamp_val)
    return padded_as_zero(y, mask), state if training else {}


def layer_scaling(x, p, *, mask=None, group_size=-1, eps=1e-5, **_):
    mask = everything(x) if mask is None else mask
    size = x.shape[1] if group_size == -1 else group_size
    samples = []
    for sample, kept in zip(x, mask, strict=True):
        groups = [g / torch.sqrt((g[:, kept] ** 2).mean() + eps) for g in sample.split(size)]
        samples.append(torch.cat(groups) if kept.any() else torch.zeros_like(sample))
    return padded_as_zero(torch.stack(samples), mask), {}
