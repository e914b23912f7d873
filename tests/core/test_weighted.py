"""Moments pooled with weights, in one process and across several, against loops and autograd."""

from __future__ import annotations

import torch

from equinorm.core.moments import Moments
from tests.helpers import assert_close, run_ranks

SIZES = (3, 0, 2)


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, var = torch.randn(5, 4, generator=generator).double(), torch.rand(5, 4, generator=generator).double()
    weights = torch.rand(5, 2, generator=generator).double()
    count = torch.tensor([[7.0], [0.0], [3.0], [5.0], [2.0]]).double()
    return mean, var, weights, count


def by_loops(mean, var, weights, count):
    """Moments (K, C) and counts (K, 1), one mode and channel at a time, with autograd's derivative."""
    means, variances, counts = [], [], []
    for k in range(weights.shape[1]):
        total = sum(weights[n, k] * count[n, 0] for n in range(len(mean)))
        counts.append(total)
        for c in range(mean.shape[1]):
            mu = sum(weights[n, k] * count[n, 0] * mean[n, c] for n in range(len(mean))) / total
            square = sum(weights[n, k] * count[n, 0] * (var[n, c] + (mean[n, c] - mu) ** 2) for n in range(len(mean)))
            means.append(mu)
            variances.append(square / total)
    shape = (weights.shape[1], mean.shape[1])
    return torch.stack(means).reshape(shape), torch.stack(variances).reshape(shape), torch.stack(counts).unsqueeze(1)


def test_over_the_batch_is_the_loop():
    mean, var, weights, count = example()
    for actual, expected in zip(Moments(mean, var, count).weighted_over_batch(weights), by_loops(mean, var, weights, count), strict=True):
        assert_close(actual, expected)


def test_equal_weights_are_plain_pooling():
    mean, var, _, count = example()
    for n in (count, 6):
        x = Moments(mean, var, n)
        pooled, weighted = x.over_batch(), x.weighted_over_batch(torch.full((5, 1), 0.3).double())
        assert_close(weighted.mean, pooled.mean)
        assert_close(weighted.var, pooled.var)


def test_over_channels_is_the_loop_per_sample():
    mean, var, *_ = example()
    weights = torch.rand(5, 4, 3).double()
    pooled = Moments(mean, var, 6).weighted_over_channels(weights)
    for n in range(5):
        column = by_loops(mean[n, :, None], var[n, :, None], weights[n], torch.full((4, 1), 6.0).double())
        assert_close(pooled.mean[n], column[0][:, 0])
        assert_close(pooled.var[n], column[1][:, 0])
        assert_close(torch.as_tensor(pooled.count)[n], column[2][:, 0])


def test_weights_of_zero_give_zero_and_finite_gradients():
    mean, var, weights, _ = example()
    weights[:, 1] = 0
    weights.requires_grad_()
    pooled = Moments(mean, var, 6).weighted_over_batch(weights)
    assert not pooled.mean[1].any()
    assert not pooled.var[1].any()
    (pooled.mean.sum() + pooled.var.sum()).backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()


def loss(pooled):
    return (
        (pooled.mean.sin() * torch.arange(1.0, 9).reshape(2, 4)).sum() + (pooled.var * pooled.mean).cos().sum() + pooled.count.log().sum()
    )


def _rank(rank):
    mean, var, weights, count = example()
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    parts = [t[mine].clone().requires_grad_() for t in (mean, var, weights)]
    pooled = Moments(parts[0], parts[1], count[mine]).weighted_over_batch(parts[2], "world")
    # Each rank holds the whole loss: a third of it makes the sum over the ranks the loss.
    first = torch.autograd.grad(loss(pooled) / len(SIZES), parts, create_graph=True)
    second = torch.autograd.grad(sum((g.sin() * g).sum() for g in first), parts)
    return [t.detach() for t in (*pooled, *first, *second)]


def test_ranks_together_are_the_whole_with_both_derivatives():
    mean, var, weights, count = example()
    parts = [t.requires_grad_() for t in (mean, var, weights)]
    pooled = Moments(*by_loops(mean, var, weights, count))
    first = torch.autograd.grad(loss(pooled), parts, create_graph=True)
    second = torch.autograd.grad(sum((g.sin() * g).sum() for g in first), parts)
    ranks = run_ranks(len(SIZES), _rank)
    for i, (name, expected) in enumerate(zip(("mean", "var", "count"), pooled, strict=True)):
        for shares in ranks:
            assert_close(shares[i], expected, label=name)
    for order, expected in (("first", first), ("second", second)):
        offset = 3 if order == "first" else 6
        for i, grad in enumerate(expected):
            assert_close(torch.cat([shares[offset + i] for shares in ranks]), grad, label=f"{order} derivative {i}")
