"""Mixture normalization: limits, supplied responsibilities, the fit from its seeds, lost components, several processes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import equinorm
from tests.helpers import assert_close, run_ranks


def clusters(counts, apart=50.0, channels=3):
    """Points around well separated centres, shuffled, and which centre each belongs to."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts))]
    centres = torch.stack([torch.roll(torch.linspace(-apart, apart, channels), k) * (1 + k) for k in range(len(counts))])
    return (centres[labels] + torch.randn(sum(counts), channels)).double(), labels


def normalized_apart(x, labels):
    """Batch norm of every cluster by itself."""
    y = torch.zeros_like(x)
    for k in labels.unique():
        y[labels == k] = equinorm.BatchNorm(x.shape[1]).double()(x[labels == k]).detach()
    return y


def test_one_component_is_batch_norm():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    assert_close(equinorm.MixtureNorm(3, num_components=1).double()(x), equinorm.BatchNorm(3).double()(x))


def test_certain_responsibilities_are_batch_norm_on_each_part():
    x, labels = clusters([7, 4], apart=1.0)
    given = F.one_hot(labels).double()
    y = equinorm.MixtureNorm(3, 2, fisher_scale=False).double()(x, responsibilities=given)
    assert_close(y, normalized_apart(x, labels))


@pytest.mark.parametrize("counts", [[8, 8], [12, 4], [5, 5, 5]])
def test_with_the_root_of_the_share_the_variance_is_the_number_of_components(counts):
    x, labels = clusters(counts, apart=1.0)
    norm = equinorm.MixtureNorm(3, len(counts), eps=0.0, affine=False).double()
    y = norm(x, responsibilities=F.one_hot(labels).double())
    assert_close(y.var(0, correction=0), torch.full((3,), float(len(counts)), dtype=torch.float64))


def test_equal_responsibilities_are_batch_norm_times_the_root_of_their_number():
    x = torch.randn(6, 3, dtype=torch.float64)
    y = equinorm.MixtureNorm(3, 4).double()(x, responsibilities=torch.full((6, 4), 2.0))
    assert_close(y, 2 * equinorm.BatchNorm(3).double()(x))  # four times 1/4 / sqrt(1/4)


def test_responsibilities_per_sample_stand_for_every_position():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    given = torch.rand(4, 2, dtype=torch.float64)
    norm = equinorm.MixtureNorm(3, 2).double()
    assert torch.equal(norm(x, responsibilities=given), norm(x, responsibilities=given.unsqueeze(2).expand(4, 2, 5)))


def test_derivatives_given_the_responsibilities():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    given = torch.rand(4, 2, 3, dtype=torch.float64, requires_grad=True)
    norm = equinorm.MixtureNorm(2, 2).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.rand_like(parameter))

    def run(x, given):
        return norm(x, responsibilities=given)

    torch.autograd.gradcheck(run, (x, given), fast_mode=True)
    torch.autograd.gradgradcheck(run, (x, given), fast_mode=True)


@pytest.mark.parametrize("counts", [[30, 30], [60, 10], [20, 30, 40]])
def test_the_fit_finds_what_is_there(counts):
    for seed in range(5):
        torch.manual_seed(seed)
        x, labels = clusters(counts)
        norm = equinorm.MixtureNorm(3, len(counts), fisher_scale=False).double()
        y = norm(x)
        assert_close(y, normalized_apart(x, labels))
        assert norm.initialized
        shares = torch.tensor(sorted(counts), dtype=torch.float64) / sum(counts)
        assert_close(norm.running_share.sort().values, shares)  # the first batch is copied
        assert_close(norm.eval()(x), y)


def test_later_batches_keep_the_labels():
    x, _ = clusters([30, 30])
    norm = equinorm.MixtureNorm(3, 2).double()
    norm(x)
    first = norm.running_mean.clone()
    for _ in range(5):
        norm(x[torch.randperm(60)])
    assert_close(norm.running_mean, first)


def test_a_lost_component_is_seeded_anew():
    x, labels = clusters([30, 30])
    norm = equinorm.MixtureNorm(3, 2, fisher_scale=False).double()
    norm(x)
    norm.running_share.copy_(torch.tensor([0.999, 0.001]))
    norm.running_mean[1] = 1e6  # nowhere near the data
    assert_close(norm(x), normalized_apart(x, labels))
    assert norm.running_mean.abs().max() < 1e3, "the batch replaces the estimates"


def test_a_large_batch_is_fitted_on_part_of_it():
    x, labels = clusters([6000, 3000])
    y = equinorm.MixtureNorm(3, 2, fisher_scale=False).double()(x)
    assert_close(y, normalized_apart(x, labels))


def test_fewer_values_than_components_are_batch_norm_and_teach_nothing():
    x = torch.randn(2, 3, dtype=torch.float64)
    norm = equinorm.MixtureNorm(3, 4).double()
    assert_close(norm(x), equinorm.BatchNorm(3).double()(x))
    assert not norm.initialized
    assert not norm.running_mean.any()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, :3] = True
    x = torch.randn(3, 3, 5, dtype=torch.float64)
    assert_close(norm(x, mask=mask), equinorm.BatchNorm(3).double()(x, mask=mask))


def test_more_components_than_modes_and_constant_channels_stay_finite():
    x = torch.cat((torch.zeros(50, 1), torch.full((50, 1), 3.0), torch.randint(2, (50, 1)).double()), 1).requires_grad_()
    norm = equinorm.MixtureNorm(3, 5).double()
    y = norm(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(b.isfinite().all() for b in norm.buffers())
    assert norm.eval()(x).isfinite().all()


def test_many_channels_far_from_zero_in_float32():
    x = 1e4 + torch.randn(64, 256)
    norm = equinorm.MixtureNorm(256)
    for _ in range(3):
        assert norm(x).isfinite().all()
    exact = equinorm.MixtureNorm(256, 2).double()
    given = F.one_hot(torch.arange(64) % 2).float()
    assert_close(equinorm.MixtureNorm(256, 2)(x, responsibilities=given), exact(x.double(), responsibilities=given))


def test_a_bad_batch_and_a_frozen_module_leave_the_estimates():
    x, _ = clusters([30, 30])
    norm = equinorm.MixtureNorm(3, 2).double()
    norm(x)
    before = [b.clone() for b in norm.buffers()]
    bad = x.clone()
    bad[0, 0] = torch.inf
    norm(bad)
    norm.frozen = True
    assert torch.equal(norm(x * 2), norm.eval()(x * 2))
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


SIZES = (40, 0, 20)


def _rank(rank):
    torch.manual_seed(9)
    x, labels = clusters([40, 20])
    torch.manual_seed(rank)  # every process draws its own seeds; all must use the same
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    norm = equinorm.MixtureNorm(3, 2, fisher_scale=False, process_group="world").double()
    y = norm(x[mine])
    return y.detach(), normalized_apart(x, labels)[mine], norm.running_mean


def test_processes_share_their_seeds_and_their_fit():
    ranks = run_ranks(3, _rank)
    for y, expected, mean in ranks:
        assert_close(y, expected)
        assert torch.equal(mean, ranks[0][2])
