"""What ours is measured against: torch's layers, and for methods that no library has, their published formulas from tensor operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equinorm

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One norm, ours and the peer's, on the same input with parameters of the same values.

    Attributes:
        name: the catalogue name.
        peer: who the peer is.
        geometry: "channel" for inputs (N, C, *S), "row" for (..., D).
        build: from the number of channels or features to (our module, the peer's function, the peer's parameters).
        forward: the least ratio peer time / our time to reach in training forward on big tensors.
        both: the same, forward and backward together.
    """

    name: str
    peer: str
    geometry: str
    build: Callable[[int], tuple[nn.Module, Function, list[Tensor]]]
    forward: float
    both: float


def torch_layer(
    ours: Callable[[int], nn.Module], theirs: Callable[[int], nn.Module]
) -> Callable[[int], tuple[nn.Module, Function, list[Tensor]]]:
    """A layer of torch with the state of ours."""

    def build(size: int) -> tuple[nn.Module, Function, list[Tensor]]:
        own, other = ours(size), theirs(size)
        other.load_state_dict(own.state_dict(), strict=False)
        return own, other, list(other.parameters())

    return build


def composed(
    ours: Callable[[int], nn.Module], formula: Callable[[Tensor, dict[str, Tensor]], Tensor]
) -> Callable[[int], tuple[nn.Module, Function, list[Tensor]]]:
    """A published formula, with the parameters of ours."""

    def build(size: int) -> tuple[nn.Module, Function, list[Tensor]]:
        own = ours(size)
        parameters = {name: p.detach().clone().requires_grad_() for name, p in own.named_parameters()}
        return own, lambda x: formula(x, parameters), list(parameters.values())

    return build


def switch(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Switchable norm as published implementations compose it, with the layer and batch moments from the instance ones."""
    flat = x.flatten(2)  # (N, C, S)
    mean_in, var_in = flat.mean(2, keepdim=True), flat.var(2, keepdim=True, correction=0)
    square = var_in + mean_in**2
    mean_ln = mean_in.mean(1, keepdim=True)
    var_ln = square.mean(1, keepdim=True) - mean_ln**2
    mean_bn = mean_in.mean(0, keepdim=True)
    var_bn = square.mean(0, keepdim=True) - mean_bn**2
    share_mean, share_var = p["mean_weight"].softmax(0), p["var_weight"].softmax(0)
    mean = share_mean[0] * mean_in + share_mean[1] * mean_ln + share_mean[2] * mean_bn
    var = share_var[0] * var_in + share_var[1] * var_ln + share_var[2] * var_bn
    y = (flat - mean) / (var + 1e-5).sqrt()
    return (y * p["weight"][:, None] + p["bias"][:, None]).view_as(x)


def batch_channel(x: Tensor, p: dict[str, Tensor], groups: int = 32) -> Tensor:
    """Batch norm and channel norm one after the other, each from tensor operations."""
    dims = (0, *range(2, x.ndim))
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, correction=0)
    z = (x - mean) / (var + 1e-5).sqrt() * p["weight"].view(shape) + p["bias"].view(shape)
    grouped = z.reshape(x.shape[0], groups, -1)
    mean, var = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
    y = (grouped - mean) / (var + 1e-5).sqrt()
    return (y * p["channel_weight"][:, None] + p["channel_bias"][:, None]).view_as(x)


CONTENDERS = (
    Contender("batch", "torch", "channel", torch_layer(equinorm.BatchNorm, nn.BatchNorm2d), 2.0, 1.3),
    Contender(
        "instance",
        "torch",
        "channel",
        torch_layer(lambda c: equinorm.InstanceNorm(c, affine=True), lambda c: nn.InstanceNorm2d(c, affine=True)),
        2.0,
        1.3,
    ),
    Contender("group", "torch", "channel", torch_layer(lambda c: equinorm.GroupNorm(32, c), lambda c: nn.GroupNorm(32, c)), 1.0, 1.0),
    Contender("layer", "torch", "row", torch_layer(equinorm.LayerNorm, nn.LayerNorm), 1.0, 1.0),
    Contender("rms", "torch", "row", torch_layer(equinorm.RMSNorm, nn.RMSNorm), 1.0, 1.0),
    Contender("switch", "composed", "channel", composed(equinorm.SwitchNorm, switch), 5.0, 5.0),
    Contender("batch_channel", "composed", "channel", composed(equinorm.BatchChannelNorm, batch_channel), 5.0, 5.0),
    Contender(
        "batch_channel",
        "torch, two layers",
        "channel",
        composed(
            equinorm.BatchChannelNorm,
            lambda x, p: F.group_norm(
                F.batch_norm(x, None, None, p["weight"], p["bias"], training=True),
                32,
                *(p[f"channel_{name}"].repeat_interleave(x.shape[1] // 32) for name in ("weight", "bias")),
            ),
        ),
        1.0,
        1.0,
    ),
)
SMALL = 0.5  # the least ratio on tensors so small that the call costs more than the arithmetic, where torch has the layer


def same(own: nn.Module, peer: Function, x: Tensor) -> None:
    """Raises AssertionError if the two do not compute the same output and input gradient, up to float32 rounding."""
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    y, want = own(a), peer(b)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(y, a, dy)[0], torch.autograd.grad(want, b, dy)[0], rtol=1e-4, atol=1e-4)
