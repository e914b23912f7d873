from __future__ import annotations

import pytest
import torch
from torch import nn

from equinorm import bjorck_orthonormal
from tests.helpers import assert_close, assert_grads_close
from tests.references import weight as reference


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
@pytest.mark.parametrize("scaling", ["norm", "size", "none"])
def test_equals_the_reference(shape, scaling):
    module = bjorck_orthonormal(nn.Linear(*shape).double(), n_iter=4, scaling=scaling)
    w = module.parametrizations.weight.original
    bound = {
        "norm": (w.abs().sum(0).max() * w.abs().sum(1).max()).sqrt(),
        "size": torch.tensor(shape[0] * shape[1]).double().sqrt(),
        "none": 1.0,
    }[scaling]
    expected = reference.bjorck(w / bound, 4)
    assert_close(module.weight, expected)
    upstream = torch.randn_like(expected)
    (got,) = torch.autograd.grad(module.weight, w, upstream)
    (want,) = torch.autograd.grad(expected, w, upstream)
    assert_grads_close({"w": got}, {"w": want})


@pytest.mark.parametrize(("order", "n_iter"), [(1, 60), (2, 30), (3, 20), (4, 16)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Linear(4, 6), lambda: nn.ConvTranspose2d(6, 3, 2)])
def test_converges_to_the_nearest_orthonormal_matrix(make, order, n_iter):
    layer = bjorck_orthonormal(make().double(), n_iter=n_iter, order=order)
    rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    raw, got = (w.movedim(rows, 0).flatten(1) for w in (layer.parametrizations.weight.original, layer.weight))
    u, _, vh = torch.linalg.svd(raw, full_matrices=False)
    torch.testing.assert_close(got, u @ vh, atol=1e-9, rtol=0)


def test_default_is_orthonormal_to_1e_5_and_idempotent():
    layer = bjorck_orthonormal(nn.Linear(16, 16))
    nn.init.orthogonal_(layer.parametrizations.weight.original)
    before = layer.parametrizations.weight.original.detach()
    assert (layer.weight @ layer.weight.T - torch.eye(16)).abs().max() < 1e-5
    assert (layer.weight - before).abs().max() < 1e-5


def test_order_two_uses_the_coefficients_of_the_specification():
    layer = bjorck_orthonormal(nn.Linear(3, 3).double(), n_iter=1, order=2, scaling="none")
    w = layer.parametrizations.weight.original
    gram = w.T @ w
    assert_close(layer.weight, w @ (15 / 8 * torch.eye(3).double() - 5 / 4 * gram + 3 / 8 * gram @ gram))


@pytest.mark.parametrize(("start", "limit"), [(1.7, 1.0), (1.74, -1.0), (2.2, 1.0), (2.23, -1.0), (7.5e-4, 0.9977)])
def test_convergence_region_of_the_specification(start, limit):
    layer = bjorck_orthonormal(nn.Linear(1, 1).double(), scaling="none")
    layer.weight = torch.tensor([[start]]).double()
    assert layer.weight.item() == pytest.approx(limit, abs=1e-3)


def test_large_weights_diverge_without_the_bound_and_not_with_it():
    big = torch.tensor([[2.3, 0.0], [0.0, 2.3]]).double()
    free, bounded = (bjorck_orthonormal(nn.Linear(2, 2).double(), scaling=s) for s in ("none", "norm"))
    free.weight, bounded.weight = big, 1000 * big
    assert not free.weight.isfinite().all()
    assert_close(bounded.weight, torch.eye(2).double())


def test_a_smaller_step_converges_too():
    layer = bjorck_orthonormal(nn.Linear(4, 4).double(), beta=0.25, n_iter=300)
    torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(4).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_iter": 0}, "n_iter must be an integer of at least 1, got 0"),
        ({"order": 5}, "order must be 1, 2, 3 or 4, got 5"),
        ({"beta": 0.7}, r"beta must lie in \(0, 0.5\], got 0.7; larger steps need not converge"),
        ({"beta": 0.3, "order": 2}, "orders above have fixed coefficients, got beta=0.3 with 2"),
        ({"scaling": "safe"}, "scaling must be one of norm, size, none, got 'safe'"),
        ({"name": "bias"}, r"at least 2 dimensions, got shape \(4,\); use weight_norm"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        bjorck_orthonormal(nn.Linear(4, 4), **options)
