"""Local response norm: torch as a drop-in, the authors' numbers, windows of any size in any rank."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close
from tests.references.local import local_response


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 5, 3), (2, 6, 3, 2, 4)], ids=str)
def test_drops_in_for_torch(size, shape):
    theirs = torch.nn.LocalResponseNorm(size, alpha=0.5, beta=0.6, k=1.5)
    ours = equinorm.LocalResponseNorm(size, alpha=0.5, beta=0.6, k=1.5)
    assert isinstance(ours, torch.nn.LocalResponseNorm)
    assert ours.state_dict() == theirs.state_dict() == {}
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    assert_close(ours(x), theirs(x))
    assert_close(*(torch.autograd.grad(norm(x), x, dy)[0] for norm in (ours, theirs)), label="gradient")


@pytest.mark.parametrize("options", [{"alpha": 1e-4}, {"k": 1.0}, {"beta": 0.75}], ids=str)
def test_defaults_are_those_of_torch(options):
    x = torch.randn(2, 8, 4, 4) * 100
    assert_close(equinorm.LocalResponseNorm(5)(x), torch.nn.LocalResponseNorm(5, **options)(x.double()))


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 2, 4)], ids=str)
def test_within_channels_equals_its_reference(size, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    options = {"alpha": 2.0, "beta": 0.7, "k": 1.2, "mode": "within"}
    y, (want, _) = equinorm.LocalResponseNorm(size, **options)(x), local_response(x, {}, size=size, **options)
    assert_close(y, want)
    dy = torch.randn_like(x)
    assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, want)), label="gradient")


def test_the_numbers_of_the_specification():
    x = torch.arange(1.0, 6.0, dtype=torch.float64).reshape(1, 5, 1)
    expected = {3: [0.612372, 0.840168, 0.918559, 0.951662, 1.305582], 4: [0.666667, 0.942809, 1.028991, 1.050451, 1.360828]}
    for size, values in expected.items():
        y = equinorm.LocalResponseNorm(size, alpha=1.0, beta=0.5)(x).flatten()
        assert y.tolist() == pytest.approx(values, abs=1e-6)
    y = equinorm.LocalResponseNorm(3, alpha=1.0, mode="within")(torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 1, 3, 3)).flatten()
    assert [y[0].item(), y[4].item(), y[8].item()] == pytest.approx([0.25728, 0.36592, 0.83291], abs=5e-6)


def test_the_closed_form_of_the_gradient():
    """dx_i = g_i s_i^-beta - (2 alpha beta / n) x_i sum over the windows that hold i of g_j y_j / s_j."""
    n, alpha, beta = 4, 0.7, 0.6
    x = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    windows = [range(max(0, i - n // 2), min(9, i + (n - 1) // 2 + 1)) for i in range(9)]
    s = torch.stack([1 + alpha / n * (x[0, list(w)] ** 2).sum() for w in windows])
    y = x[0] / s**beta
    dx = torch.stack(
        [
            g[0, i] * s[i] ** -beta - 2 * alpha * beta / n * x[0, i] * sum(g[0, j] * y[j] / s[j] for j in range(9) if i in windows[j])
            for i in range(9)
        ]
    )
    (own,) = torch.autograd.grad(equinorm.LocalResponseNorm(n, alpha=alpha, beta=beta)(x), x, g)
    assert_close(own[0], dx)


def test_without_alpha_it_is_the_identity():
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(equinorm.LocalResponseNorm(5, alpha=0.0)(x), x)
    assert torch.equal(equinorm.LocalResponseNorm(5, alpha=0.0, mode="within")(x), x)


def test_a_window_of_zeros_without_k_gives_zeros():
    norm = equinorm.LocalResponseNorm(3, alpha=1.0, k=0.0)
    x = torch.zeros(2, 6, dtype=torch.float64)
    x[:, 5] = 2.0
    x.requires_grad_()
    y = norm(x)
    assert not y[:, :4].any()
    assert y.isfinite().all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 5, 3), (1, 6, 3, 2, 4)], ids=str)
def test_half_types_of_any_rank(dtype, shape):
    x = (torch.randn(shape) * 50 + 300).to(dtype)  # squares beyond float16
    y = equinorm.LocalResponseNorm(3, alpha=1.0)(x)
    assert y.dtype == dtype
    assert_close(y, equinorm.LocalResponseNorm(3, alpha=1.0)(x.double()))


def test_within_channels_needs_positions():
    with pytest.raises(ValueError, match=r"must have shape \(N, C, \*spatial\) with at least one spatial dimension within channels, got"):
        equinorm.LocalResponseNorm(3, mode="within")(torch.randn(2, 5))


def test_what_is_masked_is_like_what_lies_beyond_the_border():
    norm = equinorm.LocalResponseNorm(3, alpha=1.0, mode="within")
    x = torch.randn(1, 2, 6)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    assert torch.equal(norm(torch.where(mask, x, torch.nan), mask=mask)[..., :4], norm(x[..., :4]))


def test_blocks_of_samples_equal_the_whole(monkeypatch):
    monkeypatch.setattr("equinorm.norms.local_response.BLOCK", 100)
    norm, x = equinorm.LocalResponseNorm(4, alpha=0.7), torch.randn(7, 8, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    with equinorm.plain():
        want = norm(x)
    y = norm(x)
    assert_close(y, want)
    assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, want)), label="gradient")
