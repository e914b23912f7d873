"""Adaptive layer norm, plain and with the zero gate."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import equinorm
from tests.helpers import assert_close

BOTH = pytest.mark.parametrize("cls", [equinorm.AdaLayerNorm, equinorm.AdaLayerNormZero], ids=lambda cls: cls.__name__)


def modulated(norm, *inputs, **options):
    y = norm(*inputs, **options)
    return y[0] if isinstance(y, tuple) else y


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


@BOTH
def test_starts_as_layer_norm_without_parameters(cls):
    norm, x = cls(6, 4).double(), data(3, 5, 6)
    assert_close(modulated(norm, x, data(3, 4)), F.layer_norm(x, (6,), eps=1e-6))


def test_a_fresh_block_is_the_identity_to_the_bit():
    norm, branch = equinorm.AdaLayerNormZero(16, 8), torch.nn.Linear(16, 16)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, 16).to(dtype)
        y, gate = norm(x, torch.randn(2, 8))
        assert (y.dtype, gate.dtype, gate.shape) == (dtype, dtype, (2, 1, 16))
        assert torch.equal(x + gate * branch.to(dtype)(y), x)


def test_while_the_gate_is_zero_only_its_rows_learn():
    norm, branch, x = equinorm.AdaLayerNormZero(16, 8), torch.nn.Linear(16, 16), torch.randn(2, 5, 16)
    y, gate = norm(x, torch.randn(2, 8))
    (x + gate * branch(y)).square().sum().backward()
    shift, scale, of_gate = (part.abs().sum().item() for part in norm.projection.weight.grad.chunk(3))
    assert (shift, scale) == (0, 0)
    assert of_gate > 0


def test_weights_of_a_six_chunk_layer_load_in_two_halves():
    six, c, x = torch.nn.Linear(8, 6 * 16).double(), data(2, 8), data(2, 5, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = six(F.silu(c)).unsqueeze(1).chunk(6, -1)
    for rows, (shift, scale, gate) in ((slice(0, 48), (shift1, scale1, gate1)), (slice(48, 96), (shift2, scale2, gate2))):
        norm = equinorm.AdaLayerNormZero(16, 8).double()
        norm.projection.load_state_dict({"weight": six.weight[rows], "bias": six.bias[rows]})
        y, own_gate = norm(x, c)
        assert_close(y, F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift)
        assert_close(own_gate, gate)


@BOTH
def test_a_condition_per_token_per_sample_or_for_all(cls):
    norm = cls(6, 4).double()
    torch.nn.init.normal_(norm.projection.weight)
    x, c = data(3, 5, 6), data(3, 4)
    want = modulated(norm, x, c)
    assert_close(modulated(norm, x, c[:, None]), want)
    assert_close(modulated(norm, x, c[:, None].expand(3, 5, 4)), want)
    assert_close(modulated(norm, x, c[:1])[0], want[0])
    assert_close(modulated(norm, x[:, 0], c), want[:, 0])
    assert_close(modulated(norm, x[:, :, None], c), want[:, :, None])


def test_small_scales_count_beside_one_in_half_precision():
    norm = equinorm.AdaLayerNorm(64, 1).bfloat16()
    with torch.no_grad():
        norm.projection.bias[64:] = 1e-3
    x = torch.randn(2, 500, 64).bfloat16()
    lost = equinorm.AdaLayerNorm(64, 1)(x, torch.zeros(2, 1))
    y = norm(x, torch.zeros(2, 1).bfloat16())
    ratio = (y.double() * lost.double()).sum() / lost.double().square().sum()
    assert abs(ratio.item() - 1.001) < 2e-4


@BOTH
def test_derivatives_reach_the_condition(cls):
    norm = cls(5, 3).double()
    torch.nn.init.normal_(norm.projection.weight)
    x, c = data(2, 3, 5).requires_grad_(), data(2, 3).requires_grad_()
    torch.autograd.gradcheck(norm, (x, c))
    torch.autograd.gradgradcheck(norm, (x, c))


@BOTH
@pytest.mark.parametrize(
    ("condition", "error", "pattern"),
    [
        (torch.zeros(3, 5), ValueError, r"must have shape \(3, 4\).* or \(3, 5, 4\).* got \(3, 5\)"),
        (torch.zeros(2, 4), ValueError, r"got \(2, 4\)"),
        (torch.zeros(3, 2, 4), ValueError, r"got \(3, 2, 4\)"),
        (torch.zeros(4), ValueError, r"got \(4,\)"),
        (torch.zeros(3, 4, dtype=torch.long), TypeError, r"condition must be floating point, got torch.int64"),
    ],
)
def test_bad_conditions_are_refused(cls, condition, error, pattern):
    with pytest.raises(error, match=f"{cls.__name__}: .*{pattern}"):
        cls(6, 4)(torch.randn(3, 5, 6), condition)
