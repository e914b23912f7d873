"""The profile of a signal through a network, as the probe sees it, and as a number."""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor, nn

import equinorm


def chain(depth: int, width: int, activation: nn.Module) -> nn.Sequential:
    """``depth`` linear layers, each followed by the activation."""
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), copy.deepcopy(activation))])


def spread(model: nn.Module, x: Tensor, way: Literal["forward", "gradient"] = "forward") -> float:
    """Largest over smallest rms of the outputs of linear and convolution layers, or of their gradients: 1 where the profile is flat."""
    report = equinorm.probe(model, x, gap=False)
    measured = [getattr(call, way) for call in report.calls if call.role == "linear"]
    sizes = [stats.rms for stats in measured if stats is not None]
    return max(sizes) / max(min(sizes), 1e-30)
