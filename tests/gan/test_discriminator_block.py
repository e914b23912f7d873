from __future__ import annotations

import copy

import pytest
import torch

from equinorm import DiscriminatorBlock
from tests.helpers import assert_close, assert_grads_close
from tests.references import gan as reference


def test_equals_the_reference():
    block = DiscriminatorBlock(3, 5).double()
    for p in block.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(block.named_parameters())
    expected = reference.discriminator_block(x, parameters, (1, 3, 3, 1))
    assert_close(block(x), expected)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(block(x), (x, *parameters.values()), upstream)
    want = torch.autograd.grad(expected, (x, *parameters.values()), upstream)
    names = ["x", *parameters]
    assert_grads_close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))


def inside(y: torch.Tensor) -> torch.Tensor:
    return y[:, :, 4:-4, 4:-4].double()


def test_why_one_over_sqrt_2():
    """At the start branch and skip are uncorrelated and of equal variance; their sum has std 1.41, the scaled sum 1."""
    torch.manual_seed(0)
    block = DiscriminatorBlock(128, 128)
    x = torch.randn(64, 128, 1, 1).expand(64, 128, 24, 24)  # smooth images: the filter keeps them
    y = inside(block(x))
    skip = inside(block._down(x, block.skip))
    branch = 2**0.5 * y - skip
    correlation = torch.corrcoef(torch.stack((skip[:, :, 0, 0].flatten(), branch[:, :, 0, 0].flatten())))[0, 1].item()
    assert abs(correlation) < 0.05
    assert skip.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)
    assert branch.square().mean().sqrt().item() == pytest.approx(1.04, abs=0.04)  # the leaky relu's 1.04, twice
    assert (skip + branch).square().mean().sqrt().item() == pytest.approx(1.44, abs=0.04)
    assert y.square().mean().sqrt().item() == pytest.approx(1.02, abs=0.03)


def test_without_it_the_signal_grows_block_by_block():
    torch.manual_seed(0)
    x = torch.randn(64, 64, 1, 1).expand(64, 64, 64, 64)
    scaled = plain = x
    for _ in range(3):
        block = DiscriminatorBlock(64, 64)
        with torch.no_grad():
            scaled, plain = block(scaled), 2**0.5 * block(plain)
    centre = (..., scaled.shape[2] // 2, scaled.shape[3] // 2)
    assert scaled[centre].square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    assert plain[centre].square().mean().sqrt().item() == pytest.approx(2**1.5, rel=0.15)


def test_derivatives_of_both_orders():
    block = DiscriminatorBlock(2, 3, resample_filter=(1, 1)).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradgradcheck(block, (x,))


def test_state_clamp_half_compile():
    block = DiscriminatorBlock(3, 4)
    assert set(block.state_dict()) == {"conv0.weight", "conv0.bias", "conv1.weight", "conv1.bias", "skip.weight"}
    x = torch.randn(2, 3, 8, 8)
    y = block(x)
    assert torch.equal(copy.deepcopy(block)(x), y)
    assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), y.detach())
    clamped = DiscriminatorBlock(3, 4, conv_clamp=0.1)
    clamped.load_state_dict(block.state_dict())
    torch.nn.init.zeros_(clamped.skip.weight)
    assert clamped(x).abs().max() <= 0.1 / 2**0.5 + 1e-6
    assert block.half()(x.half()).dtype == torch.float16
    assert "conv_clamp=0.1" in repr(clamped)
    with torch.device("meta"):
        assert DiscriminatorBlock(3, 4)(torch.empty(2, 3, 8, 8)).shape == y.shape


def test_errors():
    with pytest.raises(ValueError, match=r"shape \(N, 3, H, W\) with even H and W, got \(2, 3, 7, 8\)"):
        DiscriminatorBlock(3, 4)(torch.randn(2, 3, 7, 8))
    with pytest.raises(ValueError, match=r"got \(2, 4, 8, 8\)"):
        DiscriminatorBlock(3, 4)(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"conv_clamp must be positive or None, got 0"):
        DiscriminatorBlock(3, 4, conv_clamp=0)
