"""Batch renormalization: its limits, the published example, the schedule, and what it remembers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import equinorm
from tests.helpers import assert_close, assert_grads_close
from tests.references import batch_family as reference

INF = float("inf")


def example():
    return torch.randn(4, 3, 5, dtype=torch.float64) * 2 + 1


def make(**options):
    options = {"warmup": None, "affine": False} | options
    return equinorm.BatchRenorm(3, **options).double()


def trained(**options):
    """Running estimates away from their start and from any batch."""
    norm = make(momentum=0.5, **options)
    for _ in range(3):
        norm(example() * 1.5 + 2)
    return norm


def gradient(y, x):
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad((y * weights).sum(), x)[0]


def test_closed_limits_are_batch_norm_in_training():
    x = example().requires_grad_()
    norm, batch = make(r_max=1.0, d_max=0.0, eps=1e-5), equinorm.BatchNorm(3, affine=False).double()
    for _ in range(2):
        y, want = norm(x), batch(x)
        assert_close(y, want)
        assert_grads_close({"x": gradient(y, x)}, {"x": gradient(want, x)})


def test_open_limits_are_evaluation_in_value_but_not_in_gradient():
    norm, x = trained(r_max=INF, d_max=INF), example().requires_grad_()
    wanted = copy.deepcopy(norm).eval()(x)
    y = norm(x)
    assert_close(y, wanted)
    assert not torch.allclose(gradient(y, x), gradient(wanted, x), rtol=0.1)


@pytest.mark.parametrize(("limits", "expected"), [((3.0, 5.0), [1.0, 3.0, 5.0]), ((1.5, 0.5), [-1.337117, 0.5, 2.337117])])
def test_the_numbers(limits, expected):
    norm = equinorm.BatchRenorm(1, eps=0.0, r_max=limits[0], d_max=limits[1], warmup=None).double()
    y = norm(torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.float64))
    torch.testing.assert_close(y.flatten().detach(), torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"r_max": 1.2, "d_max": 0.2}])
def test_gradients_are_batch_norms_with_r_as_a_constant(options):
    norm, x = trained(eps=1e-12, **options), example().requires_grad_()
    dx = gradient(norm(x), x)
    xhat = (x - x.mean((0, 2), keepdim=True)).detach()
    scale = dx.abs().max() * x.numel()
    assert (dx.sum((0, 2)).abs() < 1e-14 * scale).all()
    assert ((dx * xhat).sum((0, 2)).abs() < 1e-11 * scale).all()


@pytest.mark.parametrize("options", [{}, {"r_max": 1.2, "d_max": 0.2}, {"track": "var", "r_max": 1.2}])
def test_second_derivatives_equal_the_reference(options):
    norm, x = trained(**options), example().requires_grad_()
    state = {name: b.clone() for name, b in norm.named_buffers()}
    want, _ = reference.batch_renorm(x, state, training=True, warmup=None, momentum=0.5, **options)
    second = []
    for y in (norm(x), want):
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad((dx.sin() * x).sum(), x)[0])
    assert_grads_close({"x": second[0]}, {"x": second[1]})


def test_the_schedule_of_the_paper():
    norm = equinorm.BatchRenorm(3)
    expected = {
        0: (1, 0),
        5000: (1, 0),
        15000: (1 + 2 * 10000 / 35000, 2.5),
        25000: (1 + 2 * 20000 / 35000, 5),
        40000: (3, 5),
        10**9: (3, 5),
    }
    for steps, (r_max, d_max) in expected.items():
        found = norm.limits(torch.tensor(steps))
        torch.testing.assert_close(torch.stack(found), torch.tensor([r_max, d_max], dtype=torch.float64))


def test_limits_may_be_functions_of_the_step():
    asked = []

    def r_max(step):
        asked.append(step)
        return 1.0 + step

    norm = make(r_max=r_max, d_max=lambda step: 0.5, warmup=(5, 7, 9))
    for _ in range(3):
        norm(example())
    assert asked == [0, 1, 2]
    assert [limit.item() for limit in norm.limits(torch.tensor(4))] == [5.0, 0.5]


def test_a_single_value_is_warned_of_and_shifts():
    norm = trained(d_max=INF)
    mean, s = norm.running_mean.clone(), norm.running_std.clone()
    x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match=r"BatchRenorm: one value per channel has no deviation, got shape \(1, 3\)"):
        y = norm(x)
    assert_close(y[0], (x[0] - mean) / s)
    assert torch.autograd.grad(y.sum(), x)[0].abs().max() < 1e-12


@pytest.mark.parametrize("track", ["std", "var"])
def test_estimates_are_wide_rest_when_frozen_and_survive_a_bad_batch(track):
    norm, x = trained(track=track), example()
    name = f"running_{track}"
    assert {b.dtype for b in copy.deepcopy(norm).float().bfloat16().buffers() if b.is_floating_point()} == {torch.float32}
    before = {key: b.clone() for key, b in norm.named_buffers()}
    bad = x.clone()
    bad[0, 1] = INF
    norm(bad)
    assert torch.equal(getattr(norm, name)[1], before[name][1])
    assert torch.equal(norm.running_mean[1], before["running_mean"][1])
    assert not torch.equal(getattr(norm, name)[0], before[name][0])
    norm.frozen = True
    before = {key: b.clone() for key, b in norm.named_buffers()}
    assert torch.equal(norm.train()(x), norm.eval()(x))
    assert all(torch.equal(b, before[key]) for key, b in norm.named_buffers())


def test_a_batch_norm_checkpoint_continues_as_renorm():
    batch = nn.BatchNorm1d(3, eps=1e-3).double()
    for _ in range(4):
        batch(example())
    norm = equinorm.BatchRenorm(3, track="var").double()
    norm.load_state_dict(batch.state_dict())
    x = example()
    assert_close(norm.eval()(x), batch.eval()(x))


def test_a_mean_of_deviations_is_not_the_root_of_the_mean_variance():
    norms = [make(track=track, momentum=None) for track in ("std", "var")]
    for scale in (1.0, 9.0):
        x = example() * scale
        outputs = [norm(x) for norm in norms]
    assert outputs[0].shape == outputs[1].shape
    assert not torch.allclose(norms[0].eval()(x), norms[1].eval()(x), rtol=0.05)
