"""Moments of a tensor on their own: kernels, definition and a loop agree, to the third derivative."""

from __future__ import annotations

import pytest
import torch

from equinorm.core.measure import measure
from tests.helpers import assert_close
from tests.references.norms import moments


def loop(x, per, mask):
    if per == "sample":
        cells = [[moments(x[n, c][mask[n, 0]]) for c in range(x.shape[1])] for n in range(x.shape[0])]
    else:
        cells = [[moments(x[:, c][mask[:, 0]]) for c in range(x.shape[1])]]
    return (torch.stack([torch.stack([cell[k] for cell in row]) for row in cells]) for k in (0, 1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_a_loop_to_the_third_derivative(per, masked, memory_format):
    x = (torch.randn(3, 4, 5, 2, dtype=torch.float64) * 2 + 7).to(memory_format=memory_format).requires_grad_()
    mask = torch.rand(3, 1, 5, 2) < 0.7 if masked else torch.ones(3, 1, 5, 2, dtype=torch.bool)
    found = measure(x, per=per, mask=mask if masked else None)
    want = tuple(loop(x, per, mask))

    def chain(mean, var):
        value, results = (mean.sin() * var).sum(), [mean, var]
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            results.append(gradient)
            value = (gradient.sin() * x).sum()
        return results

    once = [torch.autograd.grad((m.sin() * v).sum(), x, retain_graph=True)[0] for m, v in (found[:2], want)]
    assert_close(*once, label="first derivative, not recorded")
    for k, (actual, expected) in enumerate(zip(chain(found.mean, found.var), chain(*want), strict=True)):
        assert_close(actual, expected, label=("mean", "variance", "first", "second", "third")[k])


def test_counts_values():
    x = torch.randn(3, 4, 5, 2)
    assert measure(x).count == 10
    assert measure(x, per="batch").count == 30
    assert measure(x, mask=torch.ones(3, 1, 5, 2, dtype=torch.bool)).count.tolist() == [[10], [10], [10]]


@pytest.mark.parametrize("impl", ["auto", "plain"])
def test_holds_far_from_zero_and_without_gradient(impl):
    x = torch.randn(2, 3, 64, 64) + 1e4
    found = measure(x, impl=impl)
    assert not found.mean.requires_grad
    assert_close(found.mean, x.double().mean((2, 3)), dtype=torch.float32)
    assert_close(found.var, x.double().var((2, 3), correction=0), dtype=torch.float32)
