"""Global response norm: the authors' numbers, both layouts, and what its specification promises."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close


def awake(channels, **options):
    norm = equinorm.GlobalResponseNorm(channels, dtype=torch.float64, **options)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels))
        norm.bias.copy_(torch.randn(channels))
    return norm


def test_a_fresh_layer_is_the_identity():
    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(equinorm.GlobalResponseNorm(3)(x), x)
    assert torch.equal(equinorm.create("global_response", 5)(x), x)


def test_the_numbers_of_the_specification():
    norm = equinorm.GlobalResponseNorm(2, eps=0.0, dtype=torch.float64)
    torch.nn.init.ones_(norm.weight)
    x = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]], dtype=torch.float64)  # responses 5 and 1, over their mean 5/3 and 1/3
    assert_close(norm(x), torch.tensor([[[8.0, 4 / 3], [32 / 3, 0.0]]], dtype=torch.float64))


def test_the_share_ignores_scale_and_averages_to_one():
    norm = equinorm.GlobalResponseNorm(5, eps=0.0, channel_dim=1, dtype=torch.float64)
    torch.nn.init.ones_(norm.weight)
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    share = norm(x) / x - 1
    assert_close(norm(x * 1e3) / (x * 1e3) - 1, share)
    assert_close(share.mean((1, 2, 3)), torch.ones(3, dtype=torch.float64))


def test_the_share_does_not_depend_on_resolution():
    norm = awake(4, eps=0.0, channel_dim=1)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    larger = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(norm(larger)[..., ::2, ::2], norm(x))


@pytest.mark.parametrize("spatial", [(), (7,), (5, 3), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_layouts_agree_and_keep_theirs(spatial, dtype):
    last = awake(6).to(dtype)
    first = equinorm.GlobalResponseNorm(6, channel_dim=1, dtype=dtype)
    first.load_state_dict(last.state_dict())
    x = torch.randn(3, *spatial, 6).to(dtype).requires_grad_()
    y = last(x)
    assert y.is_contiguous()
    assert torch.equal(y, first(x.movedim(-1, 1)).movedim(1, -1))
    mask = torch.rand(3, *spatial) < 0.5
    masked = last(x, mask=mask)
    assert torch.equal(masked, last(x, mask=mask.unsqueeze(-1)))
    assert torch.equal(masked, first(x.movedim(-1, 1), mask=mask).movedim(1, -1))
    (dx,) = torch.autograd.grad(y.float().square().sum(), x)
    assert dx.stride() == x.stride()


def test_a_silent_map_has_the_gradient_of_the_residual():
    norm = awake(3).requires_grad_()
    x = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(norm(x).sum(), x, create_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    (second,) = torch.autograd.grad((dx * dx).sum(), norm.weight, allow_unused=True)
    assert second is None or not second.any()
    partly = torch.randn(2, 4, 3, dtype=torch.float64)
    partly[..., 1] = 0
    for impl in ("auto", "plain"):
        (dx,) = torch.autograd.grad(norm(own := partly.clone().requires_grad_(), impl=impl).square().sum(), own)
        assert dx.isfinite().all()


def test_half_precision_survives_squares_beyond_its_range():
    norm = awake(4).half()
    x = (torch.rand(2, 9, 9, 4) + 300).half()
    assert_close(norm(x), norm.double()(x.double()))


def test_published_checkpoints_load():
    theirs = {"gamma": torch.randn(1, 1, 1, 4), "beta": torch.randn(1, 1, 1, 4)}
    norm = equinorm.GlobalResponseNorm(4)
    norm.load_state_dict(theirs.copy())
    assert torch.equal(norm.weight, theirs["gamma"].flatten())
    assert torch.equal(norm.bias, theirs["beta"].flatten())


def test_the_wrong_layout_is_named():
    with pytest.raises(
        ValueError, match=r"must have shape \(N, \*spatial, 6\), got \(2, 6, 5, 5\); for \(N, 6, \*spatial\) construct .*=1"
    ):
        equinorm.GlobalResponseNorm(6)(torch.randn(2, 6, 5, 5))
    with pytest.raises(ValueError, match=r"channel_dim must be 1 .* or -1 .*, got 2"):
        equinorm.GlobalResponseNorm(6, channel_dim=2)
    with pytest.raises(ValueError, match="must have shape"):
        equinorm.GlobalResponseNorm(6)(torch.randn(6))
