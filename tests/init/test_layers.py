"""Fans, against what sums of ones count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import equinorm
from equinorm.init.layers import assign, blocks, fans

SHAPES = [
    lambda: nn.Linear(6, 10),
    lambda: nn.Conv1d(4, 6, 5),
    lambda: nn.Conv2d(4, 6, 3),
    lambda: nn.Conv2d(4, 8, 3, groups=4),
    lambda: nn.Conv2d(6, 4, (2, 4), stride=2),
    lambda: nn.Conv2d(6, 4, 1, stride=2),
    lambda: nn.Conv3d(2, 4, 3, stride=(1, 2, 3), groups=2),
    lambda: nn.ConvTranspose1d(4, 6, 4, stride=2),
    lambda: nn.ConvTranspose2d(4, 6, 3),
    lambda: nn.ConvTranspose2d(4, 8, 4, stride=(2, 4), groups=4),
    lambda: nn.ConvTranspose3d(2, 4, 2, stride=2),
]


def identifier(make):
    return str(make()).replace("ConvTranspose", "T").replace("kernel_size", "k")


@pytest.mark.parametrize("make", SHAPES, ids=identifier)
def test_fans_count_the_weights_that_meet(make):
    """With all weights 1, ones in give the fan in, and a gradient of ones gives the fan out; averaged away from the borders."""
    layer = make()
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    size = () if isinstance(layer, nn.Linear) else (24,) * (layer.weight.ndim - 2)
    x = torch.ones(1, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels, *size, requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert fans(layer) == (inner(y.detach()), inner(grad))


def inner(values):
    """The mean over the middle, a whole number of strides (1, 2, 3, 4) wide."""
    spatial = values.ndim - 2
    return (
        values[(..., *[slice((n - 12) // 2, (n - 12) // 2 + 12) for n in values.shape[2:]])].mean().item()
        if spatial
        else values.mean().item()
    )


def test_torch_counts_otherwise():
    """The reason for having our own: torch's fans of grouped and transposed convolutions."""
    torch_fans = nn.init._calculate_fan_in_and_fan_out
    assert torch_fans(nn.Conv2d(8, 16, 3, groups=4).weight) == (18, 144)
    assert fans(nn.Conv2d(8, 16, 3, groups=4)) == (18, 36)
    assert torch_fans(nn.ConvTranspose2d(8, 16, 3).weight) == (144, 72)
    assert fans(nn.ConvTranspose2d(8, 16, 3)) == (72, 144)
    assert torch_fans(nn.Conv2d(8, 16, 3).weight) == fans(nn.Conv2d(8, 16, 3))


@pytest.mark.parametrize("make", SHAPES, ids=identifier)
def test_blocks_are_maps_from_inputs_to_outputs(make):
    """A weight that is not 0 in one place connects the input and output channel that its place in the blocks says."""
    layer = make()
    groups, out, into = blocks(layer).shape[:3]
    values = torch.zeros_like(blocks(layer))
    values[groups - 1, out - 1, 0] = 1.0
    assign(layer, values)
    assert torch.equal(blocks(layer), values)
    nn.init.zeros_(layer.bias)
    x = torch.zeros(1, groups * into, *([] if isinstance(layer, nn.Linear) else [9] * (layer.weight.ndim - 2)))
    x[:, (groups - 1) * into] = 1.0
    assert layer(x).abs().unsqueeze(-1).flatten(2).sum(2).flatten().nonzero().flatten().tolist() == [groups * out - 1]


def test_what_cannot_be_set_is_refused():
    with pytest.raises(TypeError, match=r"he_: the layer must be Linear, Conv or ConvTranspose of 1 to 3 dimensions, got BatchNorm2d"):
        equinorm.init.he_(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"xavier_: the weight of the layer has no shape yet; run the model once before"):
        equinorm.init.xavier_(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"orthogonal_: the weight of the layer is computed by a hook .* cannot be set"):
        equinorm.init.orthogonal_(spectral_norm(nn.Linear(3, 3)))


def test_a_parametrized_weight_is_set_through_its_inverse():
    layer = parametrizations.weight_norm(nn.Linear(64, 64))
    equinorm.init.he_(layer)
    assert layer.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
