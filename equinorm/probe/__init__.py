"""See the signal in any model: ``equinorm.probe(model, batch)``.

``equinorm.probe`` is both this package and the function that is its purpose: the package can be called, and a call is
:func:`equinorm.probe.run.probe`. So ``equinorm.probe(model, batch)`` and ``from equinorm.probe import Report`` work side by side, in any
order they are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from equinorm.probe.callback import ProbeCallback as ProbeCallback
from equinorm.probe.findings import KINDS as KINDS
from equinorm.probe.findings import SEVERITIES as SEVERITIES
from equinorm.probe.findings import SUGGESTIONS as SUGGESTIONS
from equinorm.probe.findings import THRESHOLDS as THRESHOLDS
from equinorm.probe.findings import Finding as Finding
from equinorm.probe.loggers import JsonLines as JsonLines
from equinorm.probe.loggers import Logger as Logger
from equinorm.probe.loggers import TensorBoard as TensorBoard
from equinorm.probe.loggers import Tracker as Tracker
from equinorm.probe.record import Call as Call
from equinorm.probe.record import Channels as Channels
from equinorm.probe.record import Failure as Failure
from equinorm.probe.record import Gap as Gap
from equinorm.probe.record import Norm as Norm
from equinorm.probe.record import Parameter as Parameter
from equinorm.probe.record import Report as Report
from equinorm.probe.record import Residual as Residual
from equinorm.probe.record import Stats as Stats
from equinorm.probe.record import Steps as Steps
from equinorm.probe.run import probe as probe
from equinorm.probe.source import Source as Source


class _Callable(ModuleType):
    """A module that can be called."""

    def __call__(
        self,
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
        return probe(
            model, batch, loss_fn, optimizer=optimizer, forward=forward, thresholds=thresholds, weights=weights, gap=gap
        )  # fmt: skip


_Callable.__call__.__doc__ = probe.__doc__
sys.modules[__name__].__class__ = _Callable
