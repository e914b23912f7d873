"""Matrix roots: definition, derivatives to third order, equal eigenvalues, singular and broken matrices."""

from __future__ import annotations

import pytest
import torch

from equinorm.core.matrix import roots
from tests.helpers import assert_close

torch64 = {"dtype": torch.float64}


def symmetric(m):
    return (m + m.mT) / 2


def example(*shape, d=4, least=0.1):
    m = torch.randn(*shape, d, d, **torch64)
    return m @ m.mT / d + least * torch.eye(d, **torch64)


def by_eigenvectors(s):
    """What autograd makes of the textbook formula; right where eigenvalues are apart."""
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT, (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


def test_they_are_the_root_and_its_inverse():
    s = example(3, 2)
    root, inverse = roots(s)
    assert_close(root @ root, s)
    assert_close(inverse @ root, torch.eye(4, **torch64).expand_as(s))


@pytest.mark.parametrize("k", [0, 1], ids=["root", "inverse"])
def test_three_derivatives_equal_those_through_the_eigenvectors(k):
    s = example(2)
    weights = [torch.randn_like(s) for _ in range(3)]

    def chain(function):
        x = s.clone().requires_grad_()
        value, found = function(symmetric(x))[k], []
        for w in weights:
            (g,) = torch.autograd.grad((value * w).sin().sum(), x, create_graph=True)
            found.append(g)
            value = g
        return found

    for order, (got, want) in enumerate(zip(chain(roots), chain(by_eigenvectors), strict=True), 1):
        assert (got - want).abs().max() < 1e-10 * want.abs().max(), f"derivative {order}"


@pytest.mark.parametrize("diagonal", [[2.0, 2.0, 2.0], [1.0, 1.0, 4.0], [1e-5, 1e-5, 1.0]], ids=str)
def test_equal_eigenvalues_have_derivatives_of_every_order(diagonal):
    s = torch.diag(torch.tensor(diagonal, **torch64)).requires_grad_()

    def both(s):
        return roots(symmetric(s))

    torch.autograd.gradcheck(lambda s: roots(symmetric(s))[0], s, eps=1e-8 if diagonal[0] < 1 else 1e-6)
    if diagonal[0] == 1e-5:
        return  # finite differences of the inverse cannot follow here; its closed form does below
    torch.autograd.gradcheck(both, s)
    torch.autograd.gradgradcheck(both, s)


def test_the_derivative_is_the_closed_form():
    """dS = U (F * (U' sym(G) U)) U' with F_ij = -1 / (sqrt(l_i l_j) (sqrt(l_i) + sqrt(l_j)))."""
    values = torch.tensor([1e-5, 1e-5, 0.3, 0.3, 7.0], **torch64)
    u = torch.linalg.qr(torch.randn(5, 5, **torch64))[0]
    s = ((u * values) @ u.mT).requires_grad_()
    g = torch.randn(5, 5, **torch64)
    a = values.sqrt()
    f = -1 / (a[:, None] * a * (a[:, None] + a))
    want = u @ (f * (u.mT @ symmetric(g) @ u)) @ u.mT
    (got,) = torch.autograd.grad(roots(s)[1], s, g)
    assert (got - want).abs().max() < 1e-9 * want.abs().max()


def test_a_singular_matrix_has_the_pseudo_inverse():
    s = torch.zeros(2, 3, 3, **torch64)
    s[1, 0, 0] = 4
    s.requires_grad_()
    root, inverse = roots(s)
    assert not inverse[0].any()
    assert inverse[1, 0, 0].item() == 0.5
    grads = torch.autograd.grad(root.sum() + inverse.sum(), s)[0]
    assert grads.isfinite().all()


def test_noise_below_the_floor_is_lifted_to_it():
    s = torch.diag(torch.tensor([1e6, -1e-2, 1e-9], **torch64))
    root, inverse = roots(s, 1e-7)
    assert_close(inverse.diagonal(), torch.tensor([1e-3, 10**0.5, 10**0.5], **torch64))
    assert_close(root.diagonal(), torch.tensor([1e3, 0.1**0.5, 0.1**0.5], **torch64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_matrix_breaks_alone(bad):
    s = example(3)
    want = roots(s)
    s[1, 2, 3] = bad
    for got, whole in zip(roots(s), want, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], whole[[0, 2]])


def test_transforms_and_the_compiler_see_through_them():
    s = example(5)
    w = torch.randn(4, 4, **torch64)

    def value(s):
        return (roots(symmetric(s))[1] * w).sin().sum()

    together = torch.func.vmap(torch.func.grad(value))(s)
    assert_close(together, torch.stack([torch.func.grad(value)(one) for one in s]))
    second = torch.func.vmap(torch.func.grad(lambda s: torch.func.grad(value)(s).sin().sum()))(s)
    x = s.clone().requires_grad_()
    (g,) = torch.autograd.grad(sum(value(one) for one in x), x, create_graph=True)
    assert_close(second, torch.autograd.grad(g.sin().sum(), x)[0])
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    x = s[0].clone().requires_grad_()
    assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, value)))
