"""Sparse switchable norm: choices fall, stay, and then cost what one norm costs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import equinorm
from tests.cases import CASES
from tests.helpers import assert_close
from tests.test_catalogue import build, step_matches_reference

CASE = next(case for case in CASES if case.cls is equinorm.SparseSwitchNorm)


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


def chosen(mean, var, using=("instance", "layer", "batch"), **options):
    """A norm that has settled on the given candidates."""
    norm = equinorm.SparseSwitchNorm(6, using=using, **options).double()
    with torch.no_grad():
        norm.mean_weight[using.index(mean)] += 0.1
        norm.var_weight[using.index(var)] += 0.1
    norm.set_radius(1.0)
    norm(data(4, 6, 5, 3))
    assert norm.choices() == {"mean": mean, "var": var}
    return norm


@pytest.mark.parametrize(
    ("options", "radius"),
    [*(({}, radius) for radius in (0.0, 0.2, 0.6, 0.75, 0.82)), *(({"using": ("batch", "layer")}, radius) for radius in (0.0, 0.75))],
)
def test_equals_its_reference_at_any_radius(options, radius):
    case = replace(CASE, options=(options,), ready=lambda module, x: module.set_radius(radius))
    module = build(case)
    for _ in range(2):
        step_matches_reference(case, module, 0, data(4, 6, 5, 3))
    step_matches_reference(case, module.eval(), 0, data(4, 6, 5, 3))


def test_features_without_positions():
    case = replace(CASE, options=({"using": ("layer", "batch")},))
    step_matches_reference(case, build(case), 0, data(4, 6))
    with pytest.raises(ValueError, match=r"SparseSwitchNorm: the instance part needs an input with positions.* got \(4, 6\)"):
        equinorm.SparseSwitchNorm(6)(torch.randn(4, 6))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("instance", lambda: equinorm.InstanceNorm(6, affine=True)),
        ("layer", lambda: equinorm.GroupNorm(1, 6)),
        ("batch", lambda: equinorm.BatchNorm(6)),
    ],
)
def test_a_choice_is_that_norm(name, plain, training):
    norm, plain, x = chosen(name, name), plain().double(), data(4, 6, 5, 3)
    plain.load_state_dict({key: value for key, value in norm.state_dict().items() if key in plain.state_dict()})
    assert_close(norm.train(training)(x), plain.train(training)(x))


def test_a_choice_is_for_good():
    norm = chosen("batch", "layer")
    want = norm.mixture()
    assert want["mean"] == {"instance": 0.0, "layer": 0.0, "batch": 1.0}
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    norm.set_radius(0.0)
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor([5.0, 0.0, 0.0]))
    for _ in range(3):
        norm(data(4, 6, 5, 3)).square().sum().backward()
        for logits in (norm.mean_weight, norm.var_weight):
            assert logits.grad is not None, "a gradient of 0, not none: distributed training waits for every gradient"
            assert not logits.grad.any()
        optimizer.step()
    assert norm.mixture() == want
    other = equinorm.SparseSwitchNorm(6).double()
    other.load_state_dict(norm.state_dict())
    assert other.mixture() == want


def test_choices_fall_in_training_only():
    norm = equinorm.SparseSwitchNorm(6)
    norm.set_radius(1.0)
    norm.eval()(torch.randn(2, 6, 4))
    norm.train().frozen = True
    norm(torch.randn(2, 6, 4))
    assert norm.choices() == {"mean": None, "var": None}
    norm.frozen = False
    norm(torch.randn(2, 6, 4))
    assert norm.choices() == {"mean": "instance", "var": "instance"}


def test_the_logits_learn_while_the_choice_is_open():
    norm = equinorm.SparseSwitchNorm(6).double()
    norm.set_radius(0.2)
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor([1.0, 0.9, 1.2]))
    norm(data(4, 6, 5, 3)).pow(3).sum().backward()
    assert norm.mean_weight.grad.any()
    assert abs(norm.mean_weight.grad.sum()) < 1e-9 * norm.mean_weight.grad.abs().sum(), "a constant added to all logits changes nothing"


@pytest.mark.parametrize("mean", ["instance", "layer", "batch"])
@pytest.mark.parametrize("var", ["instance", "layer", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_the_fixed_form_computes_the_same(mean, var, training):
    norm = chosen(mean, var).train(training)
    fixed = equinorm.ssn_to_fixed(copy.deepcopy(norm))
    x = data(4, 6, 5, 3).requires_grad_()
    mask = torch.rand(4, 5, 3) < 0.7
    for inputs in ((x,), (x, mask)):
        y, want = fixed(*inputs), norm(*inputs)
        assert_close(y, want)
        dy = torch.randn_like(want)
        assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, want)), label="gradient of x")
        assert_close(fixed.running_mean, norm.running_mean if "batch" in (mean, var) else fixed.running_mean)


def test_the_fixed_form_measures_only_what_was_chosen(monkeypatch):
    norm, seen = equinorm.ssn_to_fixed(chosen("batch", "batch")), []
    import equinorm.norms.sparse_switch as module

    def spy(x, rule, *tensors, per="sample", **options):
        seen.append(per)
        return original(x, rule, *tensors, per=per, **options)

    original = module.channel_norm
    monkeypatch.setattr(module, "channel_norm", spy)
    norm(data(4, 6, 5, 3))
    norm.eval()(data(4, 6, 5, 3))
    assert seen == ["batch", None], "training pools over the batch at once, evaluation measures nothing"


def test_fixing_an_open_norm_is_refused():
    model = nn.ModuleDict({"a": chosen("layer", "batch"), "b": equinorm.SparseSwitchNorm(6)})
    with pytest.raises(ValueError, match=r"ssn_to_fixed: every SparseSwitchNorm must have settled.* but b did not"):
        equinorm.ssn_to_fixed(model)
    assert model["a"].fixed is None
    with pytest.raises(ValueError, match=r"SparseSwitchNorm: mean and variance must have settled.* radius of 0\.8165"):
        model["b"].fix()


def test_one_value_per_channel_is_refused_once_only_the_batch_is_left():
    norm = equinorm.ssn_to_fixed(chosen("batch", "batch"))
    with pytest.raises(ValueError, match="SparseSwitchNorm: training needs more than one value per channel"):
        norm(data(1, 6, 1))


def test_loading_opens_a_fixed_norm():
    norm = equinorm.ssn_to_fixed(chosen("layer", "layer"))
    norm.load_state_dict(chosen("batch", "instance").state_dict())
    assert norm.fixed is None
    assert equinorm.ssn_to_fixed(norm).fixed == ("batch", "instance")


def test_published_checkpoints_load():
    published = {
        "weight": torch.rand(1, 6, 1, 1),
        "bias": torch.rand(1, 6, 1, 1),
        "mean_weight": torch.tensor([0.0, 0.0, 1.0]),
        "var_weight": torch.tensor([0.9, 1.0, 1.1]),
        "running_mean": torch.rand(1, 6, 1),
        "running_var": torch.rand(1, 6, 1),
        "mean_fixed": torch.tensor([1]),
        "var_fixed": torch.tensor([0]),
        "radius": torch.tensor([0.25]),
    }
    norm = equinorm.SparseSwitchNorm(6)
    norm.load_state_dict(dict(published))
    assert norm.choices() == {"mean": "batch", "var": None}
    assert norm.radius == 0.25
    assert torch.equal(norm.running_var, published["running_var"].flatten())


def test_schedule():
    model = nn.Sequential(equinorm.SparseSwitchNorm(6), equinorm.SparseSwitchNorm(6, using=("layer", "batch")))
    schedule, ends = equinorm.SparsestMaxScheduler(model, 10), ((2 / 3) ** 0.5, (1 / 2) ** 0.5)
    for step in range(12):
        for norm, end in zip(model, ends, strict=True):
            assert norm.radius.item() == pytest.approx(end * min(step / 10, 1), rel=1e-6)
        schedule.step()
    model(torch.randn(3, 6, 4))
    assert all(None not in norm.choices().values() for norm in model), "at the last step every choice has fallen"


def test_the_schedule_resumes():
    norm = equinorm.SparseSwitchNorm(6)
    schedule = equinorm.SparsestMaxScheduler(norm, 10, r_max=1.0)
    for _ in range(4):
        schedule.step()
    assert norm.radius.item() == pytest.approx(0.4)
    other = equinorm.SparseSwitchNorm(6)
    resumed = equinorm.SparsestMaxScheduler(other, 99)
    resumed.load_state_dict(schedule.state_dict())
    assert torch.equal(other.radius, norm.radius)
    resumed.step()
    assert other.radius.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("model", "options", "pattern"),
    [
        (nn.Linear(3, 3), {"total_steps": 3}, "must hold a SparseSwitchNorm, found none in Linear"),
        (equinorm.SparseSwitchNorm(3), {"total_steps": 0}, "total_steps must be at least 1, got 0"),
        (equinorm.SparseSwitchNorm(3), {"total_steps": 3, "r_max": -1.0}, "r_max must be at least 0, or None, got -1.0"),
    ],
)
def test_bad_schedules_are_refused(model, options, pattern):
    with pytest.raises(ValueError, match=f"SparsestMaxScheduler: .*{pattern}"):
        equinorm.SparsestMaxScheduler(model, **options)


def test_half_modules_keep_a_wide_radius():
    norm = equinorm.SparseSwitchNorm(6).bfloat16()
    norm.set_radius(0.7071)
    assert norm.radius.dtype == torch.float32
    assert equinorm.SparseSwitchNorm(6, dtype=torch.float16).radius.dtype == torch.float32
