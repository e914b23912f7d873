from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from equinorm import FixupBlock, LayerScale, ReZero, ScaledResidual, SkipInit, variance_preserving_sum
from tests.helpers import assert_close


def test_why_the_constant_is_there():
    """The sum of two unit branches has standard deviation 1.41, the scaled sum has 1; eight in a row have 16 and 1."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 200_000)
    assert (a + b).std().item() == pytest.approx(2**0.5, rel=0.01)
    assert variance_preserving_sum(a, b).std().item() == pytest.approx(1, rel=0.01)
    plain, scaled = a, a
    for _ in range(8):
        branch = torch.randn(200_000)
        plain, scaled = plain + branch * plain.std(), variance_preserving_sum(scaled, branch)
    assert plain.std().item() == pytest.approx(16, rel=0.02)
    assert scaled.std().item() == pytest.approx(1, rel=0.02)


def test_it_holds_for_uncorrelated_branches_only():
    a = torch.randn(200_000)
    assert variance_preserving_sum(a, a).std().item() == pytest.approx(2**0.5, rel=0.01)
    assert variance_preserving_sum(a, -a).std().item() == 0


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_any_number_of_parts_and_weights(k):
    parts = torch.randn(k, 5).double()
    assert_close(variance_preserving_sum(*parts), parts.sum(0) / k**0.5)
    weights = tuple(0.5 + i for i in range(k))
    expected = sum(w * x for w, x in zip(weights, parts, strict=True)) / sum(w * w for w in weights) ** 0.5
    assert_close(variance_preserving_sum(*parts, weights=weights), expected)


def test_scaled_residual_and_its_gradient():
    branch, shortcut = nn.Linear(4, 3).double(), nn.Linear(4, 3, bias=False).double()
    block = ScaledResidual(branch, shortcut)
    x = torch.randn(2, 4).double()
    assert_close(block(x), (branch(x) + shortcut(x)).detach() / 2**0.5)
    favoured = ScaledResidual(nn.Tanh(), weights=(3.0, 4.0))
    assert_close(favoured(x), (3 * x + 4 * x.tanh()) / 5)
    assert torch.autograd.gradcheck(favoured, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(favoured, (x,))
    assert "weights=(3.0, 4.0)" in repr(favoured)


def test_skip_init_starts_as_the_identity_and_learns():
    add = SkipInit()
    x, branch = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    y = add(x, branch)
    assert torch.equal(y, x)
    y.sum().backward()
    assert_close(add.alpha.grad, branch.detach().sum().view(1))
    assert not branch.grad.any()
    assert_close(SkipInit(0.5)(x, branch.detach()).detach(), x + 0.5 * branch.detach())


def test_rezero_shares_one_scalar():
    attention, feed_forward = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    layer = ReZero(attention, feed_forward, dtype=torch.float64)
    x = torch.randn(2, 4).double()
    assert torch.equal(layer(x), x)
    assert [n for n, p in layer.named_parameters() if "sublayers" not in n] == ["alpha"]
    nn.init.constant_(layer.alpha, 0.7)
    middle = x + 0.7 * attention(x)
    assert_close(layer(x), (middle + 0.7 * feed_forward(middle)).detach())
    layer.reset_parameters()
    assert not layer.alpha.any()


class Echo(nn.Module):
    def forward(self, x, factor=1.0):
        return factor * x


def test_rezero_hands_keywords_on():
    assert_close(ReZero(Echo(), init=1.0)(torch.ones(2), factor=3.0).detach(), torch.full((2,), 4.0))


def test_layer_scale_in_both_layouts():
    tokens, maps = LayerScale(3, init=0.1), LayerScale.for_channels(3, init=0.1)
    gamma = torch.tensor([1.0, 2.0, 3.0])
    tokens.gamma.data, maps.gamma.data = gamma, gamma
    x = torch.randn(2, 3, 4, 5)
    assert_close(maps(x), (x * gamma.view(3, 1, 1)))
    assert_close(tokens(x.movedim(1, -1)).movedim(-1, 1), x * gamma.view(3, 1, 1))
    assert_close(maps(x[:, :, 0, 0]), x[:, :, 0, 0] * gamma)


@pytest.mark.parametrize("make", [lambda: SkipInit(0.3), lambda: LayerScale(3, 0.3), lambda: ReZero(nn.Identity(), init=0.3)])
def test_half_inputs_stay_half_with_wide_scalars(make):
    module, x = make(), torch.randn(2, 3).bfloat16()
    y = module(x, x) if isinstance(module, SkipInit) else module(x)
    assert y.dtype == torch.bfloat16
    assert "init=0.3" in repr(module)
    assert torch.equal(copy.deepcopy(module).state_dict()[next(iter(module.state_dict()))], next(module.parameters()))


def test_errors():
    with pytest.raises(ValueError, match=r"variance_preserving_sum: there must be at least one part and one weight for each, got 0 parts"):
        variance_preserving_sum()
    with pytest.raises(ValueError, match=r"got 2 parts and 1 weights"):
        variance_preserving_sum(torch.ones(1), torch.ones(1), weights=(1.0,))
    with pytest.raises(ValueError, match=r"at least one weight must differ from 0"):
        ScaledResidual(nn.Identity(), weights=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"ReZero: there must be at least one sublayer, got none"):
        ReZero()
    with pytest.raises(ValueError, match=r"LayerScale: the input must have shape \(\.\.\., 3\), got \(2, 4\)"):
        LayerScale(3)(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"FixupBlock: num_branches must be at least 1, got 0"):
        FixupBlock(nn.Linear(2, 2), num_branches=0)
