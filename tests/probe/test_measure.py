"""Statistics of one tensor against float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from equinorm.probe.measure import SAMPLE, measure, strides

LARGE = (8, 16, 40, 40)  # more values than a sample holds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_statistics_agree_with_float64(dtype, shift):
    x = (torch.randn(4, 6, 10, 10) * 2 + shift).to(dtype)
    x[:, 2] = 0
    x[:, 4] = 7
    stats, channels = measure(x, 1)
    y = x.double()
    assert stats.sampled == stats.count == x.numel()
    assert stats.mean == pytest.approx(y.mean().item(), rel=1e-5, abs=1e-6)
    assert stats.std == pytest.approx(y.std(correction=0).item(), rel=1e-4)
    assert stats.rms == pytest.approx(y.square().mean().sqrt().item(), rel=1e-5)
    assert (stats.min, stats.max) == (y.min().item(), y.max().item())
    assert stats.zeros == pytest.approx((y == 0).double().mean().item())
    assert (channels.dead_channels, channels.constant_channels) == ((2,), (2, 4))
    per_channel = y.movedim(1, 0).flatten(1)
    assert channels.variance == pytest.approx(per_channel.var(1, correction=0).mean().item(), rel=1e-3)
    assert channels.squared_mean == pytest.approx(per_channel.mean(1).square().mean().item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(torch.tensor(channels.rms), per_channel.square().mean(1).sqrt().float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_of_extreme_values_neither_vanish_nor_overflow(scale):
    x = torch.randn(64, 8) * scale
    assert measure(x, 1)[0].rms == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-5)


def test_a_sample_of_a_large_tensor_is_close():
    x = torch.randn(LARGE) * torch.arange(1, 17).view(1, 16, 1, 1)
    stats, _ = measure(x, 1)
    assert stats.sampled <= SAMPLE < stats.count
    assert stats.rms == pytest.approx(x.square().mean().sqrt().item(), rel=0.05)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_never_missed(layout, value):
    x = torch.randn(LARGE).to(memory_format=layout)
    for place in [(0, 0, 0, 0), (7, 15, 39, 39), (3, 7, 20, 1), (5, 2, 1, 38)]:
        y = x.clone()
        y[place] = value
        stats, channels = measure(y, 1)
        assert (stats.nan, stats.inf) == (int(math.isnan(value)), int(math.isinf(value)))
        assert channels is None
        assert math.isfinite(stats.rms)


def test_extremes_are_those_of_everything():
    x = torch.randn(LARGE)
    x[3, 3, 3, 4] = 1000
    x[2, 0, 39, 38] = -2000
    stats, _ = measure(x, 1)
    assert (stats.min, stats.max) == (-2000, 1000)


def test_a_channel_is_dead_only_if_all_of_it_is():
    x = torch.relu(torch.randn(LARGE))
    x[:, 3] = 0
    x[:, 5] = 0
    x[7, 5, 39, 38] = 1e-3  # outside the sample
    assert strides(LARGE, 1, SAMPLE) is not None
    _, channels = measure(x, 1)
    assert channels.dead_channels == (3,)


def test_the_layout_makes_no_difference():
    x = torch.randn(2, 8, 5, 5)
    stats, channels = measure(x, 1)
    other, other_channels = measure(x.to(memory_format=torch.channels_last), 1)
    assert dataclasses.asdict(stats) == pytest.approx(dataclasses.asdict(other), rel=1e-5, abs=1e-6)
    assert channels.rms == pytest.approx(other_channels.rms, rel=1e-5)


def test_gradients_below_half_precision_are_counted():
    stats, _ = measure(torch.tensor([0.0, 1e-6, -3e-5, 1e-3]))
    assert (stats.zeros, stats.tiny) == (0.25, 0.5)


def test_complex_numbers_count_as_pairs():
    stats, _ = measure(torch.complex(torch.tensor([3.0]), torch.tensor([4.0])))
    assert stats.count == 2
    assert stats.rms == pytest.approx(math.sqrt(12.5))


def test_everything_not_finite_and_nothing_at_all():
    stats, _ = measure(torch.full((4, 3), math.nan), 1)
    assert stats.nan == 12
    assert measure(torch.empty(0, 3), 1)[0].count == 0


def test_many_channels_are_averaged_in_runs():
    _, channels = measure(torch.randn(32, 1000), 1)
    assert channels.count == 1000
    assert len(channels.rms) == 64


@pytest.mark.parametrize("shape", [(10**6,), (3, 10**5), (64, 64, 64, 64), (1, 2**20)])
def test_a_sample_is_bounded_and_spares_the_channels(shape):
    axis = len(shape) - 1 if len(shape) > 1 else None
    slices = strides(shape, axis, 4096)
    sizes = [len(range(n)[s]) for n, s in zip(shape, slices, strict=True)]
    assert math.prod(sizes) <= max(4096, shape[axis] if axis is not None else 0)
    if axis is not None:
        assert sizes[axis] == shape[axis]
    assert all(s.step % 2 for s in slices)
