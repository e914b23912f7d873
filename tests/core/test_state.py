"""State that training moves: kept wide, spared from bad batches, and read again as it was by a repeated forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from equinorm.core.running import RunningState, recomputing


class Counting(RunningState):
    """Adds its state to the input, then moves the state: the output depends on how often it ran before."""

    kept_wide = ("level",)

    def __init__(self, dtype=None):
        super().__init__()
        self.level: torch.Tensor
        self.register_state("level", (2,), dtype=dtype)
        nn.init.zeros_(self.level)

    def forward(self, x):
        (level,) = self.before_step("level")
        if self.learning and not recomputing():
            self.move("level", level + x.detach().mean(0))
        return x.sin() * (1 + level)


def test_it_stays_wide_in_half_modules():
    assert Counting(torch.float16).level.dtype == torch.float32
    assert Counting().bfloat16().level.dtype == torch.float32
    assert Counting().double().level.dtype == torch.float64


def test_values_that_are_not_finite_or_not_wanted_change_nothing():
    module = Counting()
    module.move("level", torch.tensor([1.0, torch.nan]))
    assert module.level.tolist() == [1.0, 0.0]
    module.move("level", torch.tensor([1e300, 5.0], dtype=torch.float64))  # too large for float32
    assert module.level.tolist() == [1.0, 5.0]
    module.move("level", torch.tensor([[7.0, 7.0]]), torch.tensor([False, True]))
    assert module.level.tolist() == [1.0, 7.0]


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_a_repeated_forward_computes_the_same_again(reentrant):
    module, x = Counting().double(), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    module(x)
    straight = copy.deepcopy(module)
    (expected,) = torch.autograd.grad(straight(x).sum(), x)
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    assert torch.equal(module.level, straight.level)


def test_frozen_state_rests():
    module = Counting()
    module.frozen = True
    module.train()(torch.ones(3, 2))
    assert not module.level.any()
