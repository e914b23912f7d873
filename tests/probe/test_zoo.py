"""The probe names what was broken, and is quiet where nothing is."""

from __future__ import annotations

import json

import pytest

from equinorm.probe import KINDS, SUGGESTIONS
from tests.probe.zoo import BROKEN, HEALTHY


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.build.__name__)
def test_a_broken_network_is_diagnosed(case):
    report = case.report()
    assert case.hit(report), f"expected {case.kinds} at {case.layer!r}, found {[(f.kind, f.layers[:2]) for f in report.findings]}"


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.build.__name__)
def test_a_healthy_network_has_no_severe_finding(case):
    report = case.report()
    assert report.failure is None
    assert report.severe == []
    assert all(call.forward is not None for call in report.calls)
    assert any(call.gradient is not None for call in report.calls)
    for finding in report.findings:
        assert finding.kind in KINDS
        assert finding.suggestion in SUGGESTIONS
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_zoo_is_large_enough():
    assert len(BROKEN) >= 30
    assert len(HEALTHY) >= 10
    assert len({case.build.__name__ for case in BROKEN + HEALTHY}) == len(BROKEN + HEALTHY)
