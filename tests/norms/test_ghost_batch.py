"""Ghost batch norm: its limits, how a batch is cut, and what several virtual batches leave in the running estimates."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close


def example(n=6, *spatial):
    return torch.randn(n, 3, *(spatial or (4, 2)), dtype=torch.float64) * 2 + 1


def make(**options):
    return equinorm.GhostBatchNorm(3, **options).double()


@pytest.mark.parametrize("size", [6, 128])
def test_one_virtual_batch_is_batch_norm(size):
    x, ghost, batch = example(), make(virtual_batch_size=size), equinorm.BatchNorm(3).double()
    for _ in range(3):
        x = example()
        assert_close(ghost(x), batch(x))
    assert_close(ghost.eval()(x), batch.eval()(x))
    assert ghost.state_dict().keys() == batch.state_dict().keys()


def test_virtual_batches_of_one_are_instance_norm():
    x = example()
    assert_close(make(virtual_batch_size=1)(x), equinorm.InstanceNorm(3).double()(x))


def test_the_order_of_virtual_batches_does_not_matter_to_the_output():
    x, norm = example(), make(virtual_batch_size=2)
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    assert_close(norm(x[order]), norm(x)[order])


@pytest.mark.parametrize(
    ("options", "samples", "sizes"),
    [
        ({"virtual_batch_size": 4}, 8, [4, 4]),
        ({"virtual_batch_size": 4}, 9, [3, 3, 3]),
        ({"virtual_batch_size": 4}, 3, [3]),
        ({"virtual_batch_size": 2}, 7, [3, 2, 2]),
        ({"virtual_batch_size": 2}, 1, [1]),
        ({"num_splits": 3}, 7, [3, 2, 2]),
        ({"num_splits": 3}, 2, [1, 1]),
    ],
)
def test_no_part_of_the_batch_is_left_over(options, samples, sizes):
    norm, x = make(affine=False, **options), example(samples)
    assert norm.parts(samples) == len(sizes)
    y = norm(x)
    for piece in y.split(sizes):
        assert_close(piece.mean((0, 2, 3)), torch.zeros(3), dtype=torch.float32)


@pytest.mark.parametrize("training", [True, False])
def test_features_are_cut_like_maps_of_one_position(training):
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for options in ({"num_splits": 2}, {"num_splits": 2, "affine": False, "track_running_stats": False}, {"num_splits": 1}):
        features, maps = make(**options).train(training), make(**options).train(training)
        y, want = features(x), maps(x.unsqueeze(2)).squeeze(2)
        assert_close(y, want)
        assert_close(*(torch.autograd.grad(out.sin().sum(), x)[0] for out in (y, want)), label="gradient of x")
        for name, buffer in maps.named_buffers():
            assert_close(dict(features.named_buffers())[name].double(), buffer.double(), label=name)


def shifted(means):
    """Two samples around each of the given means, in one channel."""
    return torch.tensor([value for mean in means for value in (mean - 1.0, mean + 1.0)], dtype=torch.float64).reshape(-1, 1)


@pytest.mark.parametrize(("running_stats", "expected"), [("sequential", 0.9049), ("mean", 0.85975)])
def test_running_means_of_four_virtual_batches(running_stats, expected):
    norm = equinorm.GhostBatchNorm(1, virtual_batch_size=2, running_stats=running_stats).double()
    norm(shifted([1, 2, 3, 4]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("running_stats", ["sequential", "mean"])
def test_sixteen_virtual_batches_move_the_estimates_by_four_fifths(running_stats):
    norm = equinorm.GhostBatchNorm(1, num_splits=16, running_stats=running_stats).double()
    norm(shifted([5.0] * 16))
    torch.testing.assert_close(norm.running_mean, torch.tensor([5 * (1 - 0.9**16)]).double())
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9**16 + 2 * (1 - 0.9**16)]).double())


def test_without_momentum_the_estimates_are_the_plain_average():
    norm = equinorm.GhostBatchNorm(1, virtual_batch_size=2, momentum=None).double()
    norm(shifted([1, 2, 3]))
    norm(shifted([10, 20]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([(2 + 15) / 2], dtype=torch.float64))


def test_the_running_variance_misses_what_lies_between_virtual_batches():
    drifting = torch.randn(64, 1, dtype=torch.float64) + torch.linspace(-4, 4, 64, dtype=torch.float64)[:, None]
    ghost, batch = (equinorm.GhostBatchNorm(1, virtual_batch_size=size, momentum=1.0).double() for size in (8, 64))
    ghost(drifting)
    batch(drifting)
    assert ghost.running_var.item() < 0.5 * batch.running_var.item()


def test_a_part_without_data_moves_nothing():
    norm, x = make(num_splits=2), example(4)
    mask = torch.ones(4, 4, 2, dtype=torch.bool)
    mask[2:] = False
    alone = make(num_splits=1)
    alone(x[:2])
    norm(x, mask)
    assert_close(norm.running_mean, alone.running_mean)
    assert_close(norm.running_var, alone.running_var)


def test_a_virtual_batch_of_one_value_is_refused():
    with pytest.raises(ValueError, match=r"GhostBatchNorm: training needs more than one value .* got shape \(4, 3\) in 4 parts"):
        make(virtual_batch_size=1)(torch.randn(4, 3).double())
    norm = make(num_splits=3)
    with pytest.raises(ValueError, match=r"in each virtual batch"):
        norm(torch.randn(4, 3, 1).double())
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.randn(4, 3, 1).double()).shape == (4, 3, 1)
