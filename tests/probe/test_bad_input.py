"""What cannot be probed, and models that fail: who is to blame is said, and nothing is changed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equinorm
from equinorm.probe import KINDS, SUGGESTIONS, THRESHOLDS, Finding
from tests.probe import networks as net


@pytest.mark.parametrize(
    ("model", "batch", "options", "error", "message"),
    [
        (lambda x: x, torch.ones(2), {}, TypeError, "model must be a torch.nn.Module, got function"),
        (nn.Linear(2, 2), 3, {}, TypeError, "batch must be a tensor.*got int"),
        (nn.Linear(2, 2), {"x": "text"}, {}, TypeError, "batch must be a tensor.*got dict"),
        (nn.Linear(2, 2), torch.empty(0, 2), {}, ValueError, r"must hold samples, but it has shape \(0, 2\)"),
        (nn.Linear(2, 2), {"a": torch.ones(2), "b": torch.empty(3, 0)}, {}, ValueError, "its entry 'b' has shape"),
        (nn.LazyLinear(2), torch.ones(2, 2), {}, ValueError, "'weight' is lazy"),
        (nn.Linear(2, 2, device="meta"), torch.ones(2, 2), {}, ValueError, "'weight' is on the meta device"),
        (nn.Linear(2, 2), torch.ones(2, 2), {"thresholds": {"growth": 3}}, ValueError, "no threshold is called 'growth'.*growth_"),
        (nn.Linear(2, 2), torch.ones(2, 2), {"thresholds": {"jump": "x"}}, ValueError, "threshold 'jump' must be a number, got 'x'"),
        (nn.Linear(2, 2), torch.ones(2, 2), {"loss_fn": lambda y: y}, TypeError, r"one number, got shape \(2, 2\); reduce it"),
        (nn.Linear(2, 2), torch.ones(2, 2), {"loss_fn": lambda y: 1.0}, TypeError, "one number, got float"),
    ],
)
def test_what_cannot_be_probed_is_refused(model, batch, options, error, message):
    with pytest.raises(error, match=message):
        equinorm.probe(model, batch, **options)


@pytest.mark.parametrize(
    ("model", "batch", "layer", "words"),
    [
        (net.mlp(3), torch.randn(4, 63), "0", ["(4, 63)", "it takes (..., 64) float32"]),
        (net.vgg(), torch.randn(2, 1, 32, 32), "0", ["it takes (N, 3, H, W) float32"]),
        (net.vgg(), torch.randint(0, 255, (2, 3, 32, 32)), "0", ["integer type; convert it, as in batch.float()"]),
        (net.vgg(), torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), "0", ["uint8"]),
        (net.mlp(2), torch.randn(4, 64).double(), "0", ["different types"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 6)), torch.randn(2, 3, 4, 4), "1", ["it takes (N, 6, ...)"]),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(5)), torch.randn(2, 4), "1", ["it takes (..., 5)"]),
        (net.Encoder(1), torch.randint(0, 500, (2, 5)) + 100, "embed", ["integers from 0 to 99"]),
        (nn.LSTM(8, 8), torch.randn(3, 2, 7), "", ["it takes (T, N, 8)"]),
    ],
)
def test_the_layer_that_refuses_is_named(model, batch, layer, words):
    report = equinorm.probe(model, batch)
    assert report.failure.phase == "forward"
    assert report.failure.layer == layer
    finding = report.findings[0]
    assert (finding.kind, finding.severity, finding.layers[0]) == ("failed", "severe", layer)
    for word in words:
        assert word in finding.sentence
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_was_seen_until_the_failure_is_kept():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = net.mlp(3, 16, inputs=8, outputs=16), nn.Linear(17, 2)

        def forward(self, x):
            return self.head(self.body(x))

    report = equinorm.probe(Late(), torch.randn(4, 8))
    assert report.failure.layer == "head"
    assert [call.name for call in report.calls][-1] == "body"
    assert all(call.forward is not None for call in report.calls)
    assert len(report.parameters) == 10


def test_a_failure_in_the_backward_pass():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no way back")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return Broken.apply(self.fc(x))

    report = equinorm.probe(Model(), torch.randn(3, 2))
    assert report.failure.phase == "backward"
    assert "no way back" in report.failure.error
    assert report.call("fc").forward is not None


def test_an_output_without_gradient():
    class Argmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x).argmax(1)

    report = equinorm.probe(Argmax(), torch.randn(3, 4))
    assert report.loss == "none"
    assert [f.kind for f in report.severe] == ["no_gradient"]
    assert report.severe[0].layers == ("fc",)


def test_a_model_without_parameters():
    report = equinorm.probe(nn.Sequential(nn.ReLU(), nn.Softmax(-1)), torch.randn(3, 4))
    assert report.parameters == []
    assert report.severe == []
    assert "no parameter requires a gradient" in " ".join(report.notes)


def test_a_frozen_model():
    report = equinorm.probe(net.mlp(2).requires_grad_(False), torch.randn(3, 64))
    assert report.loss == "none"
    assert report.severe == []


def test_not_a_number_in_the_batch_and_in_a_weight():
    x = torch.randn(3, 64)
    x[1, 1] = float("nan")
    finding = equinorm.probe(net.mlp(2), x).findings[0]
    assert (finding.kind, finding.layers) == ("not_finite", ("",))
    model = net.mlp(2)
    model[2].weight.data[0, 0] = float("inf")
    finding = equinorm.probe(model, torch.randn(3, 64)).findings[0]
    assert (finding.kind, finding.layers, finding.evidence["parameter"]) == ("not_finite", ("2",), "2.weight")


def test_a_last_layer_that_starts_at_0_is_no_blockade():
    model = net.mlp(3)
    nn.init.zeros_(model[-1].weight)
    report = equinorm.probe(model, torch.randn(32, 64))
    finding = next(f for f in report.findings if f.kind == "no_gradient")
    assert (finding.severity, finding.layers[0]) == ("note", "6")
    assert "will move at the first step" in finding.sentence
    assert report.severe == []


def test_thresholds_move_the_verdict():
    model, x = net.mlp(8), torch.randn(64, 64)
    assert not any(f.kind == "small_batch" for f in equinorm.probe(net.vgg(), torch.randn(16, 3, 32, 32)).findings)
    strict = equinorm.probe(net.vgg(), torch.randn(16, 3, 32, 32), thresholds={"batch_warning": 17, "batch_note": 17})
    assert any(f.kind == "small_batch" and f.severity == "warning" for f in strict.findings)
    assert strict.thresholds["batch_warning"] == 17
    assert equinorm.probe(model, x * 50).findings[0].kind == "unnormalized_input"
    loose = equinorm.probe(model, x * 50, thresholds={"input_rms_warning": 100})
    assert not any(f.kind == "unnormalized_input" for f in loose.findings)


def test_every_threshold_has_its_reason_and_is_used():
    from pathlib import Path

    import equinorm.probe.diagnose as package

    source = "".join(path.read_text() for path in Path(package.__file__).parent.glob("*.py"))
    for name, threshold in THRESHOLDS.items():
        assert len(threshold.reason) > 30 or name.endswith("_severe"), name
        stem = name.removesuffix("_warning").removesuffix("_severe")
        assert f'"{name}"' in source or f'"{stem}"' in source, f"{name} is used by no rule"
    for name in KINDS:
        assert f'"{name}"' in source, f"no rule finds {name}"
    assert {kind.suggestion for kind in KINDS.values()} <= set(SUGGESTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "odd", "severity": "note"}, "kind must be one of"),
        ({"kind": "frozen", "severity": "bad"}, "severity must be one of severe, warning, note, got 'bad'"),
        ({"kind": "frozen", "severity": "note", "suggestion": "pray"}, "suggestion must be one of"),
    ],
)
def test_findings_refuse_what_is_not_in_the_tables(arguments, message):
    with pytest.raises(ValueError, match=message):
        Finding(layers=(), sentence="", **arguments)


def test_an_unknown_call_is_refused_by_name():
    report = equinorm.probe(net.mlp(2), torch.randn(3, 64), lambda y: F.mse_loss(y, y.detach() + 1))
    with pytest.raises(KeyError, match="no call 0 of 'nine' was recorded"):
        report.call("nine")
