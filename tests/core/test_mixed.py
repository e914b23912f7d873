"""The geometry of a mixture, by thin matrix products and blocks of samples: equal to its definition, one component at a time."""

from __future__ import annotations

import pytest
import torch

import equinorm
from equinorm.core import mixed
from equinorm.kernels import cpu
from tests.helpers import assert_close, assert_grads_close

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the kernels")

SHAPES = {
    "contiguous": lambda: torch.randn(5, 4, 3, 7),
    "channels_last": lambda: torch.randn(5, 4, 3, 7).to(memory_format=torch.channels_last),
    "features": lambda: torch.randn(60, 4),
    "one position": lambda: torch.randn(60, 4, 1, 1),
}


def responsibilities(x, components, hard):
    logits = torch.randn(x.shape[0], components, *x.shape[2:])
    p = (logits * (50 if hard else 1)).softmax(1)
    return torch.where(torch.rand(x.shape[0], 1, *x.shape[2:]) < 0.1, 0.0, p)  # some positions are masked


def rule(m, weight, bias):
    scale = (m.var + 1e-5).rsqrt()
    return (m.mean, scale * weight, bias[None].to(scale.dtype)), m


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("components", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_equal_the_definition(shape, components, hard, monkeypatch):
    monkeypatch.setattr(mixed, "BLOCK", 200)
    x = SHAPES[shape]()
    p = responsibilities(x, components, hard)
    x = torch.where(p.sum(1, keepdim=True) > 0, x + 10 * p.argmax(1, keepdim=True), 0.0)  # modes far apart
    weight, bias = (torch.rand(4) + 0.5).requires_grad_(), torch.randn(4).requires_grad_()
    dy = torch.randn_like(x)

    def run(x, p, weight, bias):
        x = x.detach().requires_grad_()
        y, seen = mixed.mixed_norm(x, p, rule, weight, bias, measured=True)
        return y, seen, torch.autograd.grad(y, (x, weight, bias), dy.to(y.dtype))

    y, seen, grads = run(x, p, weight, bias)
    with equinorm.plain():
        want, known, wants = run(x.double(), p.double(), weight.double(), bias.double())
    assert y.stride() == x.stride()
    assert_close(y, want)
    for own, exact in zip(seen, known, strict=True):
        assert_close(own.float(), exact)
    names = ("x", "weight", "bias")
    assert_grads_close(dict(zip(names, grads, strict=True)), dict(zip(names, wants, strict=True)))


def test_means_far_from_zero_keep_their_digits():
    x = torch.randn(6, 4, 30)
    p = responsibilities(x, 3, hard=False)
    x = torch.where(p.sum(1, keepdim=True) > 0, x + 1e4, 0.0)
    weight, bias = torch.ones(4), torch.zeros(4)
    y, seen = mixed.mixed_norm(x, p, rule, weight, bias, measured=True)
    with equinorm.plain():
        want, known = mixed.mixed_norm(x.double(), p.double(), rule, weight, bias, measured=True)
    assert_close(seen.var.float(), known.var)
    assert_close(y, want)
