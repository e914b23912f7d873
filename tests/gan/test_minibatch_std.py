from __future__ import annotations

import pytest
import torch

from equinorm import MinibatchStdDev
from tests.helpers import assert_close, assert_grads_close
from tests.references import gan as reference


@pytest.mark.parametrize(("n", "asked", "used"), [(8, 4, 4), (6, 4, 3), (5, 4, 1), (3, 4, 3), (8, None, 8), (1, 4, 1)])
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 2, 3)])
@pytest.mark.parametrize("features", [1, 2])
def test_equals_the_reference(n, asked, used, shape, features):
    x = torch.randn(n, *shape, dtype=torch.float64, requires_grad=True)
    layer = MinibatchStdDev(asked, features)
    expected = reference.minibatch_std(x, used, features, 1e-8)
    assert_close(layer(x), expected)
    upstream = torch.randn_like(expected)
    (got,) = torch.autograd.grad(layer(x), x, upstream)
    (want,) = torch.autograd.grad(expected, x, upstream)
    assert_grads_close({"x": got}, {"x": want})


def test_the_numbers_of_the_specification():
    x = torch.arange(8.0).square().view(8, 1, 1, 1)
    y = MinibatchStdDev()(x)[:, 1, 0, 0]
    torch.testing.assert_close(y, torch.tensor([14.0, 18.3303] * 4), atol=1e-4, rtol=0)


def test_derivatives_of_both_orders():
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    layer = MinibatchStdDev(2, eps=0.1)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_equal_samples_single_samples_and_empty_batches():
    same = torch.ones(4, 2, 3, 3, requires_grad=True)
    y = MinibatchStdDev()(same)
    assert_close(y[:, 2], torch.full((4, 3, 3), 1e-4))
    y.sum().backward()
    assert same.grad.isfinite().all()
    assert_close(MinibatchStdDev()(torch.randn(1, 2, 3, 3))[:, 2], torch.full((1, 3, 3), 1e-4))
    assert MinibatchStdDev()(torch.randn(0, 2, 3, 3)).shape == (0, 3, 3, 3)


def test_half_and_large_offsets():
    x = (300 + torch.randn(4, 8, 4, 4)).half()
    y = MinibatchStdDev()(x)
    assert y.dtype == torch.float16
    assert_close(y[:, 8], reference.minibatch_std(x.double(), 4, 1, 1e-8)[:, 8])
    far = torch.randn(4, 8, 4, 4) + 1e4
    assert_close(MinibatchStdDev()(far), reference.minibatch_std(far.double(), 4, 1, 1e-8))


def test_errors():
    with pytest.raises(ValueError, match=r"C divisible by num_channels=3, got \(4, 4, 2\)"):
        MinibatchStdDev(num_channels=3)(torch.randn(4, 4, 2))
    with pytest.raises(ValueError, match=r"group_size must be an integer of at least 1, got 0"):
        MinibatchStdDev(0)
    with pytest.raises(ValueError, match=r"eps must be positive, got 0"):
        MinibatchStdDev(eps=0)
    with pytest.raises(TypeError, match=r"must be floating point"):
        MinibatchStdDev()(torch.ones(4, 4, dtype=torch.int64))
    assert repr(MinibatchStdDev()) == "MinibatchStdDev(group_size=4, num_channels=1, eps=1e-08)"
