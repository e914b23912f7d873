from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equinorm import FixupBlock, fixup_init_, fixup_parameter_groups
from tests.helpers import assert_close


def conv(i: int, o: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options)


def test_the_block_is_the_published_one():
    block = FixupBlock(conv(4, 6), conv(6, 4), num_branches=9).double()
    c1, c2 = block.layers
    for p in block.parameters():
        nn.init.normal_(p)
    (b1, b3), (b2,) = block.before_layer, block.before_activation
    x = torch.randn(2, 4, 5, 5).double()
    z = c2(F.relu(c1(x + b1) + b2) + b3) * block.scale + block.after
    assert_close(block(x), F.relu(x + z).detach())


def test_three_layers_with_a_shortcut_that_sees_the_first_bias():
    shortcut = conv(4, 8, 1, stride=2)
    block = FixupBlock(
        conv(4, 4, 1), conv(4, 4, stride=2), conv(4, 8, 1), num_branches=16, shortcut=shortcut, final_activation=False
    ).double()
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 4, 6, 6).double()
    start = x + block.before_layer[0]
    z = block.layers[0](start)
    z = block.layers[1](F.relu(z + block.before_activation[0]) + block.before_layer[1])
    z = block.layers[2](F.relu(z + block.before_activation[1]) + block.before_layer[2])
    assert_close(block(x), (z * block.scale + block.after + shortcut(start)).detach())


@pytest.mark.parametrize(("m", "power"), [(2, -1 / 2), (3, -1 / 4), (4, -1 / 6)])
def test_initialisation_scales_with_the_number_of_branches(m, power):
    torch.manual_seed(0)
    branches = [[conv(64, 64) for _ in range(m)] for _ in range(16)]
    classifier = nn.Linear(64, 10)
    fixup_init_(branches, classifier)
    he = (2 / (64 * 9)) ** 0.5
    for branch in branches:
        for layer in branch[:-1]:
            assert layer.weight.std().item() == pytest.approx(he * 16**power, rel=0.03)
        assert not branch[-1].weight.any()
    assert not classifier.weight.any()
    assert not classifier.bias.any()


def test_blocks_initialise_their_layers_alike():
    torch.manual_seed(0)
    block = FixupBlock(conv(64, 128), conv(128, 64), num_branches=16)
    assert block.layers[0].weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5 / 4, rel=0.03)
    assert not block.layers[1].weight.any()
    by_input = FixupBlock(conv(64, 128), conv(128, 64), num_branches=16, mode="fan_in")
    assert by_input.layers[0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5 / 4, rel=0.03)
    assert not FixupBlock(nn.Linear(4, 4), num_branches=3).layers[0].weight.any()


def test_a_deep_fresh_network_is_its_stem_and_moves_boundedly():
    """A fresh stack passes its input on; after one step of SGD the output moves about as much at 100 blocks as at 10."""
    moved = []
    for depth in (10, 100):
        torch.manual_seed(0)
        blocks = nn.Sequential(
            *[FixupBlock(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False), num_branches=depth) for _ in range(depth)]
        )
        x = torch.rand(16, 32)
        before = blocks(x)
        assert torch.equal(before, x)
        optimizer = torch.optim.SGD(fixup_parameter_groups(blocks, lr=0.05))
        before.square().mean().mul(16).backward()
        optimizer.step()
        moved.append((blocks(x) - x).norm().item())
    assert moved[1] < 3 * moved[0]
    assert moved[0] > 1e-3


def test_parameter_groups():
    block = FixupBlock(nn.Linear(4, 4), nn.Linear(4, 4), num_branches=3)
    weights, scalars = fixup_parameter_groups(block, lr=1.0, weight_decay=0.1, momentum=0.9)
    assert (weights["lr"], weights["weight_decay"], weights["momentum"], len(weights["params"])) == (1.0, 0.1, 0.9, 4)
    assert (scalars["lr"], scalars["weight_decay"], len(scalars["params"])) == (0.1, 0.0, 5)


def test_block_copies_saves_and_has_derivatives():
    block = FixupBlock(nn.Linear(3, 4), nn.Linear(4, 3), num_branches=3, activation=torch.tanh).double()
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    other = FixupBlock(nn.Linear(3, 4), nn.Linear(4, 3), num_branches=3, activation=torch.tanh).double()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradgradcheck(block, (x,))
    assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x).detach())


def test_errors():
    with pytest.raises(ValueError, match=r"fixup_init_: there must be at least one branch, got none"):
        fixup_init_([])
    with pytest.raises(ValueError, match=r"each with a weight of at least 2 dimensions; got Linear, ReLU"):
        fixup_init_([[nn.Linear(2, 2), nn.ReLU()]])
    with pytest.raises(ValueError, match=r"FixupBlock: a branch must hold at least one layer.* got none"):
        FixupBlock(num_branches=2)
    with pytest.raises(ValueError, match=r"got BatchNorm2d"):
        fixup_init_([[nn.BatchNorm2d(2)]])
