from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from equinorm import DynamicErf, DynamicTanh
from tests.helpers import assert_close

both = pytest.mark.parametrize("cls", [DynamicTanh, DynamicErf])


@both
def test_bounded_odd_and_linear_for_small_slopes(cls):
    layer = cls(4).double()
    nn.init.normal_(layer.weight)
    x = 5 * torch.randn(3, 4).double()
    assert (layer(x).abs() <= layer.weight.abs()).all()
    assert_close(layer(-x), -layer(x).detach())
    nn.init.constant_(layer.alpha, 1e-9)
    slope = 1.0 if cls is DynamicTanh else 2 / math.sqrt(math.pi)
    assert_close(layer(x), (layer.weight * slope * 1e-9 * x).detach())


def test_root_mean_square_at_the_start():
    z = torch.randn(1_000_000).double()
    assert DynamicTanh(1)(z[:, None]).square().mean().sqrt().item() == pytest.approx(0.4166, abs=1e-3)
    assert DynamicErf(1)(z[:, None]).square().mean().sqrt().item() == pytest.approx(0.4651, abs=1e-3)


def test_erf_with_the_matching_slope_starts_like_tanh():
    tanh, erf = DynamicTanh(1, 0.4).double(), DynamicErf(1, 0.4 * math.sqrt(math.pi) / 2).double()
    x = torch.linspace(-1e-4, 1e-4, 5).double()[:, None]
    torch.testing.assert_close(erf(x), tanh(x), rtol=1e-6, atol=0)


@both
def test_slope_and_shift_are_one_number_and_layouts_agree(cls):
    tokens, maps = cls(6), cls.for_channels(6)
    assert tokens.alpha.shape == (1,)
    assert cls is DynamicTanh or tokens.shift.shape == (1,)
    for p, q in zip(tokens.parameters(), maps.parameters(), strict=True):
        nn.init.normal_(p)
        q.data = p.data
    x = torch.randn(2, 6, 3, 4)
    assert_close(maps(x), tokens(x.movedim(1, -1)).movedim(-1, 1).detach())
    assert cls((3, 4)).weight.shape == (3, 4)
    assert "channels_last=False" in repr(maps)


@both
def test_the_slopes_gradient_is_summed_wide(cls):
    """Half a million terms of 2^-9 in bfloat16: summed there they would stop at 1."""
    layer = cls(1, elementwise_affine=False).to(torch.bfloat16)
    x = torch.full((500_000, 1), 2.0**-9, dtype=torch.bfloat16)
    layer(x).sum().backward()
    slope = 1.0 if cls is DynamicTanh else 2 / math.sqrt(math.pi)
    assert layer.alpha.grad.item() == pytest.approx(500_000 * 2.0**-9 * slope, rel=5e-3)


@both
def test_errors(cls):
    name = cls.__name__
    with pytest.raises(ValueError, match=rf"{name}: the input must have shape \(\.\.\., 4\), got \(2, 3\)"):
        cls(4)(torch.randn(2, 3))
    with pytest.raises(ValueError, match=rf"{name}: the input must have shape \(N, 4, \*S\), got \(2, 3, 4\)"):
        cls(4, channels_last=False)(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"with channels_last=False normalized_shape must be one number of channels"):
        cls((4, 4), channels_last=False)
    with pytest.raises(TypeError, match=r"must be floating point, got torch.int64"):
        cls(4)(torch.ones(2, 4, dtype=torch.int64))
