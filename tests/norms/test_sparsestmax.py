"""Sparsemax and SparsestMax: the definition by brute force, the numbers, ties and derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch

import equinorm
from tests.helpers import assert_close


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def points_of_simplex(k, n):
    """All points whose entries are multiples of 1 / n."""
    walls = torch.tensor(list(itertools.combinations(range(n + k - 1), k - 1)))
    edges = torch.cat((torch.full((len(walls), 1), -1), walls, torch.full((len(walls), 1), n + k - 1)), 1)
    return (edges.diff(dim=1) - 1).double() / n


@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        (0.0, (0.5, 0.3, 0.2)),
        (0.3, (0.56479, 0.28704, 0.14817)),
        (0.5, (0.71909, 0.25618, 0.02473)),
        (0.6, (0.81091, 0.18909, 0.0)),
        (0.7, (0.90208, 0.09792, 0.0)),
        (0.8, (0.98648, 0.01352, 0.0)),
        (0.8165, (1.0, 0.0, 0.0)),
        (1.0, (1.0, 0.0, 0.0)),
    ],
)
def test_numbers(radius, expected):
    p = equinorm.sparsestmax(vector(0.5, 0.3, 0.2), radius)
    torch.testing.assert_close(p, vector(*expected), rtol=0, atol=6e-6)


def test_numbers_of_the_authors_centre():
    z = vector(0.6, 0.4, 0.0)
    torch.testing.assert_close(equinorm.sparsestmax(z, 0.5), vector(0.7041, 0.2959, 0.0), rtol=0, atol=5e-5)
    torch.testing.assert_close(equinorm.sparsestmax(z, 0.5, center="support"), vector(0.8536, 0.1464, 0.0), rtol=0, atol=5e-5)
    assert torch.equal(equinorm.sparsestmax(z, 0.7072, center="support"), vector(1.0, 0.0, 0.0))
    # its jump: a third entry just above 0 brings back the centre of the simplex
    torch.testing.assert_close(
        equinorm.sparsestmax(z + vector(0, 0, 1e-6), 0.5, center="support"), vector(0.7041, 0.2959, 0.0), rtol=0, atol=5e-5
    )


@pytest.mark.parametrize(("k", "n"), [(3, 300), (4, 60), (5, 24)])
def test_no_point_of_a_fine_grid_is_nearer(k, n):
    grid = points_of_simplex(k, n)
    distances = (grid - 1 / k).norm(dim=1)
    for _ in range(40):
        z = torch.randn(k, dtype=torch.float64) * torch.rand(1)
        radius = torch.rand(1).item() * ((k - 1) / k) ** 0.5
        p = equinorm.sparsestmax(z, radius)
        assert p.min() >= 0
        assert abs(p.sum() - 1) < 1e-12
        assert (p - 1 / k).norm() >= radius - 1e-12
        best = (grid[distances >= radius] - z).square().sum(1).min()
        assert (p - z).square().sum() <= best


def test_sparsemax_is_radius_zero():
    z = torch.randn(50, 4, dtype=torch.float64)
    p = equinorm.sparsemax(z)
    assert torch.equal(equinorm.sparsestmax(z, 0.0), p)
    for row, z_row in zip(p, z, strict=True):  # the projection leaves a residue constant on the support and smaller outside
        residue, support = z_row - row, row > 0
        assert_close(residue[support], residue[support][:1].expand(int(support.sum())))
        assert (residue[~support] <= residue[support].min() + 1e-12).all()


@pytest.mark.parametrize("radius", [0.0, 0.2, 0.45, 0.6, 0.8, 0.9])
def test_equivariant_to_permutations_and_blind_to_constants(radius):
    z = torch.randn(20, 3, dtype=torch.float64) * 0.5
    want = equinorm.sparsestmax(z, radius)
    assert_close(equinorm.sparsestmax(z + 1000.0, radius), want, dtype=torch.float32)
    for order in itertools.permutations(range(3)):
        assert_close(equinorm.sparsestmax(z[:, order], radius), want[:, order])
    assert_close(equinorm.sparsestmax(z.T, radius, dim=0), want.T)
    assert_close(equinorm.sparsestmax(z, torch.tensor(radius, dtype=torch.float64)), want)


def test_ties_stay_until_the_sphere_leaves_their_face():
    equal = torch.ones(3)
    for radius in (0.0, 0.01, 0.5, 0.8):
        assert_close(equinorm.sparsestmax(equal, radius), torch.full((3,), 1 / 3).double())
    assert torch.equal(equinorm.sparsestmax(equal, 0.82), torch.tensor([1.0, 0, 0]))
    pair = torch.tensor([0.0, 5.0, 5.0])
    assert torch.equal(equinorm.sparsestmax(pair, 0.6), torch.tensor([0.0, 0.5, 0.5]))
    assert torch.equal(equinorm.sparsestmax(pair, 0.82), torch.tensor([0.0, 1.0, 0.0]))
    noisy = 1 + torch.tensor([1e-9, 0.0, -1e-9]).double()
    assert_close(equinorm.sparsestmax(noisy, 0.5), torch.full((3,), 1 / 3).double(), dtype=torch.float32)


@pytest.mark.parametrize("center", ["simplex", "support"])
@pytest.mark.parametrize(
    ("z", "radius"), [((0.5, 0.3, 0.2), 0.1), ((0.5, 0.3, 0.2), 0.5), ((0.9, 0.2, -3.0), 0.2), ((0.4, 0.35, 0.25, 0.2), 0.55)]
)
def test_derivatives(z, radius, center):
    z = vector(*z).requires_grad_()
    torch.autograd.gradcheck(lambda z: equinorm.sparsestmax(z, radius, center=center), z)
    torch.autograd.gradgradcheck(lambda z: equinorm.sparsestmax(z, radius, center=center), z)


@pytest.mark.parametrize(("z", "radius"), [((0.5, 0.3, 0.2), 0.7), ((1.0, 1.0, 1.0), 0.5), ((0.5, 0.3, 0.2), 0.9), ((5.0, 0.0, 0.0), 0.5)])
def test_where_only_the_radius_decides_the_derivative_is_zero(z, radius):
    z = vector(*z).requires_grad_()
    (gradient,) = torch.autograd.grad((equinorm.sparsestmax(z, radius) * vector(1.0, 2.0, 4.0)).sum(), z)
    assert gradient.abs().max() < 1e-12


def test_half_types_are_rounded_once():
    z = torch.randn(20, 3).bfloat16()
    for function in (equinorm.sparsemax, lambda z: equinorm.sparsestmax(z, 0.5)):
        assert function(z).dtype == torch.bfloat16
        assert_close(function(z), function(z.double()))


def test_bad_arguments_are_refused():
    for function in (equinorm.sparsemax, lambda z: equinorm.sparsestmax(z, 0.5)):
        with pytest.raises(TypeError, match=r"spars\w+max: the input must be floating point, got torch.int64"):
            function(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"sparsestmax: center must be .* got 'face'"):
        equinorm.sparsestmax(torch.ones(3), 0.5, center="face")
