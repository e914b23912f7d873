"""What can be done about findings: each remedy says what it does and costs, and does it to a case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from equinorm.checkup.remedies import norms, training, weights
from equinorm.checkup.remedies.remedy import Proposal, Remedy
from equinorm.probe.findings import Finding
from equinorm.probe.record import Report

GROWTH = (
    "exploding_forward",
    "vanishing_forward",
    "exploding_backward",
    "vanishing_backward",
    "residual_growth",
    "saturation",
    "dead_channels",
    "scale_jump",
    "half_overflow",
)


def _layer_by_layer(propose: Proposal) -> Proposal:
    """For findings over depth alone: what happens over time inside a recurrent layer, other layers' weights do not change."""

    def proposed(report: Report, found: Sequence[Finding]) -> Iterator[Remedy]:
        over_depth = [f for f in found if not f.calls or report.calls[f.calls[0]].role != "recurrent"]
        return propose(report, over_depth) if over_depth else iter(())

    return proposed


PROPOSALS: tuple[tuple[tuple[str, ...], Proposal], ...] = (
    (GROWTH, _layer_by_layer(weights.gains)),
    (GROWTH, _layer_by_layer(weights.measured)),
    (("scale_jump",), weights.rescale),
    (("residual_growth", "exploding_forward", "exploding_backward", "half_overflow"), weights.branches),
    (("exploding_backward", "vanishing_backward", "exploding_forward", "vanishing_forward"), weights.orthogonal_steps),
    (("dead_channels", "saturation"), weights.biases),
    (("small_batch", "train_eval_gap", "running_drift"), norms.another_norm),
    (("running_drift", "train_eval_gap"), norms.recalibration),
    (("norm_after_norm",), norms.one_norm),
    (("bias_before_norm",), norms.no_bias),
    (("momentum",), norms.usual_momentum),
    (("unnormalized_input",), training.standard_input),
    (("half_overflow", "half_underflow", "not_finite", "not_finite_backward"), training.bfloat16),
    (("decay_on_affine",), training.decay_groups),
    (("update_size",), training.learning_rate),
)


def remedies(report: Report) -> Iterator[Remedy]:
    """All that may help against a report's findings."""
    for kinds, propose in PROPOSALS:
        if found := [finding for finding in report.findings if finding.kind in kinds]:
            yield from propose(report, found)
