from __future__ import annotations

import math

import pytest
import torch

from equinorm import MPFourier, mp_cat, mp_silu, mp_sum
from tests.helpers import assert_close


def magnitude(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_silu_has_unit_magnitude():
    torch.manual_seed(0)
    assert magnitude(mp_silu(torch.randn(2_000_000).double())) == pytest.approx(0.596469 / 0.596, abs=2e-3)
    x = torch.randn(5).double()
    assert_close(mp_silu(x), x / (1 + torch.exp(-x)) / 0.596)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sum(t):
    torch.manual_seed(0)
    a, b = torch.randn(2, 500_000).double()
    assert magnitude(mp_sum(a, b, t)) == pytest.approx(1, abs=5e-3)
    assert_close(mp_sum(a, b, t), ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2))
    if t == 0:
        assert torch.equal(mp_sum(a, b, t), a)


@pytest.mark.parametrize(("t", "energies"), [(0.5, (128, 128)), (0.3, (216.3, 39.7))])
def test_concatenation_of_the_specification(t, energies):
    a, b = torch.ones(2, 64, 3, 3), torch.ones(2, 192, 3, 3)
    y = mp_cat(a, b, t=t)
    assert y.shape == (2, 256, 3, 3)
    assert y[0, :64, 0, 0].square().sum().item() == pytest.approx(energies[0], abs=0.05)
    assert y[0, 64:, 0, 0].square().sum().item() == pytest.approx(energies[1], abs=0.05)
    assert magnitude(y) == pytest.approx(1, abs=1e-6)
    assert_close(mp_cat(a[0].movedim(0, -1), b[0].movedim(0, -1), dim=-1, t=t), y[0].movedim(0, -1))


def test_why_a_plain_concatenation_or_sum_would_not_do():
    a, b = torch.randn(1000, 64), torch.randn(1000, 192)
    assert torch.cat((a, b), 1)[:, 64:].square().sum() / a.square().sum() == pytest.approx(3, rel=0.05)
    y = mp_cat(a, b)
    assert y[:, 64:].square().sum() / y[:, :64].square().sum() == pytest.approx(1, rel=0.05)
    assert magnitude(a + a.roll(1, 0)) == pytest.approx(1.41, abs=0.03)


def test_fourier_features_have_unit_magnitude_and_hold_two_pi():
    torch.manual_seed(0)
    layer = MPFourier(4096, bandwidth=2.0)
    x = torch.randn(50)
    assert magnitude(layer(x)) == pytest.approx(1, abs=0.02)
    assert layer.freqs.std().item() == pytest.approx(4 * math.pi, rel=0.05)
    assert 0 <= layer.phases.min() < layer.phases.max() <= 2 * math.pi
    assert_close(
        layer(x), math.sqrt(2) * torch.cos(x[:, None].double() * layer.freqs.double() + layer.phases.double()).float(), dtype=torch.bfloat16
    )
    assert layer(x.half()).dtype == torch.float16
    other = MPFourier(4096)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert repr(layer) == "MPFourier(4096, bandwidth=2.0)"


def test_derivatives():
    a, b = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_()
    for f in (lambda a, b: mp_sum(a, b, 0.3), lambda a, b: mp_cat(a, b, t=0.3), lambda a, b: mp_silu(a) * b):
        assert torch.autograd.gradcheck(f, (a, b))
        assert torch.autograd.gradgradcheck(f, (a, b))


def test_errors():
    a = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"mp_sum: t must lie in \[0, 1\], got 1.5"):
        mp_sum(a, a, 1.5)
    with pytest.raises(ValueError, match=r"mp_cat: t must lie in \[0, 1\], got -1"):
        mp_cat(a, a, t=-1)
    with pytest.raises(ValueError, match=r"both parts must have at least one entry along dimension 1, got 3 and 0"):
        mp_cat(a, a[:, :0])
    with pytest.raises(ValueError, match=r"num_features must be at least 1 and bandwidth positive, got 0 and 1.0"):
        MPFourier(0)
