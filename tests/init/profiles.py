"""The profile of a signal through a network, as a number."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from equinorm.init.layers import LAYERS


def chain(depth: int, width: int, activation: nn.Module) -> nn.Sequential:
    """``depth`` linear layers, each followed by the activation."""
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), copy.deepcopy(activation))])


def spread(model: nn.Module, x: Tensor) -> float:
    """Largest over smallest rms of the outputs of linear and convolution layers: 1 where the profile is flat."""
    sizes: list[float] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, y: sizes.append(y.detach().square().mean().sqrt().item()))
        for module in model.modules()
        if isinstance(module, LAYERS)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return max(sizes) / max(min(sizes), 1e-30)
