"""The probe itself: one forward and one backward pass, observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from equinorm.probe.record import Report


def probe(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
    weights: bool = False,
    gap: bool = True,
) -> Report:
    """Run the model once forward and once backward on a batch, and report what the signal did and what hurts it."""
    raise NotImplementedError
