from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equinorm import EqualizedConv1d, EqualizedConv2d, EqualizedConv3d, EqualizedLinear, equalized_lr
from tests.helpers import assert_close

SIZES = [
    (lambda **o: EqualizedLinear(300, 200, **o), (4, 300), 300),
    (lambda **o: EqualizedConv1d(40, 60, 3, groups=2, **o), (2, 40, 5), 60),
    (lambda **o: EqualizedConv2d(30, 40, 3, **o), (2, 30, 4, 4), 270),
    (lambda **o: EqualizedConv3d(20, 30, 2, **o), (2, 20, 3, 3, 3), 160),
]


@pytest.mark.parametrize(("make", "shape", "fan_in"), SIZES)
def test_layers_scale_weights_and_bias_at_run_time(make, shape, fan_in):
    layer = make(lr_multiplier=0.01, gain=2.0, bias_init=3.0)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.03)
    assert_close(layer.bias, torch.full_like(layer.bias, 300.0))
    scale = 0.01 * 2.0 / fan_in**0.5
    assert (layer.weight * scale).std().item() == pytest.approx(2.0 / fan_in**0.5, rel=0.03)
    x = torch.randn(shape)
    functional = F.linear if x.ndim == 2 else [F.conv1d, F.conv2d, F.conv3d][x.ndim - 3]
    options = {} if x.ndim == 2 else {"groups": layer.groups}
    assert_close(layer(x), functional(x.double(), layer.weight.double() * scale, layer.bias.double() * 0.01, **options))
    assert "lr_multiplier=0.01, gain=2.0" in repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_default_layer_keeps_unit_variance():
    torch.manual_seed(0)
    x = torch.randn(2000, 256)
    assert EqualizedLinear(256, 256)(x).var().item() == pytest.approx(1, abs=0.05)
    assert EqualizedLinear(5, 3, bias=False).bias is None
    assert set(EqualizedConv2d(2, 3, 3).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)]
)
def test_the_parametrization_keeps_the_function(make):
    layer, base = make().double(), None
    base = copy.deepcopy(layer)
    equalized_lr(layer, lr_multiplier=0.1, gain=1.5)
    x = torch.randn(2, 6).double() if isinstance(base, nn.Linear) else torch.randn(2, 4, 5, 5).double()
    assert_close(layer(x), base(x).detach())
    fan_in = 6 if isinstance(base, nn.Linear) else 18
    assert_close(layer.parametrizations.weight.original, base.weight.detach() * fan_in**0.5 / 0.15)
    assert_close(layer.parametrizations.bias.original, base.bias.detach() / 0.1)


def test_redraw_gives_the_papers_initialisation():
    layer = equalized_lr(nn.Conv2d(40, 50, 3), gain=2**0.5, lr_multiplier=0.5, redraw=True)
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(2, rel=0.03)
    assert layer.weight.std().item() == pytest.approx((2 / 360) ** 0.5, rel=0.03)
    assert not layer.bias.any()


def test_it_equalizes_adams_steps_and_squares_those_of_sgd():
    """One step of Adam moves every weight by lr * scale whatever the gradient; one of SGD by lr * scale^2 * gradient."""
    for optimizer, expected in ((torch.optim.Adam, lambda g, s: 0.01 * s * g.sign()), (torch.optim.SGD, lambda g, s: 0.01 * s**2 * g)):
        layer = equalized_lr(nn.Linear(25, 3, bias=False).double(), gain=2.0)
        before = layer.weight.detach()
        loss = (layer(torch.ones(2, 25).double()) * torch.tensor([1.0, -2.0, 30.0])).sum()
        (gradient,) = torch.autograd.grad(loss, layer.parametrizations.weight.original, retain_graph=True)
        gradient = gradient / 0.4  # with respect to the effective weight
        loss.backward()
        optimizer(layer.parameters(), lr=0.01).step()
        torch.testing.assert_close(before - layer.weight, expected(gradient, 0.4), rtol=1e-6, atol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match=r"equalized_lr: gain must be positive, got 0"):
        equalized_lr(nn.Linear(2, 2), gain=0)
    with pytest.raises(ValueError, match=r"EqualizedLinear: lr_multiplier must be positive, got -1"):
        EqualizedLinear(2, 2, lr_multiplier=-1)
    with pytest.warns(UserWarning, match=r"zero-element"), pytest.raises(ValueError, match=r"must have at least 1 weight, got 0"):
        EqualizedLinear(0, 2)
