from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from equinorm import (
    ScaledActivation,
    ScaledWSConv1d,
    ScaledWSConv2d,
    ScaledWSConv3d,
    ScaledWSLinear,
    scaled_weight_standardization,
    variance_gain,
)
from tests.helpers import assert_close, assert_grads_close
from tests.references import weight as reference


@pytest.mark.parametrize("eps_mode", ["clamp", "inside"])
@pytest.mark.parametrize("eps", [1e-4, 2.0])
@pytest.mark.parametrize(
    ("layer", "transposed", "groups"),
    [
        (lambda: nn.Linear(5, 3), False, 1),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), False, 2),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), True, 2),
    ],
)
def test_equals_the_reference(layer, transposed, groups, eps, eps_mode):
    module = scaled_weight_standardization(layer().double(), gamma=1.7, eps=eps, eps_mode=eps_mode)
    original, gain = module.parametrizations.weight.original, module.parametrizations.weight[0].gain
    with torch.no_grad():
        gain.normal_()
    units = iter(gain)
    expected = reference.per_unit(original, lambda w: reference.scaled_standardize(w, next(units), 1.7, eps, eps_mode), transposed, groups)
    assert_close(module.weight, expected)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(module.weight, (original, gain), upstream)
    want = torch.autograd.grad(expected, (original, gain), upstream)
    assert_grads_close(dict(zip("wg", got, strict=True)), dict(zip("wg", want, strict=True)))


def test_a_stack_keeps_the_variance_and_removes_the_mean_shift():
    """Standardized rows and gained activations: variance about 1 at every depth, mean about 0; He's gain lets the mean grow."""
    torch.manual_seed(0)
    x = torch.randn(2000, 256).double()
    activation = ScaledActivation("relu")
    for _ in range(6):
        x = ScaledWSLinear(256, 256).double()(activation(x))
        assert x.var(0, unbiased=False).mean().item() == pytest.approx(1, abs=0.12)
        assert x.mean(0).square().mean().item() < 0.02


def test_rows_have_the_length_of_the_gain_and_the_layer_keeps_variance():
    layer = ScaledWSConv2d(8, 16, 3, gain=1.0).double()
    assert_close(layer.standardized_weight().flatten(1).norm(dim=1), torch.ones(16).double())
    x = torch.randn(64, 8, 12, 12).double()
    assert layer(x).var().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("scale", [0.5, 100.0])
def test_scale_and_shift_of_a_row_do_not_matter(scale):
    layer = ScaledWSLinear(6, 3).double()
    before = layer.standardized_weight().detach()
    with torch.no_grad():
        layer.weight.mul_(scale).add_(7)
    assert_close(layer.standardized_weight(), before)


@pytest.mark.parametrize(
    ("ours", "plain", "shape"),
    [
        (lambda: ScaledWSLinear(6, 4, gamma=2.0), lambda: nn.Linear(6, 4), (3, 6)),
        (lambda: ScaledWSConv1d(4, 6, 3, groups=2, gamma=2.0), lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 8)),
        (lambda: ScaledWSConv2d(3, 4, 3, padding=1, gamma=2.0), lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
        (lambda: ScaledWSConv3d(2, 4, 2, bias=False, gamma=2.0), lambda: nn.Conv3d(2, 4, 2, bias=False), (2, 2, 4, 4, 4)),
    ],
)
def test_layers_equal_the_parametrization(ours, plain, shape):
    layer, base = ours(), plain()
    assert layer.bias is None or not layer.bias.any()
    nn.init.normal_(layer.gain)
    with torch.no_grad():
        for key in base.state_dict():
            getattr(base, key).copy_(getattr(layer, key))
    scaled_weight_standardization(base, gamma=2.0)
    base.parametrizations.weight[0].gain.data.copy_(layer.gain)
    x = torch.randn(shape)
    assert_close(layer(x), base(x).detach())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "gamma=2.0, eps=0.0001, eps_mode='clamp'" in repr(layer)
    assert layer.to(torch.bfloat16).standardized_weight().dtype == torch.bfloat16


def test_loads_gains_of_both_published_shapes():
    layer = ScaledWSConv2d(3, 4, 3)
    state = layer.state_dict()
    gain = torch.randn(4)
    for shape in ((4,), (4, 1, 1, 1)):
        layer.load_state_dict({**state, "gain": gain.view(shape)})
        assert torch.equal(layer.gain, gain)
    with pytest.raises(RuntimeError, match=r"size mismatch for gain"):
        layer.load_state_dict({**state, "gain": torch.ones(5)})


def test_without_gain():
    layer = scaled_weight_standardization(nn.Linear(5, 3), gain=None)
    assert list(dict(layer.named_parameters())) == ["bias", "parametrizations.weight.original"]
    assert_close(layer.weight.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("relu", math.sqrt(2 / (1 - 1 / math.pi))),
        ("silu", 1.787187),
        ("gelu", 1.700926),
        ("elu", 1.270843),
        ("celu", 1.270843),
        ("selu", 1.0),
        ("leaky_relu", 1.704832),
        ("tanh", 1.592537),
        ("sigmoid", 4.801313),
        ("softplus", 1.919126),
        ("logsigmoid", 1.919126),
        ("softsign", 2.337533),
        ("mish", 1.592025),
        ("relu6", 1.712859),
    ],
)
def test_gains_of_the_specification(name, gain):
    assert variance_gain(name) == pytest.approx(gain, abs=6e-7)


def test_gain_makes_variance_one_and_the_presets_are_close():
    z = torch.randn(1_000_000).double()
    assert ScaledActivation("silu")(z).var().item() == pytest.approx(1, abs=0.01)
    assert variance_gain("relu", "deepmind") == 1.7139588594436646
    assert variance_gain(lambda x: x) == pytest.approx(1, abs=1e-9)
    assert variance_gain(torch.square) == pytest.approx(2**-0.5, abs=1e-9)
    assert ScaledActivation("gelu", "deepmind").gain == variance_gain("gelu", "deepmind")
    assert repr(ScaledActivation("relu")) == "ScaledActivation(relu, gain=1.712859)"


def test_errors():
    with pytest.raises(ValueError, match=r"scaled_weight_standardization: every output unit must have at least 2 weights"):
        scaled_weight_standardization(nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(ValueError, match=r"ScaledWSLinear: eps must be positive, got 0"):
        ScaledWSLinear(4, 4, eps=0)
    with pytest.raises(ValueError, match=r"gamma must be positive, got -1"):
        ScaledWSLinear(4, 4, gamma=-1)
    with pytest.raises(ValueError, match=r"eps_mode must be clamp or inside, got 'outside'"):
        scaled_weight_standardization(nn.Linear(4, 4), eps_mode="outside")
    with pytest.raises(ValueError, match=r"must be a function of torch\.nn\.functional, got 'rleu'"):
        variance_gain("rleu")
    with pytest.raises(ValueError, match='preset must be "exact" or "deepmind", got \'timm\''):
        variance_gain("relu", "timm")
    with pytest.raises(ValueError, match=r"has constants for celu, elu"):
        variance_gain("mish", "deepmind")
    with pytest.raises(ValueError, match=r"must vary and be finite"):
        variance_gain(torch.zeros_like)
    with pytest.raises(ValueError, match=r"must be elementwise"):
        variance_gain(torch.sum)
