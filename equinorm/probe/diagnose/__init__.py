"""From records to findings: rules that each look at one thing, and the order in which their findings are told.

A rule is a function of a :class:`~equinorm.probe.diagnose.view.View` that yields findings. It compares with thresholds of the table
alone, and names the culprit first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from equinorm.probe.diagnose import norms, signal, training, values
from equinorm.probe.diagnose.view import Seen, View
from equinorm.probe.findings import SEVERITIES, Finding
from equinorm.probe.record import Report

# In the order in which findings of one severity are told: what explains others comes first.
RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
    training.failed,
    values.not_finite,
    values.not_finite_backward,
    values.half_overflow,
    values.half_underflow,
    training.unnormalized_input,
    signal.scale_jump,
    values.dead_channels,
    values.saturation,
    signal.residual_growth,
    signal.forward_growth,
    signal.backward_growth,
    signal.over_time,
    norms.running_drift,
    norms.small_batch,
    norms.dropout_before_norm,
    norms.train_eval_gap,
    norms.momentum,
    training.no_gradient,
    values.constant_channels,
    training.update_size,
    norms.norm_after_norm,
    training.decay_on_affine,
    norms.bias_before_norm,
    training.frozen,
)


def diagnose(report: Report, seen: Seen) -> list[Finding]:
    """The findings of a report, worst first."""
    view = View(report, seen)
    found = [finding for rule in RULES for finding in rule(view)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
