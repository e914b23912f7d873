"""Conditional instance norm: rows and blends of a table, and what must be refused."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close


def trained(classes=4):
    norm = equinorm.ConditionalInstanceNorm(6, classes).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


def data(n=3):
    return torch.randn(n, 6, 5, 4, dtype=torch.float64) * 2 + 1


def test_a_share_of_one_is_the_row():
    norm, x, y = trained(), data(), torch.tensor([2, 0, 2])
    want = norm(x, y)
    assert_close(norm(x, torch.nn.functional.one_hot(y, 4).double()), want)
    assert_close(norm(x, y.int()), want)
    assert_close(norm(x, torch.tensor([0.0, 0, 1, 0]))[0], want[0])


def test_shares_blend_rows_without_being_normalized():
    norm, x = trained(), data()
    parts = [norm(x, torch.full((3,), k)) for k in (0, 3)]
    assert_close(norm(x, torch.tensor([0.5, 0, 0, 2.0]).double()), 0.5 * parts[0] + 2.0 * parts[1])


def test_one_class_is_instance_norm():
    norm, x = trained(1), data()
    plain = equinorm.InstanceNorm(6, affine=True).double()
    plain.load_state_dict({"weight": norm.weight[0], "bias": norm.bias[0]})
    assert_close(norm(x, torch.zeros(3, dtype=torch.long)), plain(x))


def test_only_the_rows_of_the_batch_receive_gradient():
    norm = trained()
    norm(data(), torch.tensor([1, 3, 3])).square().sum().backward()
    for parameter in norm.parameters():
        assert parameter.grad.abs().sum(1).ne(0).tolist() == [False, True, False, True]


def test_derivatives_reach_the_shares():
    norm, x, shares = trained(), data()[..., 0].requires_grad_(), torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(norm, (x, shares))
    torch.autograd.gradgradcheck(norm, (x, shares))


def test_half_tables_blend_in_float32():
    norm, x, shares = trained().bfloat16(), data().bfloat16(), torch.rand(3, 4)
    assert_close(norm(x, shares), norm.double()(x.double(), shares.double()), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("y", "error", "pattern"),
    [
        (torch.tensor([0, 1, 4]), ValueError, r"class numbers must be in \[0, 4\), got 4"),
        (torch.tensor([0, -1, 3]), ValueError, r"class numbers must be in \[0, 4\), got -1"),
        (torch.tensor([0, 1]), ValueError, r"class numbers must have shape \(3,\).* got \(2,\)"),
        (torch.rand(3, 5), ValueError, r"shares must have shape \(3, 4\) or \(4,\).* got \(3, 5\)"),
        (torch.rand(2, 4), ValueError, r"shares must have shape \(3, 4\) or \(4,\).* got \(2, 4\)"),
        (torch.tensor([True, False, True]), TypeError, r"classes must be int64 or int32 .* got torch.bool"),
    ],
)
def test_bad_choices_are_refused(y, error, pattern):
    with pytest.raises(error, match=f"ConditionalInstanceNorm: {pattern}"):
        trained()(data(), y)
