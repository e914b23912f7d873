from __future__ import annotations

import pytest
import torch
from torch import nn

from equinorm import centered_weight_norm, weight_standardization
from tests.helpers import assert_close, assert_grads_close
from tests.references import weight as reference


@pytest.mark.parametrize(
    ("layer", "transposed", "groups"),
    [
        (lambda: nn.Linear(5, 3), False, 1),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), False, 2),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), True, 2),
    ],
)
def test_equals_the_reference(layer, transposed, groups):
    module = centered_weight_norm(layer().double(), learnable_scale=True, eps=0.1)
    original, scale = module.parametrizations.weight.original, module.parametrizations.weight[0].scale
    with torch.no_grad():
        scale.normal_()
    units = iter(scale)
    expected = reference.per_unit(original, lambda w: reference.centered_weight(w, next(units), 0.1), transposed, groups)
    assert_close(module.weight, expected)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(module.weight, (original, scale), upstream)
    want = torch.autograd.grad(expected, (original, scale), upstream)
    assert_grads_close(dict(zip("vs", got, strict=True)), dict(zip("vs", want, strict=True)))


def test_the_numbers_of_the_specification():
    layer = centered_weight_norm(nn.Linear(4, 1).double())
    layer.weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]]).double()
    torch.testing.assert_close(layer.weight[0].detach(), torch.tensor([-0.7559, -0.3780, 0, 1.1339]).double(), atol=5e-5, rtol=0)


def test_rows_sum_to_zero_with_the_wanted_length_and_relate_to_standardization():
    base, other = nn.Linear(9, 3).double(), nn.Linear(9, 3).double()
    other.load_state_dict(base.state_dict())
    layer = centered_weight_norm(base, scale=3.0, eps=1e-30)
    assert_close(layer.weight.sum(1), torch.zeros(3).double())
    assert_close(layer.weight.norm(dim=1), torch.full((3,), 3.0).double())
    assert_close(layer.weight, weight_standardization(other, eps=1e-30).weight.detach() * 3 / 9**0.5)
    assert [name for name, _ in layer.named_parameters()] == ["bias", "parametrizations.weight.original"]


def test_keeps_the_second_moment_behind_a_relu():
    torch.manual_seed(0)
    x = torch.randn(4000, 256).double()
    y = centered_weight_norm(nn.Linear(256, 256, bias=False).double())(x.relu())
    centred = y - y.mean(0)
    assert centred.square().mean().item() == pytest.approx(2 * x.relu().var().item(), rel=0.05)


def test_errors():
    with pytest.raises(ValueError, match=r"centered_weight_norm: every output unit must have at least 2 weights, got 1"):
        centered_weight_norm(nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(ValueError, match=r"eps must be positive, got 0"):
        centered_weight_norm(nn.Linear(4, 4), eps=0)
    with pytest.raises(ValueError, match=r"scale must be positive, got 0"):
        centered_weight_norm(nn.Linear(4, 4), scale=0)
