"""The pieces of the idea, each alone: pooling, merging and mapping moments, composing maps, running estimates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import equinorm
from equinorm.core import Affine, Moments, normalize
from equinorm.core.channel import channel_norm
from equinorm.core.measure import measure
from equinorm.core.running import RunningMoments
from equinorm.kernels import cpu, reference
from tests.helpers import assert_close


def of(x, dims):
    """Moments by torch's own var_mean, as the comparison."""
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return mean.squeeze(), var.squeeze()


@pytest.fixture
def x():
    return torch.randn(4, 6, 5, 3, dtype=torch.float64) * 2 + 3


def test_pooling_equals_measuring_the_union(x):
    m = measure(x)
    for pooled, dims in ((m.over_batch(), (0, 2, 3)), (m.over_channels(), (1, 2, 3))):
        mean, var = of(x, dims)
        assert_close(pooled.mean.squeeze(), mean)
        assert_close(pooled.var.squeeze(), var)
    grouped = m.over_groups(3)
    mean, var = of(x.reshape(4, 3, 2, 15), (2, 3))
    assert_close(grouped.mean, mean.repeat_interleave(2, 1))
    assert_close(grouped.var, var.repeat_interleave(2, 1))
    assert m.over_batch().count == 60
    assert m.over_channels().count == 90
    assert grouped.count == 30


def test_pooling_weighs_uneven_counts(x):
    mask = torch.rand(4, 1, 5, 3) < 0.5
    mask[:, :, 0, 0] = True
    m = measure(x, mask=mask)
    for c in range(6):
        values = x[:, c][mask[:, 0]]
        assert_close(m.over_batch().mean[0, c], values.mean())
        assert_close(m.over_batch().var[0, c], values.var(correction=0))
    assert m.over_batch().count.item() == mask.sum()


def test_merging_equals_measuring_both(x):
    both = measure(x[:3]).over_batch().merge(measure(x[3:] * 5).over_batch())
    mean, var = of(torch.cat((x[:3], x[3:] * 5)), (0, 2, 3))
    assert_close(both.mean[0], mean)
    assert_close(both.var[0], var)
    assert both.count == 60


def test_merging_nothing_changes_nothing(x):
    m = measure(x).over_batch()
    nothing = measure(x[:0]).over_batch()
    for merged in (m.merge(nothing), nothing.merge(m)):
        assert_close(merged.mean, m.mean)
        assert_close(merged.var, m.var)
        assert merged.count == 60


def test_moments_of_a_mapped_input_are_known(x):
    affine = Affine(torch.randn(1, 6, dtype=x.dtype), torch.rand(4, 6, dtype=x.dtype) + 0.5, torch.randn(1, 6, dtype=x.dtype))
    mapped = (x - affine.center[..., None, None]) * affine.scale[..., None, None] + affine.shift[..., None, None]
    known, measured = affine.of(measure(x)), measure(mapped)
    assert_close(known.mean, measured.mean)
    assert_close(known.var, measured.var)


def test_two_maps_are_one(x):
    first, second = (Affine(*torch.randn(3, 1, 6, dtype=x.dtype)) for _ in range(2))

    def run(affine, x):
        return reference.affine(x, *(part[..., None, None] for part in affine))

    assert_close(run(first.then(second), x), run(second, run(first, x)))


def test_a_rule_may_use_any_pooling_at_once(x):
    def rule(m):
        return normalize(Moments(m.over_batch().mean, m.over_channels().var, m.count), None, None, 1e-5)

    y, seen = channel_norm(x, rule)
    mean = x.mean((0, 2, 3), keepdim=True)
    var = x.var((1, 2, 3), correction=0, keepdim=True)
    assert_close(y, (x - mean) / (var + 1e-5).sqrt())
    assert seen is None


def test_plain_rules_the_kernels_out(x, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "affine", lambda *a, original=cpu.affine: calls.append(1) or original(*a))
    norm = equinorm.SwitchNorm(6).double()
    norm(x)
    assert len(calls) == cpu.available()
    with equinorm.plain():
        norm(x)
        with equinorm.plain():
            norm(x)
        norm(x)
    norm(x, impl="plain")
    assert len(calls) == cpu.available()
    norm(x)
    assert len(calls) == 2 * cpu.available()
    with pytest.raises(ValueError, match='impl must be "auto" or "plain", got \'fast\''):
        norm(x, impl="fast")


def test_what_is_saved_for_backward_is_the_input_and_small_tensors():
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    saved = []
    for norm in (equinorm.BatchNorm(16), equinorm.GroupNorm(4, 16), equinorm.SwitchNorm(16), equinorm.BatchChannelNorm(16, 4)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            norm(x)
        big = [t for t in saved if t.numel() > 8 * 16]
        if cpu.available():
            assert len(big) == 1
            assert big[0].data_ptr() == x.data_ptr()


class Remembers(RunningMoments):
    def __init__(self, momentum):
        super().__init__()
        self.momentum = momentum
        self.register_running((2,))


def seen(mean, var, count):
    return Moments(torch.tensor([mean, mean], dtype=torch.float64)[None], torch.tensor([var, var], dtype=torch.float64)[None], count)


def test_exponential_and_plain_averages():
    exponential, plain = Remembers(0.1), Remembers(None)
    for batch in ([1.0, 3.0], [5.0, 9.0], [0.0, 0.0]):
        values = torch.tensor(batch)
        for memory in (exponential, plain):
            memory.learn(seen(values.mean().item(), values.var(correction=0).item(), 2))
    assert_close(plain.running_mean, torch.tensor([3.0, 3.0]).double())
    assert_close(plain.running_var, torch.tensor([10 / 3, 10 / 3]).double())
    mean, var = 0.0, 1.0
    for m, v in ((2.0, 2.0), (7.0, 8.0), (0.0, 0.0)):
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v
    assert_close(exponential.running_mean, torch.tensor([mean, mean], dtype=torch.float64))
    assert_close(exponential.running_var, torch.tensor([var, var], dtype=torch.float64))


def test_estimates_that_do_not_fit_are_not_kept():
    memory = Remembers(0.5)
    memory.learn(seen(1.0, 1e60, 2))
    assert memory.running_mean.tolist() == [0.0, 0.0]
    assert memory.running_var.tolist() == [1.0, 1.0]


def test_forgetting():
    memory = Remembers(0.5)
    memory.learn(seen(3.0, 4.0, 5))
    memory.reset_running_stats()
    assert memory.running_mean.tolist() == [0.0, 0.0]
    assert memory.running_var.tolist() == [1.0, 1.0]
    assert memory.num_batches_tracked == 0


def test_gradients_flow_through_a_whole_network_twice():
    """A gradient penalty through every kind of layer at once equals the plain path's."""
    model = nn.Sequential(
        equinorm.weight_standardization(nn.Conv2d(3, 8, 3)),
        equinorm.BatchChannelNorm(8, 4),
        nn.Softplus(),
        equinorm.SwitchNorm(8),
        nn.Conv2d(8, 4, 3),
        equinorm.GroupNorm(2, 4),
        nn.Flatten(),
        equinorm.LayerNorm(4 * 4 * 4),
        nn.Linear(64, 1),
    ).double()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)

    def penalty(model):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        g.square().sum().backward()
        return [p.grad for p in model.parameters()]

    twin = copy.deepcopy(model)
    with equinorm.plain():
        expected = penalty(twin)
    for got, want in zip(penalty(model), expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_close(got, want)
