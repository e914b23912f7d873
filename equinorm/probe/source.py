"""What was probed and how, kept beside the report so that a prescription can repeat the measurement on a changed copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Source:
    """The arguments of :func:`equinorm.probe`, as they were given.

    Attributes:
        model: the model, unwrapped of compilation and data parallelism.
        batch, loss_fn, optimizer, forward, thresholds: as given.
        weights, gap: as given.
    """

    model: nn.Module
    batch: Any
    loss_fn: Callable[..., Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    thresholds: Mapping[str, float] | None = None
    weights: bool = False
    gap: bool = True
