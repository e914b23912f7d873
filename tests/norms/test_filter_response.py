"""Filter response norm and the thresholded linear unit: the published numbers, limits and checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import equinorm
from tests.helpers import assert_close

MAP = torch.tensor([[[[1.0, -2.0], [2.0, 4.0]]]], dtype=torch.float64)


def test_the_numbers():
    layer = equinorm.FilterResponseNormTLU(1, eps=0.0).double()
    assert_close(layer.norm(MAP).flatten(), torch.tensor([0.4, -0.8, 0.8, 1.6]).double(), dtype=torch.float32)
    nn.init.constant_(layer.tlu.tau, -0.3)
    assert_close(layer(MAP).flatten(), torch.tensor([0.4, -0.3, 0.8, 1.6]).double(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("learned", "expected"), [(None, [-1.0, -0.995037, 0.707107, 1.0]), (0.1, [-0.987730, -0.031607, 0.003162, 0.994490])]
)
def test_one_position_is_the_sign_unless_eps_is_learned(learned, expected):
    norm = equinorm.FilterResponseNorm(4, learnable_eps=learned is not None, eps_init=learned or 1.0).double()
    y = norm(torch.tensor([[-2.0, -0.01, 0.001, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(y[0].detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_is_instance_norm_on_centred_maps():
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    x = x - x.mean((2, 3), keepdim=True)
    norm, instance = equinorm.FilterResponseNorm(4, eps=1e-5).double(), equinorm.InstanceNorm(4).double()
    assert_close(norm(x), instance(x))


def test_scale_means_nothing_without_eps():
    x, norm = torch.randn(3, 4, 5, dtype=torch.float64), equinorm.FilterResponseNorm(4, eps=0.0).double()
    assert_close(norm(x * 1e-9), norm(x))


def test_a_map_of_zeros_stays_zero_with_a_finite_gradient():
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    y = equinorm.FilterResponseNorm(1)(x)
    y.sum().backward()
    assert y.eq(0).all()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1000.0))


def test_half_squares_do_not_overflow():
    x = torch.tensor([[[300.0, -60000.0, 12.0]]], dtype=torch.float16)
    assert_close(equinorm.FilterResponseNorm(1)(x), equinorm.FilterResponseNorm(1).double()(x.double()))


def test_the_threshold_and_its_gradient():
    tlu = equinorm.TLU(1).double()
    nn.init.constant_(tlu.tau, 0.5)
    y = torch.tensor([[[-1.0, 0.5, 2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    z = tlu(y)
    assert torch.equal(z, torch.relu(y - 0.5) + 0.5)
    z.backward(torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]], dtype=torch.float64))
    assert y.grad.flatten().tolist() == [0.0, 5.0, 100.0, 0.0]
    assert tlu.tau.grad.tolist() == [1006.0]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (1, 4, 1, 1), (4,)])
def test_published_learned_eps_loads(shape):
    norm = equinorm.FilterResponseNorm(4, learnable_eps=True)
    learned = torch.rand(shape)
    norm.load_state_dict({"weight": torch.ones(1, 4, 1, 1), "bias": torch.zeros(1, 4, 1, 1), "eps_l": learned})
    assert torch.equal(norm.eps_l, learned.reshape(-1).expand(4))


def test_a_published_flat_layer_loads():
    flat = {"weight": torch.rand(4), "bias": torch.rand(1, 4, 1, 1), "tau": torch.rand(1, 4, 1, 1)}
    model = nn.Sequential(nn.Identity(), equinorm.FilterResponseNormTLU(4))
    model.load_state_dict({f"1.{name}": value for name, value in flat.items()})
    assert torch.equal(model[1].tlu.tau, flat["tau"].flatten())
    assert torch.equal(model[1].norm.bias, flat["bias"].flatten())
    again = equinorm.FilterResponseNormTLU(4)
    again.load_state_dict(model[1].state_dict())
    assert torch.equal(again.norm.weight, flat["weight"])


def test_one_channel_of_a_published_shape_loads():
    norm = equinorm.FilterResponseNorm(1)
    norm.load_state_dict({"weight": torch.full((1, 1, 1, 1), 2.0), "bias": torch.zeros(1, 1, 1, 1)})
    assert norm.weight.tolist() == [2.0]
