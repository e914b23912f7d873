"""Generalized divisive norm: the authors' numbers, the parametrisation and its gradient, and what it has in common with others."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close, assert_grads_close
from tests.references.local import generalized_divisive


def with_values(beta, gamma, **options):
    """A norm whose beta and gamma are given as they enter the formula."""
    norm = equinorm.GeneralizedDivisiveNorm(len(beta), dtype=torch.float64, **options)
    with torch.no_grad():
        norm.beta.copy_((torch.tensor(beta, dtype=torch.float64) + 2.0**-36).sqrt())
        norm.gamma.copy_((torch.tensor(gamma, dtype=torch.float64) + 2.0**-36).sqrt())
    return norm


X = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
GAMMA = [[0.1, 0.2], [0.05, 0.1]]


@pytest.mark.parametrize(
    ("gamma", "options", "expected"),
    [
        (GAMMA, {}, [1.328422, -2.290393]),
        (torch.tensor(GAMMA).T.tolist(), {}, [1.825742, -1.906925]),
        (GAMMA, {"alpha": 1.0, "epsilon": 1.0}, [1.428571, -2.580645]),
    ],
    ids=["output, input", "transposed", "GDN1"],
)
def test_the_numbers_of_the_specification(gamma, options, expected):
    assert with_values([1.0, 1.0], gamma, **options)(X)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_inverse_form_is_one_step_of_a_fixed_point_iteration():
    y = with_values([1.0, 1.0], GAMMA)(X)
    assert with_values([1.0, 1.0], GAMMA, inverse=True)(y)[0].tolist() == pytest.approx([1.98, -2.91], abs=0.006)
    beta, gamma = with_values([1.0, 1.0], GAMMA).constrained()
    z = y
    for _ in range(60):
        z = y * (beta + z.square() @ gamma.T).sqrt()
    assert_close(z.detach(), X, dtype=torch.float32)


def test_the_parametrisation_starts_and_ends_where_it_should():
    norm = equinorm.GeneralizedDivisiveNorm(3)
    beta, gamma = norm.constrained()
    assert_close(beta.detach(), torch.ones(3).double())
    assert_close(gamma.detach(), 0.1 * torch.eye(3).double())
    assert torch.equal(gamma[0, 1], torch.zeros(()))
    with torch.no_grad():
        norm.beta.fill_(-1.0)
        norm.gamma.fill_(-1.0)
    beta, gamma = norm.double().constrained()
    assert beta.min().item() == pytest.approx(1e-6, rel=1e-6)
    assert gamma.abs().max() < 1e-17
    assert pytest.approx(0.00100000727, abs=1e-11) == (1e-6 + 2.0**-36) ** 0.5  # the stored bounds that checkpoints of others show
    assert pytest.approx(3.8147e-6, abs=1e-10) == (2.0**-36) ** 0.5


def test_a_parameter_comes_back_from_its_bound():
    norm = equinorm.GeneralizedDivisiveNorm(4, dtype=torch.float64)
    with torch.no_grad():
        norm.beta.fill_(-0.5)
        norm.gamma.copy_(torch.randn(4, 4))
    p = {name: value.detach().clone().requires_grad_() for name, value in norm.named_parameters()}
    x = torch.randn(8, 4, 3, dtype=torch.float64)
    dy = torch.randn_like(x)
    want, _ = generalized_divisive(x, p)
    y = norm(x)
    assert_close(y, want)
    actual = dict(zip(p, torch.autograd.grad(y, list(norm.parameters()), dy, create_graph=True), strict=True))
    expected = dict(zip(p, torch.autograd.grad(want, list(p.values()), dy, create_graph=True), strict=True))
    assert_grads_close(actual, expected)
    below = norm.gamma < 0
    assert (actual["gamma"][below] <= 0).all()
    assert (actual["gamma"][below] < 0).any()
    assert (actual["gamma"][below] == 0).any()
    second = [
        torch.autograd.grad(sum(g.square().sum() for g in grads.values()), list(tensors), allow_unused=True)
        for grads, tensors in ((actual, norm.parameters()), (expected, p.values()))
    ]
    assert_grads_close(*(dict(zip(p, grads, strict=True)) for grads in second), label="second derivative by")

    start = norm.gamma.detach().clone()
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    norm(x).square().sum().backward()  # wants more division
    optimizer.step()
    assert (norm.gamma > start).all()


def test_without_gamma_it_is_the_identity():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert_close(with_values([1.0] * 3, [[0.0] * 3] * 3)(x), x)


def test_it_is_odd_and_bounded_by_its_own_gain():
    norm = equinorm.GeneralizedDivisiveNorm(5, dtype=torch.float64)
    with torch.no_grad():
        norm.gamma.add_(torch.rand(5, 5))
    x = torch.randn(4, 5, 6, dtype=torch.float64) * 100
    y = norm(x)
    assert torch.equal(norm(-x), -y)
    bound = norm.constrained()[1].diagonal().rsqrt()
    assert (y.abs() < bound[:, None]).all()


def test_positions_do_not_mix():
    norm = equinorm.GeneralizedDivisiveNorm(5, dtype=torch.float64)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert_close(norm(x)[:, :, 1, 2], norm(x[:, :, 1, 2]))


@pytest.mark.parametrize("size", [3, 4])
def test_with_a_banded_gamma_it_is_local_response_norm(size):
    channels, alpha, k = 7, 0.8, 1.5
    band = [[alpha / size if -(size // 2) <= j - i <= (size - 1) // 2 else 0.0 for j in range(channels)] for i in range(channels)]
    x = torch.randn(2, channels, 5, dtype=torch.float64)
    assert_close(
        with_values([k] * channels, band, epsilon=0.75)(x),
        equinorm.LocalResponseNorm(size, alpha=alpha, k=k)(x),
        dtype=torch.float32,  # the stored root of 0 is 2^-18, and its square is 0 only within 1e-17
    )


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_zeros_have_a_gradient(alpha):
    norm = equinorm.GeneralizedDivisiveNorm(3, alpha=alpha, dtype=torch.float64)
    x = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert_close(torch.autograd.grad(norm(x).sum(), x)[0], torch.ones_like(x))


def test_checkpoints_with_constants_load():
    theirs = {
        "beta": torch.rand(3),
        "gamma": torch.rand(3, 3),
        "beta_reparam.pedestal": torch.zeros(1),
        "beta_reparam.lower_bound.bound": torch.zeros(1),
        "gamma_reparam.pedestal": torch.zeros(1),
    }
    norm = torch.nn.Sequential(equinorm.GeneralizedDivisiveNorm(3))
    norm.load_state_dict({f"0.{key}": value for key, value in theirs.items()})
    assert torch.equal(norm[0].gamma, theirs["gamma"])


@pytest.mark.parametrize(
    ("name", "value"), [("beta_min", 0.0), ("gamma_init", -0.1), ("alpha", 0.5), ("epsilon", 0.0), ("epsilon", float("inf"))]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"GeneralizedDivisiveNorm: {name} must be finite and .*, got {value}"):
        equinorm.GeneralizedDivisiveNorm(3, **{name: value})
