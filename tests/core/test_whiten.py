"""The covariance geometry: means and covariances of any layout, far from zero and over long sums; products and their derivatives."""

from __future__ import annotations

import pytest
import torch

from equinorm.core import covariance
from equinorm.core.covariance import Grouped, ungrouped
from equinorm.core.whiten import divisor
from tests.helpers import assert_close


def loop(x, d, mask=None):
    """Mean and covariance of each group, from a list of the vectors that count."""
    mask = torch.ones(x.shape[0], 1, *x.shape[2:], dtype=torch.bool) if mask is None else mask
    means, covs = [], []
    for g in range(x.shape[1] // d):
        rows = torch.stack([x[:, c][mask[:, 0]] for c in range(g * d, g * d + d)], 1)  # (M, d)
        mean = sum(rows) / len(rows)
        means.append(mean)
        covs.append(sum(torch.outer(v - mean, v - mean) for v in rows) / len(rows))
    return torch.stack(means), torch.stack(covs)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(7, 6), (4, 6, 5), (3, 6, 4, 2), (2, 6, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_means_and_covariances_equal_a_loop(layout, shape, masked):
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64) + 3)
    mask = torch.rand(shape[0], 1, *shape[2:]) < 0.7 if masked else None
    found = Grouped.of(x, 3, mask).measure()
    for name, got, want in zip(("mean", "cov"), found, loop(x, 3, mask), strict=False):
        assert_close(got, want, label=name)
    assert int(found.count) == (x.numel() // 6 if mask is None else int(mask.sum()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(7, 6), (4, 6, 5), (3, 6, 4, 2), (2, 6, 2, 3, 2), (0, 6, 4)], ids=str)
def test_grouping_and_back_keeps_values_and_layout(layout, shape):
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64))
    origin = torch.zeros(2, 3, dtype=torch.float64)
    back = ungrouped(Grouped.of(x, 3, None, origin).data, x)
    assert torch.equal(back, x)
    assert back.stride() == x.stride() or not x.numel()


@pytest.mark.parametrize("blocks", [1, 3])
def test_derivatives_to_third_order_equal_the_loop(blocks, monkeypatch):
    x = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(covariance, "BLOCK", -(-12 // blocks))

    def chain(mean, cov):
        value, found = (mean.sin().sum() * cov.sin()).sum(), []
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            found.append(g)
            value = (g.sin() * x).sum()
        return found

    for order, (got, want) in enumerate(zip(chain(*Grouped.of(x, 2, None).measure()[:2]), chain(*loop(x, 2)), strict=True), 1):
        assert_close(got, want, label=f"derivative {order}")


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_float32_over_long_sums_and_far_from_zero(mean):
    x = torch.randn(4, 4, 500, 250) @ torch.randn(250, 250) / 16 + mean
    got = Grouped.of(x, 4, None).measure()
    exact = x.double().movedim(1, 0).flatten(1)
    assert_close(got.mean[0], exact.mean(1), dtype=torch.float32)
    assert_close(got.cov[0], torch.cov(exact, correction=0), dtype=torch.float32)


def test_the_map_is_matrix_times_distance_from_the_center():
    x = torch.randn(3, 6, 4, dtype=torch.float64) + 5
    center, matrix = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    got = ungrouped(Grouped.of(x, 3, None).project(center, matrix, bias), x)
    want = torch.stack([torch.block_diag(*matrix) @ (sample - center.reshape(6, 1)) for sample in x])
    assert_close(got, want + bias[:, None])


def test_the_largest_divisor():
    assert [divisor(c, 16) for c in (1, 6, 16, 24, 17, 96)] == [1, 6, 16, 12, 1, 16]
