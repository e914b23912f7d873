"""ConditionalSequential: the condition reaches those that take it, and nobody else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import equinorm
from tests.helpers import assert_close


def test_routes_the_condition():
    torch.manual_seed(0)
    conv, norm, film = nn.Conv2d(3, 8, 3), equinorm.ConditionalBatchNorm(8, cond_dim=4, init_std=1.0), equinorm.FiLM(8, 4)
    chain = equinorm.ConditionalSequential(conv, norm, nn.ReLU(), equinorm.ConditionalSequential(nn.Identity(), film))
    x, condition = torch.randn(2, 3, 6, 6), torch.randn(2, 4)
    want = film(norm(conv(x), condition).relu(), condition)
    assert_close(chain(x, condition), want.double())


def test_modules_of_ones_own_join_by_an_attribute():
    class Shift(nn.Module):
        takes_condition = True

        def forward(self, x, condition):
            return x + condition

    chain = equinorm.ConditionalSequential(nn.Identity(), Shift())
    assert torch.equal(chain(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("module", "condition"),
    [
        (equinorm.AdaptiveInstanceNorm(6), torch.randn(2, 6, 4, 4)),
        (equinorm.AdaptiveInstanceNorm(6, 3), torch.randn(2, 3)),
        (equinorm.ConditionalInstanceNorm(6, 3), torch.tensor([0, 2])),
        (equinorm.ConditionalBatchNorm(6, 3), torch.tensor([0, 2])),
        (equinorm.FiLM(6, 3), torch.randn(2, 3)),
        (equinorm.SPADE(6, 3, 4), torch.randn(2, 3, 9, 9)),
        (equinorm.AdaLayerNorm(5, 3), torch.randn(2, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_conditional_norm_takes_part(module, condition):
    chain = equinorm.ConditionalSequential(nn.Identity(), module)
    x = torch.randn(2, 6, 5, 5)
    assert chain(x, condition).shape == x.shape


def test_is_a_sequential():
    chain = equinorm.ConditionalSequential(nn.Linear(3, 4), equinorm.AdaLayerNorm(4, 2), nn.Linear(4, 1))
    assert isinstance(chain, nn.Sequential)
    assert len(chain) == 3
    assert list(chain.state_dict())[:2] == ["0.weight", "0.bias"]
    assert chain[1:](torch.randn(5, 4), torch.randn(5, 2)).shape == (5, 1)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    x, condition = torch.randn(5, 3), torch.randn(5, 2)
    assert_close(compiled(x, condition), chain(x, condition).double())


def test_a_hidden_condition_is_refused():
    chain = equinorm.ConditionalSequential(nn.Sequential(nn.Identity(), nn.Sequential(equinorm.FiLM(6, 3))))
    with pytest.raises(ValueError, match="ConditionalSequential: module '0' is a plain Sequential, but holds a module that takes"):
        chain(torch.randn(2, 6, 4), torch.randn(2, 3))
