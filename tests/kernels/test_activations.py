"""The table of activations: what follows from a function agrees with closed forms, what is written down with autograd."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equinorm.kernels import activations
from equinorm.kernels.activations import TABLE, find, of_module

Z = torch.linspace(-7, 7, 401, dtype=torch.float64)[torch.linspace(-7, 7, 401, dtype=torch.float64).abs() > 1e-3]


@pytest.mark.parametrize("name", TABLE)
def test_the_derivative_is_that_of_finite_differences(name):
    f = find(name)
    z = Z[((Z.abs() - torch.tensor([[0.5], [1], [3], [6]])).abs() > 1e-3).all(0)]  # away from kinks
    step = 1e-6
    expected = (f.function(z + step) - f.function(z - step)) / (2 * step)
    assert torch.allclose(f.derivative(z), expected, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in TABLE if find(name).pull])
def test_the_derivative_from_the_output_is_that_from_the_input(name):
    f = find(name)
    z, pull = Z[Z.abs() < 6], f.pull
    assert pull is not None
    dy = torch.randn_like(z)
    assert torch.allclose(pull(dy, f.function(z)), dy * f.derivative(z), atol=1e-10)


@pytest.mark.parametrize("f", [activations.identity(), activations.leaky_relu(0.2), activations.elu(0.7)], ids=lambda f: f.name)
def test_inverses_undo(f):
    assert torch.allclose(f.inverse(f.function(Z)), Z, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "rms", "mean"),
    [
        ("identity", 1.0, 0.0),
        ("relu", math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)),
        ("leaky_relu", math.sqrt((1 + 1e-4) / 2), 0.99 / math.sqrt(2 * math.pi)),
        ("selu", 1.0, 0.0),
        ("hardtanh", math.sqrt(math.erf(2**-0.5) - math.sqrt(2 / math.pi) * math.exp(-0.5) + math.erfc(2**-0.5)), 0.0),
        ("sigmoid", None, 0.5),
        ("gelu", None, 1 / (2 * math.sqrt(math.pi))),
    ],
)
def test_moments_are_those_in_closed_form(name, rms, mean):
    f = find(name)
    assert f.mean == pytest.approx(mean, abs=1e-9)
    if rms is not None:
        assert f.gain == pytest.approx(1 / rms, abs=1e-8)
    assert f.rms**2 == pytest.approx(f.std**2 + f.mean**2)
    assert f.variance_gain == pytest.approx(1 / f.std)


def test_the_gain_before_an_activation_keeps_gradients():
    assert find("relu").backward_gain == pytest.approx(math.sqrt(2))
    assert find("identity").backward_gain == pytest.approx(1)
    z = torch.randn(1_000_000, dtype=torch.float64)
    assert find("tanh").derivative(z).square().mean().sqrt().item() * find("tanh").backward_gain == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("relu", 0.0, math.inf),
        ("relu6", 0.0, 6.0),
        ("hardtanh", -1.0, 1.0),
        ("hardsigmoid", -3.0, 3.0),
        ("leaky_relu", -math.inf, math.inf),
        ("identity", -math.inf, math.inf),
        ("softshrink", -math.inf, math.inf),
        ("elu", math.log(0.005), math.inf),
        ("tanh", -math.acosh(200**0.5), math.acosh(200**0.5)),
    ],
)
def test_ends_are_where_the_slope_vanishes(name, low, high):
    assert find(name).ends == pytest.approx((low, high), abs=1e-3)


def test_saturated_marks_both_ends():
    assert find("tanh").saturated(torch.tensor([-5.0, -1.0, 0.0, 2.0, 9.0])).tolist() == [True, False, False, False, True]
    assert find("relu").saturated(torch.tensor([-5.0, 0.0, 9.0])).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.LeakyReLU(0.3),
        nn.ELU(0.5),
        nn.CELU(2.0),
        nn.SELU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Mish(),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Hardtanh(-2, 3),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.LogSigmoid(),
        nn.Softplus(2.0, 5.0),
        nn.Softsign(),
        nn.Softshrink(0.2),
        nn.Hardshrink(0.3),
        nn.Tanhshrink(),
        nn.PReLU(),
        nn.RReLU().eval(),
        nn.Identity(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_is_found_with_its_parameters(module):
    f = of_module(module)
    assert f is not None
    x = Z.float()
    assert torch.allclose(f.function(x), module(x.clone()), atol=1e-6)


def test_every_activation_module_of_torch_has_its_row():
    elementwise = set()
    for name in nn.modules.activation.__all__:
        try:
            module = getattr(nn, name)().eval()
            whole, part = module(Z.float()), module(Z[:7].float())
        except (TypeError, ValueError, RuntimeError, UserWarning):
            continue
        if torch.equal(whole[:7], part):
            elementwise.add(type(module))
    assert elementwise <= set(activations.MODULES), f"without a row: {elementwise - set(activations.MODULES)}"


def test_what_is_not_in_the_table():
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * F.relu(x)

    assert of_module(nn.Linear(2, 2)) is None
    assert of_module(Doubled()) is None
    assert find(Doubled()).gain == pytest.approx(2**-0.5)  # integrated as it is
    assert find(torch.square).name == "square"
    assert find(torch.sign).derivative(Z).abs().max() == 0
    with pytest.raises(ValueError, match=r"must be a function of torch\.nn\.functional, got 'rleu'; known are celu"):
        find("rleu")
    with pytest.raises(
        ValueError, match=r"activation zeros_like: its output must vary and be finite for inputs within \+-12, got variance 0"
    ):
        _ = find(torch.zeros_like).gain
    with pytest.raises(ValueError, match=r"activation sum: it must be elementwise"):
        _ = find(torch.sum).gain


def test_derivatives_are_there_in_inference_mode():
    with torch.inference_mode():
        assert torch.equal(find("relu").derivative(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["leaky_relu", "gelu_tanh", "hardtanh", "softplus"])
def test_functions_of_the_table_can_be_copied_and_pickled(name):
    f = find(name).function
    assert torch.equal(copy.deepcopy(f)(Z), f(Z))
    assert torch.equal(pickle.loads(pickle.dumps(f))(Z), f(Z))
