"""Power norm and moving average batch norm as their papers write them, one channel at a time, forward and backward."""

from __future__ import annotations

import torch

from tests.references.norms import everything, padded_as_zero


class Power(torch.autograd.Function):
    """``xh = x / psi``; the backward pass moves ``state["ema_gz"]``."""

    @staticmethod
    def forward(ctx, x, mask, psi, b, state):
        channels = [x[:, c] / psi[c] for c in range(x.shape[1])]
        ctx.xh, ctx.mask, ctx.psi, ctx.b, ctx.state = torch.stack(channels, 1), mask, psi, b, state
        return ctx.xh.clone()

    @staticmethod
    def backward(ctx, g):
        dxs, emas = [], []
        for c in range(g.shape[1]):
            nu = (1 - ctx.b) * ctx.state["ema_gz"][c]
            h = g[:, c] - nu * ctx.xh[:, c]
            emas.append(ctx.state["ema_gz"][c] + (h * ctx.xh[:, c])[ctx.mask].mean())
            dxs.append(torch.where(ctx.mask, h / ctx.psi[c], 0.0))
        ctx.state["ema_gz"] = torch.stack(emas)
        return torch.stack(dxs, 1), None, None, None, None


def power(
    x,
    p,
    *,
    training,
    mask=None,
    eps=1e-5,
    alpha_fwd=0.9,
    alpha_bkw=0.9,
    warmup_iters=10000,
    num_groups=1,
    variant="PN",
    channel_dim=-1,
    **_,
):
    x = x.movedim(channel_dim, 1)
    mask = everything(x) if mask is None else mask
    if num_groups is not None:
        groups = x.split(x.shape[1] // num_groups, 1)
        x = torch.cat([g / torch.sqrt((g**2).mean(1, keepdim=True) + eps) for g in groups], 1)
    phi, state = p["running_phi"].detach(), {}
    if training:
        t = p["iters"].item() + 1
        batch = torch.stack([(x[:, c][mask] ** 2).mean() for c in range(x.shape[1])])
        seen = batch.detach()
        warm = t <= warmup_iters
        state = {
            "running_phi": phi + (seen - phi) / t if warm else alpha_fwd * phi + (1 - alpha_fwd) * seen,
            "ema_gz": p["ema_gz"].detach(),
            "iters": p["iters"] + 1,
        }
        if variant == "PN-V":
            y = torch.stack([x[:, c] / torch.sqrt(batch[c] + eps) for c in range(x.shape[1])], 1)
        else:
            y = Power.apply(x, mask, torch.sqrt((seen if warm else phi) + eps), alpha_bkw, state)
    else:
        y = torch.stack([x[:, c] / torch.sqrt(phi[c] + eps) for c in range(x.shape[1])], 1)
    return affine(y, p, mask).movedim(1, channel_dim), state


class MovingAverage(torch.autograd.Function):
    """``r z``; the backward pass writes to ``state["buffer_gz"]``."""

    @staticmethod
    def forward(ctx, x, mask, square, r, step, alone, eps, state):
        channels = [x[:, c] / torch.sqrt(square[c] + eps) for c in range(x.shape[1])]
        ctx.z, ctx.mask, ctx.square, ctx.r = torch.stack(channels, 1), mask, square, r
        ctx.step, ctx.alone, ctx.eps, ctx.state = step, alone, eps, state
        return torch.stack([r[c] * channels[c] for c in range(x.shape[1])], 1)

    @staticmethod
    def backward(ctx, g):
        buffer, dxs = ctx.state["buffer_gz"].clone(), []
        for c in range(g.shape[1]):
            inner, z = g[:, c] * ctx.r[c], ctx.z[:, c]
            gz = (inner * z)[ctx.mask].mean()
            buffer[ctx.step % len(buffer), c] = gz
            q = gz if ctx.alone else buffer[:, c].mean()
            dxs.append(torch.where(ctx.mask, (inner - z * q) / torch.sqrt(ctx.square[c] + ctx.eps), 0.0))
        ctx.state["buffer_gz"] = buffer
        return torch.stack(dxs, 1), None, None, None, None, None, None, None


def moving_average_batch(x, p, *, training, mask=None, buffer_size=16, eps=1e-5, alpha=0.98, warmup_iters=100, clip=5.0, **_):
    mask = everything(x) if mask is None else mask
    running, state = p["running_var"].detach(), {}
    if training:
        t, buffer = p["iters"].item() + 1, p["buffer_x2"].detach().clone()
        x2 = torch.stack([(x.detach()[:, c][mask] ** 2).mean() for c in range(x.shape[1])])
        buffer[t % buffer_size] = x2
        alone = t <= buffer_size or t < warmup_iters
        square = x2 if alone else buffer.mean(0)
        r = torch.sqrt(square + eps) / torch.sqrt(running + eps)
        r = torch.ones_like(r) if t <= max(1000, warmup_iters) else r.clamp(1 / clip, clip)
        state = {
            "running_var": alpha * running + (1 - alpha) * square,
            "buffer_x2": buffer,
            "buffer_gz": p["buffer_gz"].detach(),
            "iters": p["iters"] + 1,
        }
        y = MovingAverage.apply(x, mask, square, r, t, alone, eps, state)
    else:
        y = torch.stack([x[:, c] / torch.sqrt(running[c] + eps) for c in range(x.shape[1])], 1)
    return affine(y, p, mask), state


def affine(y, p, mask):
    if p.get("weight") is not None:
        y = torch.stack([y[:, c] * p["weight"][c] + p["bias"][c] for c in range(y.shape[1])], 1)
    return padded_as_zero(y, mask)
