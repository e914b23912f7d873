from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from equinorm import WSConv1d, WSConv2d, WSConv3d, WSLinear, weight_standardization
from tests.helpers import assert_close, assert_grads_close
from tests.references import weight as reference

MODES = ["inside", "outside", "clamp", "relative"]


@pytest.mark.parametrize("eps_mode", MODES)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("layer", "transposed", "groups"),
    [
        (lambda: nn.Linear(5, 3), False, 1),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), False, 2),
        (lambda: nn.ConvTranspose2d(4, 6, 3), True, 1),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), True, 2),
    ],
)
def test_equals_the_reference(layer, transposed, groups, unbiased, eps_mode):
    module = weight_standardization(layer().double(), eps=0.05, unbiased=unbiased, eps_mode=eps_mode)
    original = module.parametrizations.weight.original
    expected = reference.per_unit(original, lambda w: reference.standardize(w, 0.05, unbiased, eps_mode), transposed, groups)
    assert_close(module.weight, expected)
    upstream = torch.randn_like(expected)
    (got,) = torch.autograd.grad(module.weight, original, upstream)
    (want,) = torch.autograd.grad(expected, original, upstream)
    assert_grads_close({"weight": got}, {"weight": want})


def row(*values: float, **options) -> torch.Tensor:
    layer = weight_standardization(nn.Linear(len(values), 1).double(), **options)
    layer.weight = torch.tensor([values], dtype=torch.float64)
    return layer.weight.detach()[0]


def test_the_numbers_of_the_specification():
    torch.testing.assert_close(row(1, 2, 3, 6, eps=1e-30), torch.tensor([-1.0690, -0.5345, 0, 1.6036]).double(), atol=5e-5, rtol=0)
    unbiased = row(1, 2, 3, 6, eps=1e-30, unbiased=True)
    torch.testing.assert_close(unbiased, torch.tensor([-0.9258, -0.4629, 0, 1.3887]).double(), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("eps", "eps_mode", "std"), [(1e-5, "inside", 0.3015), (1e-5, "outside", 0.9901), (1e-6, "inside", 0.7071)])
def test_eps_inside_the_root_is_not_negligible_for_small_weights(eps, eps_mode, std):
    small = row(-1e-3, 1e-3, eps=eps, eps_mode=eps_mode)
    assert small.std(unbiased=False).item() == pytest.approx(std, abs=5e-5)


@pytest.mark.parametrize("eps_mode", ["clamp", "relative"])
def test_modes_that_keep_scale_invariance(eps_mode):
    weights = torch.randn(6).double().tolist()
    assert_close(row(*(0.01 * w for w in weights), eps_mode=eps_mode), row(*weights, eps_mode=eps_mode))


def test_inside_loses_scale_invariance_as_documented():
    weights = torch.randn(400).double()
    weights = (weights - weights.mean()) / weights.std(unbiased=False)
    ratio = row(*(0.01 * weights).tolist(), eps=1e-5) / row(*(0.1 * weights).tolist(), eps=1e-5)
    assert 1 - ratio.mean().item() == pytest.approx(0.046, abs=1e-3)


def test_units_have_mean_zero_variance_one_and_shift_invariance():
    weights = torch.randn(4, 50).double()
    layer = weight_standardization(nn.Linear(50, 4).double(), eps=1e-30)
    layer.weight = weights
    assert_close(layer.weight.mean(1), torch.zeros(4).double())
    assert_close(layer.weight.var(1, unbiased=False), torch.ones(4).double())
    expected = layer.weight.detach()
    layer.weight = weights * torch.tensor([[0.1], [1.0], [3.0], [7.0]]) + torch.tensor([[5.0], [-1.0], [0.0], [9.0]])
    assert_close(layer.weight, expected)


def test_gradient_is_orthogonal_to_ones_and_to_the_centred_weight():
    layer = weight_standardization(nn.Linear(7, 3).double(), eps=1e-30)
    original = layer.parametrizations.weight.original
    (grad,) = torch.autograd.grad(layer.weight, original, torch.randn(3, 7).double())
    centred = original - original.mean(1, keepdim=True)
    assert grad.sum(1).abs().max() < 1e-12
    assert (grad * centred).sum(1).abs().max() < 1e-12


def test_a_large_mean_does_not_cost_precision():
    weights = torch.randn(2, 300) + 1e4
    layer = weight_standardization(nn.Linear(300, 2), eps=1e-12)
    layer.weight = weights
    expected = weights.double() - weights.double().mean(1, keepdim=True)
    assert_close(layer.weight, expected / expected.square().mean(1, keepdim=True).sqrt())


def test_a_constant_filter_gives_zeros_and_the_documented_gradient():
    layer = weight_standardization(nn.Linear(4, 1).double())
    layer.weight = torch.full((1, 4), 0.5).double()
    upstream = torch.tensor([[1.0, 0, 0, 0]]).double()
    (grad,) = torch.autograd.grad(layer.weight, layer.parametrizations.weight.original, upstream)
    assert_close(layer.weight, torch.zeros(1, 4).double())
    assert_close(grad, (upstream - 0.25) * 1000)


@pytest.mark.parametrize(
    ("ours", "plain", "x"),
    [
        (lambda: WSLinear(6, 4), lambda: nn.Linear(6, 4), (3, 6)),
        (lambda: WSConv1d(4, 6, 3, groups=2), lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 8)),
        (
            lambda: WSConv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            (2, 3, 5, 5),
        ),
        (lambda: WSConv3d(2, 4, 2, bias=False), lambda: nn.Conv3d(2, 4, 2, bias=False), (2, 2, 4, 4, 4)),
    ],
)
def test_layers_equal_the_parametrization_and_load_plain_checkpoints(ours, plain, x):
    layer, base = ours(), plain()
    layer.load_state_dict(base.state_dict())
    x = torch.randn(x)
    assert_close(layer(x), weight_standardization(base)(x).detach())
    assert "eps=1e-06, unbiased=False, eps_mode='inside'" in repr(layer)


def test_layer_options_reach_the_rule():
    options = {"eps": 0.1, "unbiased": True, "eps_mode": "outside"}
    layer = WSLinear(5, 2, **options)
    base = nn.Linear(5, 2)
    base.load_state_dict(layer.state_dict())
    assert_close(layer.standardized_weight(), weight_standardization(base, **options).weight.detach())


def test_another_parameter_and_an_explicit_dimension():
    attention = weight_standardization(nn.MultiheadAttention(8, 2), name="in_proj_weight")
    assert attention.in_proj_weight.mean(1).abs().max() < 1e-6
    by_column = weight_standardization(nn.Linear(5, 4), dim=-1)
    assert by_column.weight.mean(0).abs().max() < 1e-6


def test_works_on_recurrent_layers():
    lstm = weight_standardization(nn.LSTM(3, 4), name="weight_hh_l0")
    x = torch.randn(5, 2, 3)
    y, _ = lstm(x)
    y.sum().backward()
    assert lstm.parametrizations["weight_hh_l0"].original.grad.abs().sum() > 0
    expected, _ = parametrize.remove_parametrizations(lstm, "weight_hh_l0")(x)
    assert_close(y.detach(), expected)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 1, groups=4), {}, ValueError, "at least 2 weights, got 1.*use weight_norm"),
        (
            lambda: nn.Linear(4, 4),
            {"name": "wieght"},
            ValueError,
            "Linear must have a parameter named 'wieght'; its own parameters are: weight, bias",
        ),
        (lambda: nn.Linear(4, 4), {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        (
            lambda: nn.Linear(4, 4),
            {"eps_mode": "outsid"},
            ValueError,
            "eps_mode must be one of inside, outside, clamp, relative, got 'outsid'",
        ),
        (lambda: nn.Linear(4, 4), {"dim": 2}, ValueError, r"dim must lie in \[-2, 1\] for a weight of shape \(4, 4\), got 2"),
        (lambda: nn.LazyLinear(4), {}, ValueError, "has no shape yet; run one batch"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), {}, TypeError, "must be real floating point, got torch.complex64"),
        (lambda: nn.Linear(4, 4), {"name": "bias"}, ValueError, "at least 2 weights, got 1"),
    ],
)
def test_errors(make, options, error, message):
    with pytest.raises(error, match=message):
        weight_standardization(make(), **options)


def test_layer_errors_name_the_layer():
    with pytest.raises(ValueError, match=r"WSConv2d: every output unit must have at least 2 weights"):
        WSConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match=r"WSLinear: eps must be positive"):
        WSLinear(4, 4, eps=-1.0)


def test_a_scalar_parameter_is_refused():
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"at least one dimension, got a scalar"):
        weight_standardization(module, name="scale")
