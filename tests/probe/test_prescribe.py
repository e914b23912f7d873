"""Prescriptions: tried on copies, ranked by what they do, and done to the model on request."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import equinorm
from equinorm.checkup.numbers import Numbers
from equinorm.checkup.prescribe import missing
from equinorm.probe import Finding
from tests.probe import networks as net
from tests.probe.zoo import BROKEN

CASES = {(case.name, case.broken): case for case in BROKEN}


def find(kind, name=""):
    return next(case for case in BROKEN if kind in case.kinds and name in case.name)


# Kind of finding, network, and what must be among the remedies that resolve it, best first; several where all of them are equally good.
CURES = [
    ("exploding_forward", "MLP", {"LSUV", "scale the weights", "initialise by gain"}),
    ("vanishing_forward", "MLP", {"LSUV", "scale the weights", "initialise by gain"}),
    ("vanishing_forward", "convolutions", {"LSUV", "initialise by gain"}),
    ("scale_jump", "MLP", {"scale the odd layer"}),
    ("residual_growth", "residual", {"scale the residual branches"}),
    ("saturation", "tanh", {"initialise by gain"}),
    ("dead_channels", "MLP", {"biases back to 0"}),
    ("running_drift", "ResNet", {"recalibrate", "group norm instead"}),
    ("small_batch", "ResNet", {"group norm instead"}),
    ("norm_after_norm", "MLP", {"remove '2'"}),
    ("bias_before_norm", "VGG", {"remove biases in front of norms"}),
    ("momentum", "VGG", {"momentum 0.1"}),
    ("unnormalized_input", "VGG", {"standardize the input"}),
    ("half_overflow", "float16", {"LSUV"}),
    ("half_underflow", "float16", {"bfloat16"}),
    ("decay_on_affine", "ResNet", {"no decay of biases and norms"}),
    ("update_size", "Adam", {"another learning rate"}),
]


@pytest.mark.parametrize(("kind", "name", "titles"), CURES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_network_is_cured(kind, name, titles):
    report = find(kind, name).report()
    before = {key: value.clone() for key, value in report.source.model.state_dict().items()}
    prescriptions = report.prescribe()
    assert all(torch.equal(before[key], value) for key, value in report.source.model.state_dict().items()), (
        "trying must not change the model"
    )
    helpful = {p.title: p for p in prescriptions if kind in {finding.kind for finding in p.resolved}}
    assert titles <= set(helpful), str(prescriptions)
    best = helpful[sorted(titles)[0]]
    after = report.apply(best.number)
    assert [f.kind for f in after.findings] == [f.kind for f in best.after.findings], "on the model as on its copy"
    assert after.source.model is report.source.model


def test_the_most_helpful_come_first_and_of_equals_the_gentlest():
    report = find("scale_jump", "MLP").report()
    prescriptions = report.prescribe()
    assert [p.score for p in prescriptions] == sorted((p.score for p in prescriptions), reverse=True)
    assert prescriptions[0].cost.startswith("The function changes")
    assert prescriptions[-1].cost.startswith("New weights")
    assert [p.number for p in prescriptions] == [1, 2, 3, 4]
    text = str(prescriptions)
    assert "1. scale the" in text
    assert "Resolved: one layer out of scale (warning)." in text


def test_the_odd_layer_is_multiplied_by_what_it_stands_out():
    model = net.mlp(6, 64)
    net.kaiming(model)
    layer = net.linears(model)[3]
    with torch.no_grad():
        layer.weight.mul_(1000)
    report = equinorm.probe(model, torch.randn(64, 64))
    prescriptions = report.prescribe()
    before = layer.weight.detach().clone()
    number = next(p.number for p in prescriptions if p.title == "scale the odd layer")
    report.apply(number)
    factor = (layer.weight / before).mean().item()
    assert factor == pytest.approx(1e-3, rel=0.5)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Linear(width, width)

    def forward(self, x):
        return x + self.branch(torch.relu(x))


def test_residual_branches_are_scaled_by_their_number():
    model = nn.Sequential(*[Block(64) for _ in range(24)])
    for block in model:
        nn.init.kaiming_normal_(block.branch.weight)
        nn.init.zeros_(block.branch.bias)
    weight = model[7].branch.weight.detach().clone()
    report = equinorm.probe(model, torch.randn(64, 64))
    prescriptions = report.prescribe()
    titles = {p.title: p.number for p in prescriptions}
    report.apply(titles["scale the residual branches"])
    assert torch.allclose(model[7].branch.weight, weight * 24**-0.5)

    assert prescriptions[titles["scale the residual sums"] - 1].after is not None
    report.apply(titles["scale the residual sums"])
    assert "Scale(0.707107)" in repr(model[3])
    assert isinstance(model[3][0], Block)


def test_gains_follow_the_activation_in_front_of_each_layer():
    model = nn.Sequential(
        nn.Linear(256, 256),
        nn.Tanh(),
        nn.Linear(256, 256),
        nn.Dropout(0.0),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.LayerNorm(256),
        nn.Linear(256, 256),
    )
    for layer in (model[0], model[2], model[5]):
        nn.init.normal_(layer.weight, 0, 10)
    report = equinorm.probe(model, torch.randn(64, 256))
    titles = {p.title: p for p in report.prescribe()}
    assert "relu, tanh" in titles["initialise by gain"].sentence
    report.apply(titles["initialise by gain"].number)
    stds = [model[i].weight.std().item() * 16 for i in (0, 2, 5, 7)]
    assert stds == pytest.approx([1, equinorm.init.gain("tanh"), 2**0.5, 1], rel=0.03)


def test_biases_in_front_of_norms_go_without_changing_the_output():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    nn.init.normal_(model[0].bias, 0, 3)
    x = torch.randn(8, 3, 8, 8)
    for _ in range(50):
        model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = copy.deepcopy(model).eval()(x)
    report = equinorm.probe(model, x, optimizer=optimizer)
    number = next(p.number for p in report.prescribe() if p.title.startswith("remove biases"))
    report.apply(number)
    assert model[0].bias is None
    assert torch.allclose(model.eval()(x), expected, atol=1e-5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_decay_is_taken_off_by_splitting_groups():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    report = equinorm.probe(model, torch.randn(16, 8), optimizer=optimizer)
    number = next(p.number for p in report.prescribe() if p.title == "no decay of biases and norms")
    report.apply(number)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0, 0.1, 0.0]
    assert optimizer.param_groups[1]["lr"] == 1e-3


def test_the_input_is_standardized_per_channel_in_front_of_the_first_layer():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(64, 2, 8, 8) * torch.tensor([50.0, 3.0]).view(1, 2, 1, 1) + torch.tensor([100.0, -7.0]).view(1, 2, 1, 1)
    report = equinorm.probe(model, x)
    number = next(p.number for p in report.prescribe() if p.title == "standardize the input")
    report.apply(number)
    front = model[0][0]
    y = front(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(y.std((0, 2, 3)), torch.ones(2), atol=1e-3)
    assert "0.0.mean" in model.state_dict()


def test_what_cannot_be_tried_says_why_and_comes_last():
    report = find("dead_channels", "MLP").report()
    prescriptions = report.prescribe()
    failed = prescriptions[-1]
    assert failed.title == "scale the weights"
    assert failed.outcome.startswith("It could not be tried: ValueError: lsuv: the output of")
    with pytest.raises(ValueError, match=rf"apply: number {failed.number} \(scale the weights\) could not be tried"):
        report.apply(failed.number)


def test_errors_and_a_healthy_model():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    report = equinorm.probe(model, torch.randn(32, 16))
    with pytest.raises(ValueError, match=r"apply: nothing was prescribed yet; call report\.prescribe\(\)"):
        report.apply(1)
    assert len(report.prescribe()) == 0
    assert str(report.prescriptions) == "No prescription: no finding has a remedy that can be tried on the model."
    with pytest.raises(ValueError, match=r"apply: number must be one of 1 to 0, got 1"):
        report.apply(1)
    report.source = None
    with pytest.raises(ValueError, match=r"prescribe: the report holds no model"):
        report.prescribe()


def test_apply_draws_the_same_weights_and_leaves_the_generator():
    report = find("exploding_forward", "MLP").report()
    prescriptions = report.prescribe()
    p = next(p for p in prescriptions if p.title == "initialise by gain")
    torch.rand(7)  # whatever is drawn between
    state = torch.get_rng_state()
    after = report.apply(p.number)
    assert torch.equal(torch.get_rng_state(), state)
    assert Numbers.of(after).forward.ratio == pytest.approx(Numbers.of(p.after).forward.ratio, rel=1e-6)


def test_findings_are_matched_one_to_one():
    def found(*pairs):
        return [Finding(kind=kind, severity="warning", layers=(layer,), sentence="") for kind, layer in pairs]

    before = found(("dead_channels", "a"), ("dead_channels", "b"), ("momentum", "n"))
    assert missing(before, found(("dead_channels", "b"))) == [before[0], before[2]]
    assert missing(before, found(("dead_channels", "c"))) == [before[1], before[2]]  # another layer has it now: one of two is gone
    assert missing(before, before) == []
    assert missing(found(("momentum", "n")), []) == before[2:]


def test_numbers_for_programs():
    report = find("exploding_forward", "MLP").report()
    data = report.prescribe()[0].to_dict()
    assert data["number"] == 1
    assert "exploding_forward" in data["resolved"]
    assert data["after"]["severe"] == 0
    assert data["after"]["signal_factor"] < 100
