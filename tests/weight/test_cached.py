"""torch's parametrize.cached() computes a transformed weight once per step: every weight norm must stand it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import equinorm
from tests.helpers import assert_close, assert_grads_close

NORMS = (
    "bjorck_orthonormal",
    "centered_weight_norm",
    "equalized_lr",
    "fix_norm",
    "forced_weight_norm",
    "scaled_weight_standardization",
    "spectral_norm",
    "stable_rank_norm",
    "weight_centering",
    "weight_norm",
    "weight_standardization",
)
BY_ITERATION = ("spectral_norm", "stable_rank_norm")  # each access in training is a step of the power method


def five_uses(layer, x):
    for _ in range(5):
        x = layer(x).tanh()
    names = dict(layer.named_parameters())
    return x, dict(zip(names, torch.autograd.grad(x.sum(), list(names.values())), strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_a_cached_weight_is_computed_once_and_has_the_same_gradients(name):
    torch.manual_seed(0)
    layer = getattr(equinorm, name)(nn.Linear(6, 6).double()).train(name not in BY_ITERATION)
    x, other = torch.randn(3, 6, dtype=torch.float64), copy.deepcopy(layer)
    want, wants = five_uses(layer, x)
    calls = []
    other.parametrizations.weight.register_forward_hook(lambda *_: calls.append(1))
    with parametrize.cached():
        got, grads = five_uses(other, x)
    assert len(calls) == 1
    assert_close(got, want)
    assert_grads_close(grads, wants)


@pytest.mark.parametrize("name", NORMS)
def test_the_cache_ends_with_its_step(name):
    layer = getattr(equinorm, name)(nn.Linear(6, 6).double())
    x = torch.randn(3, 6, dtype=torch.float64)
    with parametrize.cached():
        before = layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    with parametrize.cached():
        assert not torch.allclose(layer(x), before)
