"""FiLM: an affine map per sample and channel, nothing measured."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close


def test_scales_and_shifts_what_the_condition_says():
    film = equinorm.FiLM(2, 1)
    with torch.no_grad():
        film.projection.weight.copy_(torch.tensor([[1.0], [-2.0], [10.0], [0.0]]))
        film.projection.bias.copy_(torch.tensor([0.0, 0.5, 0.0, 3.0]))
    x = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]])
    assert_close(film(x, torch.tensor([[1.0]])), torch.tensor([[[12.0, 14.0], [2.5, 2.0]]]).double())


def test_behind_a_norm_it_is_a_conditional_norm():
    film, x, e = equinorm.FiLM(6, 5).double(), torch.randn(3, 6, 4, 4).double(), torch.randn(3, 5).double()
    adain = equinorm.AdaptiveInstanceNorm(6, 5).double()
    adain.load_state_dict(film.state_dict())
    assert_close(film(equinorm.InstanceNorm(6)(x), e), adain(x, e))


def test_derivatives_reach_the_condition():
    film = equinorm.FiLM(3, 4).double()
    x, e = torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(2, 4).double().requires_grad_()
    torch.autograd.gradcheck(film, (x, e))
    torch.autograd.gradgradcheck(film, (x, e))


def test_one_condition_may_serve_the_batch():
    film, x, e = equinorm.FiLM(6, 5).double(), torch.randn(3, 6, 4, 4).double(), torch.randn(1, 5).double()
    assert_close(film(x, e), film(x, e.expand(3, 5)))


@pytest.mark.parametrize(
    ("condition", "error", "pattern"),
    [
        (torch.zeros(2, 4), ValueError, r"condition must have shape \(3, 5\), one row per sample, or \(1, 5\); got \(2, 4\)"),
        (torch.zeros(5), ValueError, r"condition must have shape"),
        (torch.zeros(3, 5, dtype=torch.int32), TypeError, r"condition must be floating point, got torch.int32"),
    ],
)
def test_bad_conditions_are_refused(condition, error, pattern):
    with pytest.raises(error, match=f"FiLM: .*{pattern}"):
        equinorm.FiLM(6, 5)(torch.randn(3, 6, 4, 4), condition)
