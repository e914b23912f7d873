from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from equinorm import MPConv1d, MPConv2d, MPConv3d, MPLinear, forced_weight_norm, project_after_step, project_weights_
from tests.helpers import assert_close, assert_grads_close
from tests.references import weight as reference

LAYERS = [
    (lambda **o: MPLinear(6, 4, **o), lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    (lambda **o: MPConv1d(4, 6, 3, groups=2, **o), lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (2, 4, 7)),
    (lambda **o: MPConv2d(3, 4, 3, padding=1, **o), lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), (2, 3, 5, 5)),
    (lambda **o: MPConv3d(2, 4, 2, **o), lambda: nn.Conv3d(2, 4, 2, bias=False), (2, 2, 3, 3, 3)),
]


@pytest.mark.parametrize(
    ("layer", "transposed", "groups"),
    [
        (lambda: nn.Linear(5, 3), False, 1),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), False, 2),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), True, 2),
    ],
)
def test_equals_the_reference(layer, transposed, groups):
    module = forced_weight_norm(layer().double(), gain=0.7, eps=0.1)
    original = module.parametrizations.weight.original
    expected = reference.per_unit(original, lambda w: reference.forced_weight(w, 0.7, 0.1), transposed, groups)
    assert_close(module.weight, expected)
    upstream = torch.randn_like(expected)
    (got,) = torch.autograd.grad(module.weight, original, upstream)
    (want,) = torch.autograd.grad(expected, original, upstream)
    assert_grads_close({"v": got}, {"v": want})


@pytest.mark.parametrize(("make", "plain", "shape"), LAYERS)
def test_layers_equal_the_parametrization(make, plain, shape):
    layer, base = make(gain=0.5), plain()
    base.load_state_dict(layer.state_dict())
    forced_weight_norm(base, gain=0.5)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), base(x), rtol=2e-4, atol=2e-4)  # registering projects: eps once more
    project_weights_(layer)
    assert_close(layer.weight, base.parametrizations.weight.original.detach())
    assert_close(layer(x), base(x).detach())
    assert_close(layer(x, gain=torch.tensor(1.0)), 2 * layer(x).detach())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "gain=0.5, eps=0.0001" in repr(layer)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_unit_magnitude_in_unit_magnitude_out():
    torch.manual_seed(0)
    assert MPLinear(256, 256)(torch.randn(1000, 256)).square().mean().item() == pytest.approx(1, abs=0.02)
    assert MPConv2d(64, 64, 3)(torch.randn(16, 64, 12, 12)).square().mean().item() == pytest.approx(1, abs=0.02)


def test_a_learned_gain_receives_a_gradient_and_starts_at_zero():
    gain = torch.zeros((), requires_grad=True)
    layer = MPLinear(6, 4)
    y = layer(torch.randn(3, 6), gain)
    assert not y.any()
    (y * torch.randn(3, 4)).sum().backward()
    assert gain.grad.abs() > 0


def test_projection_after_every_step_keeps_unit_size_and_the_rest_alone():
    model = nn.Sequential(MPConv1d(3, 8, 3), nn.Flatten(), forced_weight_norm(nn.Linear(24, 5)), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = project_after_step(model, optimizer)
    bias, last = model[2].bias, model[3].weight
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5)).square().mean().backward()
        before = bias.detach().clone(), last.detach().clone()
        optimizer.step()
        assert_close(bias, before[0] - 0.1 * bias.grad)
        assert_close(last, before[1] - 0.1 * last.grad)
        for weight in (model[0].weight, model[2].parametrizations.weight.original):
            torch.testing.assert_close(weight.flatten(1).square().mean(1), torch.ones(len(weight)), atol=5e-4, rtol=0)
    handle.remove()
    (100 * model(torch.randn(4, 3, 5))).sum().backward()
    optimizer.step()
    assert (model[0].weight.flatten(1).square().mean(1) - 1).abs().max() > 1e-3


def test_the_forward_is_pure_where_the_published_one_writes_its_weight():
    layer = MPLinear(6, 4)
    before = layer.weight.detach().clone()
    (layer(torch.randn(3, 6)) - layer(torch.randn(3, 6))).sum().backward()
    assert torch.equal(layer.weight, before)


def test_errors():
    with pytest.raises(ValueError, match=r"MPConv2d: a magnitude-preserving layer has no bias; append a channel of ones"):
        MPConv2d(3, 4, 3, bias=True)
    with pytest.raises(ValueError, match=r"MPLinear: eps must be positive, got 0"):
        MPLinear(3, 4, eps=0)
    with pytest.raises(ValueError, match=r"forced_weight_norm: gain must be positive, got 0"):
        forced_weight_norm(nn.Linear(3, 4), gain=0)
    with pytest.warns(UserWarning, match=r"zero-element"), pytest.raises(ValueError, match=r"must have at least 1 weight, got 0"):
        MPLinear(0, 4)
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"Linear must contain a layer with forced_weight_norm, or MPLinear"):
        project_after_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
