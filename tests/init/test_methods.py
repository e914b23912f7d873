"""Initialisations: variances and lengths by measurement, and the profile of the signal through deep networks."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equinorm
from equinorm import init
from equinorm.init.layers import fans
from tests.init.profiles import chain, spread

LAYERS = [
    lambda: nn.Linear(600, 800),
    lambda: nn.Conv2d(48, 64, 3),
    lambda: nn.Conv2d(64, 128, 3, groups=4),
    lambda: nn.Conv2d(48, 64, 4, stride=2),
    lambda: nn.ConvTranspose2d(64, 48, 4, stride=2),
    lambda: nn.ConvTranspose1d(64, 128, 4, stride=4, groups=2),
]


def signal(layer, channels):
    return torch.randn(64, channels, *([] if isinstance(layer, nn.Linear) else [20] * (layer.weight.ndim - 2)))


def inner(values):
    return values[(..., *[slice(8, 16) for _ in values.shape[2:]])]


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "leaky_relu", "sigmoid"])
@pytest.mark.parametrize("make", LAYERS, ids=lambda make: type(make()).__name__)
def test_he_keeps_the_mean_square_of_signal_and_of_gradient(make, name):
    layer, f = make(), getattr(F, name)
    into = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    forward, backward = [], []
    for _ in range(5):  # the mean of f makes few independent numbers out of many channels
        init.he_(layer, name)
        forward.append(inner(layer(f(signal(layer, into)))).square().mean().item())

        init.he_(layer, name, fan="fan_out")
        x = signal(layer, into).requires_grad_()
        z = layer(x)
        behind = torch.randn_like(z).requires_grad_()  # stands for the layer's output, of variance 1, in front of f
        (slope,) = torch.autograd.grad(f(behind).sum(), behind)
        (grad,) = torch.autograd.grad(z, x, torch.randn_like(z) * slope)
        backward.append(inner(grad).square().mean().item())
    assert statistics.fmean(forward) == pytest.approx(1, rel=0.1)
    assert statistics.fmean(backward) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
def test_distributions_have_the_same_variance(distribution):
    layer = nn.Linear(500, 300)
    init.he_(layer, distribution=distribution)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.01)
    init.xavier_(layer, distribution=distribution)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 800), rel=0.01)
    init.lecun_(layer, distribution=distribution)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(1 / 500), rel=0.01)
    largest = layer.weight.abs().max().item() * math.sqrt(500)
    assert {"normal": largest > 3, "uniform": largest <= 3**0.5 + 1e-6, "truncated_normal": 2 < largest < 2.274}[distribution]
    assert layer.bias.abs().max() == 0


def test_gains():
    assert init.gain("relu") == pytest.approx(math.sqrt(2), abs=1e-9)
    assert init.gain(nn.LeakyReLU(0.2)) == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.2), abs=1e-9)
    assert init.gain(torch.square) == pytest.approx(1 / math.sqrt(3), abs=1e-9)
    assert init.gain("tanh", "fan_out") != pytest.approx(init.gain("tanh"), rel=0.05)
    assert init.gain("tanh", "fan_avg") ** 2 == pytest.approx((init.gain("tanh") ** 2 + init.gain("tanh", "fan_out") ** 2) / 2)
    with pytest.raises(ValueError, match=r"gain: fan must be fan_in, fan_out or fan_avg, got 'both'"):
        init.gain("relu", "both")
    with pytest.raises(ValueError, match=r"distribution must be normal, uniform or truncated_normal, got 'cauchy'"):
        init.he_(nn.Linear(2, 2), distribution="cauchy")


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.SELU(), nn.ELU(), nn.Softplus(), nn.Sigmoid()], ids=repr
)
def test_the_profile_is_flat_after_he(activation):
    model = chain(50, 256, activation)
    init.initialize(model, "he", lambda z: 0.5 * activation(z))  # a gain that is off by a factor of 2
    assert spread(model, torch.randn(64, 256)) > 5 or isinstance(activation, (nn.Tanh, nn.Sigmoid))  # which bend back
    init.initialize(model, "he")
    assert spread(model, torch.randn(64, 256)) < 3


def test_the_gradient_is_flat_after_he_over_the_fan_out():
    model = nn.Sequential(*[m for i in range(20) for m in (nn.Linear(*((512, 128) if i % 2 else (128, 512))), nn.ReLU())])
    x = torch.randn(64, 128)
    init.initialize(model, "he", fan="fan_in")
    assert spread(model, x) < 3
    init.initialize(model, "he", fan="fan_out")
    inner = equinorm.probe(model, x, gap=False)
    wide = [call.gradient.rms for call in inner.calls if call.role == "linear" and call.shape[1] == 512]
    assert max(wide) / min(wide) < 3
    assert not inner.severe


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU()], ids=repr)
def test_gains_alone_do_not_hold_where_deviations_grow(activation):
    """For these f, E[z f f'] / E[f^2] is above 1: a signal a little too large grows from layer to layer. Measuring helps."""
    x = torch.randn(64, 256)
    model = chain(50, 256, activation)
    init.initialize(model, "he")
    assert spread(model, x) > 10
    init.lsuv(model, x)
    assert spread(model, x) < 1.5
    short = chain(8, 256, activation)
    init.initialize(short, "he")
    assert spread(short, x) < 3


def test_the_profile_is_flat_after_lecun_and_xavier():
    model = chain(50, 256, nn.SELU())
    init.initialize(model, "lecun")
    assert spread(model, torch.randn(64, 256)) < 2
    linear = chain(50, 256, nn.Identity())
    init.initialize(linear, "xavier", "identity")
    assert spread(linear, torch.randn(64, 256)) < 3


def test_orthogonal_weights_keep_lengths_exactly():
    model = chain(50, 128, nn.Identity())
    init.initialize(model, "orthogonal", "identity")
    x = torch.randn(16, 128)
    assert spread(model, x) == pytest.approx(1, abs=1e-4)
    assert spread(model, x, "gradient") == pytest.approx(1, abs=1e-4)
    layer = nn.Conv2d(6, 8, 3, groups=2)
    init.orthogonal_(layer, "relu")
    rows = layer.weight.detach().view(2, 4, 27)
    assert torch.allclose(rows @ rows.mT, 2 * torch.eye(4).expand(2, 4, 4), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(8, 8, 3, padding=1),
        lambda: nn.Conv2d(8, 20, 5, padding=2),
        lambda: nn.Conv2d(8, 16, 3, padding=1, groups=4),
        lambda: nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)),
        lambda: nn.ConvTranspose2d(8, 12, 3, padding=1, groups=2),
        lambda: nn.Linear(8, 9),
    ],
    ids=lambda make: str(make()),
)
def test_delta_orthogonal_layers_keep_every_length(make):
    layer = make()
    init.delta_orthogonal_(layer)
    x = signal(layer, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
    y = layer(x)
    assert torch.allclose(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-5)
    if not isinstance(layer, nn.Linear):
        kernel = layer.weight.detach().abs().sum((0, 1))
        assert kernel[tuple(n // 2 for n in kernel.shape)] > 0
        assert (kernel > 0).sum() == 1


def test_the_profile_is_flat_after_delta_orthogonal():
    model = nn.Sequential(*[m for _ in range(100) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.Identity())])
    init.initialize(model, "delta_orthogonal", "identity")
    x = torch.randn(4, 16, 8, 8)
    assert spread(model, x) == pytest.approx(1, abs=1e-4)
    deep = nn.Sequential(*[m for _ in range(50) for m in (nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())])
    init.initialize(deep, "delta_orthogonal")
    assert spread(deep, torch.randn(4, 128, 5, 5)) < 4


def test_delta_orthogonal_refuses_fewer_outputs():
    message = (
        r"delta_orthogonal_: a layer must have at least as many outputs as inputs to keep lengths, got 8 inputs and 4 outputs; use orth"
    )
    with pytest.raises(ValueError, match=message):
        init.delta_orthogonal_(nn.Conv2d(8, 4, 3))
    with pytest.raises(ValueError, match=r"got 4 inputs and 2 outputs per group"):
        init.delta_orthogonal_(nn.ConvTranspose2d(8, 4, 3, groups=2))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"initialize: delta_orthogonal cannot take layer 2: .* 8 inputs and 4 outputs"):
        init.initialize(model, "delta_orthogonal")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_profile_is_flat_after_fixup():
    """Residual branches start at 0, and the gradient reaches the first block as it left the last."""
    blocks = [equinorm.FixupBlock(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), num_branches=50) for _ in range(50)]
    report = equinorm.probe(nn.Sequential(*blocks), torch.randn(32, 64).relu(), gap=False)
    outputs = [call for call in report.calls if call.type == "FixupBlock"]
    assert len(outputs) == 50
    for way in ("forward", "gradient"):
        sizes = [getattr(call, way).rms for call in outputs[:-1]]  # the gradient at the end has not passed the last activation yet
        assert max(sizes) / min(sizes) == pytest.approx(1, abs=1e-5)


def test_initialize_names_what_it_set_and_leaves_the_rest():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Embedding(5, 8), shared, nn.ReLU(), nn.LayerNorm(8), nn.Conv1d(3, 3, 1), nn.ReLU(inplace=True), shared)
    model.append(nn.Linear(8, 8))
    model[7].weight = shared.weight  # tied
    embedding = model[0].weight.clone()
    assert init.initialize(model, generator=torch.Generator().manual_seed(0)) == ["1", "4"]
    assert torch.equal(model[0].weight, embedding)
    expected = nn.Linear(8, 8)
    init.he_(expected, "relu", generator=torch.Generator().manual_seed(0))
    assert torch.equal(expected.weight, shared.weight)
    assert fans(shared) == (8, 8)


def test_initialize_asks_where_it_cannot_tell():
    with pytest.raises(ValueError, match=r"initialize: method must be one of he, xavier, .*, got 'kaiming'"):
        init.initialize(nn.Linear(2, 2), "kaiming")
    with pytest.raises(
        ValueError, match=r"initialize: Linear holds no activation module; say which one counts, such as activation=\"relu\""
    ):
        init.initialize(nn.Linear(2, 2))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh(), nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match=r"holds several kinds of activation: ReLU\(\), Tanh\(\); say"):
        init.initialize(mixed)
    assert init.initialize(mixed, activation=nn.Tanh()) == ["0"]
    with pytest.raises(ValueError, match=r"Sequential holds no linear or convolution layer"):
        init.initialize(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"initialize: the weight of 0 has no shape yet"):
        init.initialize(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
