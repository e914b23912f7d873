"""SPADE: a norm without parameters, modulated position by position."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import equinorm
from tests.helpers import assert_close


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


def maps(*shape):
    """One-hot class maps (N, 3, *T)."""
    return F.one_hot(torch.randint(3, shape), 3).movedim(-1, 1).double()


@pytest.mark.parametrize("training", [True, False])
def test_without_modulation_it_is_the_norm(training):
    x, m = data(3, 6, 5, 4), maps(3, 10, 8)
    for norm, plain in (
        ("batch", equinorm.BatchNorm(6, affine=False).double()),
        ("instance", equinorm.InstanceNorm(6)),
    ):
        spade = equinorm.SPADE(6, 3, 8, norm=norm).double()
        for convolution in (spade.mlp_gamma, spade.mlp_beta):
            torch.nn.init.zeros_(convolution.weight)
            torch.nn.init.zeros_(convolution.bias)
        assert_close(spade.train(training)(x, m), plain.train(training)(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_any_number_of_positions_and_maps_of_any_size(rank):
    sizes = (5, 4, 3)[:rank]
    norm = equinorm.SPADE(6, 3, 4, spatial_dims=rank).double()
    x, m = data(2, 6, *sizes), maps(2, *sizes)
    want = norm(x, m)
    doubled = m
    for dim in range(2, 2 + rank):
        doubled = doubled.repeat_interleave(2, dim)
    assert_close(norm(x, doubled), want)
    assert_close(norm(x, m[:1].expand(2, *m.shape[1:])), norm(x, m[:1]))


def test_a_padded_image_equals_the_image():
    x, m = data(2, 6, 5, 6), maps(2, 5, 6)
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[:, :4, :5] = True
    norm = equinorm.SPADE(6, 3, 8).double()
    y = norm(torch.where(mask.unsqueeze(1), x, torch.nan), torch.where(mask.unsqueeze(1), m, 5.0), mask)
    assert_close(y[..., :4, :5], norm(x[..., :4, :5], m[..., :4, :5]))
    assert not y[..., 4:, :].any()


def test_published_checkpoints_load():
    norm = equinorm.SPADE(6, 3, 8)
    norm(torch.randn(2, 6, 5, 5), torch.randn(2, 3, 5, 5))
    published = {name.replace("running_", "param_free_norm.running_"): v for name, v in norm.state_dict().items()}
    published["param_free_norm.num_batches_tracked"] = published.pop("num_batches_tracked")
    other = equinorm.SPADE(6, 3, 8)
    other.load_state_dict(published)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), norm.state_dict().values(), strict=True))


def test_derivatives_reach_the_labels():
    norm = equinorm.SPADE(3, 2, 4).double()
    x, m = data(2, 3, 3, 2).requires_grad_(), data(2, 2, 3, 2).requires_grad_()

    def run(x, m):
        return torch.func.functional_call(norm, {name: b.clone() for name, b in norm.named_buffers()}, (x, m))

    torch.autograd.gradcheck(run, (x, m))
    torch.autograd.gradgradcheck(run, (x, m))


def test_autocast_runs_the_convolutions_only():
    norm, x, m = equinorm.SPADE(6, 3, 8), torch.randn(2, 6, 5, 5) + 1000, torch.randn(2, 3, 5, 5)
    want = norm(x, m)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, m)
    assert y.dtype == torch.float32
    assert 0 < (y - want).abs().max() < 0.05 * want.abs().max(), "statistics in bfloat16 would be off by 100 % at this mean"


@pytest.mark.parametrize(
    ("shape", "labels", "error", "pattern"),
    [
        ((2, 6, 5), torch.zeros(2, 3, 5), ValueError, r"must have 2 spatial dimensions.* got \(2, 6, 5\)"),
        ((2, 6, 5, 5), torch.zeros(2, 3, 5), ValueError, r"label map must have shape \(2 or 1, 3, \*T\).* got \(2, 3, 5\)"),
        ((2, 6, 5, 5), torch.zeros(2, 4, 5, 5), ValueError, r"label map must have shape .* got \(2, 4, 5, 5\)"),
        ((2, 6, 5, 5), torch.zeros(3, 3, 5, 5), ValueError, r"label map must have shape .* got \(3, 3, 5, 5\)"),
        ((2, 6, 5, 5), torch.zeros(2, 5, 5, dtype=torch.long), TypeError, r"label map must be floating point.*one_hot\(labels, 3\)"),
        ((1, 6, 1, 1), torch.zeros(1, 3, 1, 1), ValueError, r"training needs more than one value per channel"),
    ],
)
def test_bad_inputs_are_refused(shape, labels, error, pattern):
    with pytest.raises(error, match=f"SPADE: .*{pattern}"):
        equinorm.SPADE(6, 3, 8)(torch.randn(shape), labels)


def test_an_instance_of_one_position_is_refused():
    with pytest.raises(ValueError, match='SPADE: norm="instance" needs more than one position'):
        equinorm.SPADE(6, 3, 8, norm="instance")(torch.randn(2, 6, 1, 1), torch.zeros(2, 3, 4, 4))
