"""Weight centring: the mean is gone from weight and gradient, and with it the inputs' common mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equinorm
from equinorm import CenConv1d, CenConv2d, CenConv3d, weight_centering
from tests.helpers import assert_close


@pytest.mark.parametrize(
    ("make", "within"),
    [
        (lambda: nn.Linear(6, 4), (1,)),
        (lambda: nn.Conv2d(4, 6, (2, 3), groups=2), (1, 2, 3)),
        (lambda: nn.ConvTranspose2d(4, 6, 3), (0, 2, 3)),
    ],
)
def test_units_have_mean_zero_in_weight_and_gradient(make, within):
    layer = weight_centering(make().double())
    original = layer.parametrizations.weight.original
    assert_close(layer.weight, original - original.mean(within, keepdim=True))
    (layer.weight * torch.randn_like(layer.weight)).sum().backward()
    assert original.grad.mean(within).abs().max() < 1e-15


def test_groups_of_a_transposed_convolution_are_centred_apart():
    layer = weight_centering(nn.ConvTranspose1d(4, 6, 3, groups=2).double())
    for group in layer.weight.unflatten(0, (2, 2)):
        assert group.mean((0, 2)).abs().max() < 1e-15


@pytest.mark.parametrize(("cls", "plain", "size"), [(CenConv1d, nn.Conv1d, 1), (CenConv2d, nn.Conv2d, 2), (CenConv3d, nn.Conv3d, 3)])
def test_layers_are_the_convolution_with_the_centred_weight(cls, plain, size):
    own, other = cls(4, 6, 3, padding=1, groups=2).double(), plain(4, 6, 3, padding=1, groups=2).double()
    own.load_state_dict(other.state_dict())
    x = torch.randn(2, 4, *[5] * size, dtype=torch.float64)
    assert_close(own(x), weight_centering(other)(x))


def test_a_common_mean_of_the_inputs_does_not_reach_the_output():
    layer, x = CenConv2d(3, 5, 3, bias=False).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_close(layer(x + 100.0), layer(x), dtype=torch.float32)
    norm = equinorm.MovingAverageBatchNorm(5, buffer_size=1, eps=0.0).double()
    inputs = 3 + torch.randn(256, 3, 6, 6, dtype=torch.float64)
    y = norm(layer(inputs))
    # What is left of the mean is the inputs' own deviation from it, not the 3: the variance is nearly all of the mean square.
    assert y.mean((0, 2, 3)).abs().max() < 0.05
    assert norm(F.conv2d(inputs, layer.weight)).mean((0, 2, 3)).abs().max() > 0.2


def test_layers_start_as_torch_convolutions_do():
    torch.manual_seed(3)
    own = CenConv2d(3, 5, 3)
    torch.manual_seed(3)
    other = nn.Conv2d(3, 5, 3)
    assert torch.equal(own.weight, other.weight)
    assert torch.equal(own.bias, other.bias)


def test_single_weights_and_second_registrations_are_refused():
    with pytest.raises(ValueError, match=r"CenConv2d: every output unit must have at least 2 weights, got 1"):
        CenConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match=r"weight_centering: every output unit must have at least 2 weights, got 1"):
        weight_centering(nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(ValueError, match=r"weight_centering: .*Linear.weight already has it"):
        weight_centering(weight_centering(nn.Linear(3, 3)))
