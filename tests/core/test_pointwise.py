"""The elementwise last beat by blocks: equal to the definition on the whole tensor, wherever blocks are cut."""

from __future__ import annotations

import pytest
import torch

import equinorm
from equinorm.core import pointwise
from equinorm.kernels import cpu
from tests.helpers import assert_close, assert_grads_close

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the kernels")

NORMS = {
    "tlu": lambda: equinorm.TLU(6),
    "frn_tlu": lambda: equinorm.FilterResponseNormTLU(6, learnable_eps=True),
    **{f"evonorm_{v}": lambda v=v: equinorm.EvoNormB(6, variant=v) for v in ("B0", "B1", "B2")},
    **{f"evonorm_{v}": lambda v=v: equinorm.EvoNormS(6, groups=3, variant=v) for v in ("S0", "S1", "S2")},
    "dynamic_tanh": lambda: equinorm.DynamicTanh(6, channels_last=False),
    "dynamic_erf": lambda: equinorm.DynamicErf(6, channels_last=False),
}
SHAPES = {
    "contiguous": lambda: torch.randn(5, 6, 4, 7),
    "channels_last": lambda: torch.randn(5, 6, 4, 7).to(memory_format=torch.channels_last),
    "features": lambda: torch.randn(40, 6),
    "one position": lambda: torch.randn(40, 6, 1),
    "permuted": lambda: torch.randn(4, 6, 7, 5).permute(3, 1, 2, 0),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pointwise, "BLOCK", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_blocks_equal_the_whole(name, shape, dtype, small_blocks):
    norm, x = NORMS[name](), SHAPES[shape]().to(dtype)
    if x.ndim == 2 and name in ("evonorm_S0", "evonorm_S1"):
        norm.groups = 2
    if name.startswith("dynamic"):
        x = x.abs()  # the gradient of the slope is a sum over x
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    own, exact = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()
    y = norm(own)
    dy = torch.rand_like(y)  # like x above, of one sign: a sum that cancels has no digits to compare
    grads = torch.autograd.grad(y, [own, *norm.parameters()], dy)
    norm.double()
    with equinorm.plain():
        want = norm(exact)
    wants = torch.autograd.grad(want, [exact, *norm.parameters()], dy.double())
    assert y.is_contiguous() == (shape != "channels_last")
    assert_close(y, want)
    names = ["x", *dict(norm.named_parameters())]
    assert_grads_close(dict(zip(names, grads, strict=True)), dict(zip(names, wants, strict=True)))


def test_the_maximum_splits_ties_in_halves():
    norm, x = equinorm.TLU(2), torch.zeros(3, 2, 4).requires_grad_()
    norm(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.5))
    assert norm.tau.grad.tolist() == [6.0, 6.0]


def test_parameters_alone(small_blocks):
    norm, x = equinorm.EvoNormB(6), torch.randn(5, 6, 4, 7)
    grads = torch.autograd.grad(norm(x).square().sum(), list(norm.parameters()))
    norm.double()
    with equinorm.plain():
        wants = torch.autograd.grad(norm(x.double()).square().sum(), list(norm.parameters()))
    names = dict(norm.named_parameters())
    assert_grads_close(dict(zip(names, grads, strict=True)), dict(zip(names, wants, strict=True)))
