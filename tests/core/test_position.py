"""Statistics over channels at each position, by blocks of samples: equal to the definition; and powers by square roots."""

from __future__ import annotations

import pytest
import torch

import equinorm
from equinorm.core import position
from equinorm.core.roots import power
from equinorm.kernels import cpu
from tests.helpers import assert_close, assert_grads_close

NORMS = {
    "pixel": lambda: equinorm.PixelNorm(),
    "positional": lambda: equinorm.PositionalNorm(return_moments=False),
    "power": lambda: equinorm.PowerNorm(6, num_groups=2, channel_dim=1),
}
SHAPES = {
    "contiguous": lambda: torch.randn(7, 6, 3, 4),
    "channels_last": lambda: torch.randn(7, 6, 3, 4).to(memory_format=torch.channels_last),
    "features": lambda: torch.randn(40, 6),
    "permuted": lambda: torch.randn(4, 6, 3, 7).permute(3, 1, 2, 0),
}


@pytest.mark.skipif(not cpu.available(), reason="needs the kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_blocks_equal_the_definition(name, shape, mean, dtype, monkeypatch):
    monkeypatch.setattr(position, "BLOCK", 150)
    x = (SHAPES[shape]() + mean).to(dtype)
    own, exact = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()
    norm = NORMS[name]()
    y = norm(own)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, own, dy)
    with equinorm.plain():
        want = NORMS[name]().double()(exact)
    (dx_want,) = torch.autograd.grad(want, exact, dy.double())
    assert y.stride() == (x if shape != "permuted" else x.contiguous()).stride() or name != "power"
    assert_close(y, want)
    if mean == 0 or name == "positional":  # elsewhere the gradient is what rounding leaves of a difference
        assert_grads_close({"x": dx}, {"x": dx_want})


@pytest.mark.parametrize("exponent", [-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0, -0.6])
def test_powers_by_roots(exponent):
    t = torch.rand(50, dtype=torch.float64) + 0.1
    assert_close(power(t, exponent), t**exponent)
    assert_close(power(t.float(), exponent), t**exponent)
    assert torch.autograd.gradgradcheck(lambda t: power(t, exponent), t[:5].requires_grad_())
