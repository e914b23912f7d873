"""Virtual batch norm: one more sample of the reference batch; the reference through a whole model; references that must not be used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import equinorm
from equinorm import VirtualBatchNorm, virtual_batch
from tests.helpers import assert_close, assert_grads_close


def example(n, *spatial):
    return torch.randn(n, 3, *(spatial or (4, 2)), dtype=torch.float64) * 2 + 1


def make(**options):
    return VirtualBatchNorm(3, **options).double()


def test_is_batch_norm_of_the_reference_and_the_sample():
    norm, batch = make(affine=False), equinorm.BatchNorm(3, affine=False).double()
    r, x = example(4).requires_grad_(), example(2).requires_grad_()
    y_r = norm.set_reference(r)
    y = norm(x)
    assert_close(y_r, batch(r))
    want = torch.cat([batch(torch.cat((r, x[i : i + 1])))[-1:] for i in range(2)])
    assert_close(y, want)
    weights = torch.randn_like(y)
    actual, expected = (
        dict(zip("rx", torch.autograd.grad((out * weights).sum(), (r, x), retain_graph=True), strict=True)) for out in (y, want)
    )
    assert_grads_close(actual, expected)


def test_the_number():
    norm = VirtualBatchNorm(1, eps=0.0).double()
    norm.set_reference(torch.tensor([[0.0], [2.0], [4.0]], dtype=torch.float64))
    torch.testing.assert_close(norm(torch.tensor([[6.0]]).double()).item(), 1.341641, rtol=0, atol=1e-6)


def test_a_large_reference_decides_alone():
    norm, x, r = make(affine=False, eps=0.0), example(2), example(4000)
    norm.set_reference(r)
    alone = (x - r.mean((0, 2, 3), keepdim=True)) / r.std((0, 2, 3), correction=0, keepdim=True)
    assert (norm(x) - alone).abs().max() < 0.01


def test_far_from_zero_nothing_cancels():
    r, x = example(4) + 1e4, example(2) + 1e4
    norm, exact = VirtualBatchNorm(3), make()
    norm.set_reference(r.float())
    exact.set_reference(r.float().double())
    assert_close(norm(x.float()), exact(x.float().double()))


def test_padding_of_the_reference_does_not_count():
    r, mask = example(3), torch.ones(3, 4, 2, dtype=torch.bool)
    mask[:, 2:] = False
    norm, cropped, x = make(), make(), example(2)
    norm.set_reference(torch.where(mask.unsqueeze(1), r, torch.nan), mask)
    cropped.set_reference(r[:, :, :2])
    assert_close(norm(x), cropped(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3)
        self.first, self.second = VirtualBatchNorm(3), VirtualBatchNorm(3)

    def forward(self, x):
        return self.second(self.two(self.first(self.one(x)).tanh()))


def naive(net, r, x):
    """Both layers on (N, C), one sample at a time."""

    def layer(r, x):
        outputs = [(r - r.mean(0)) / (r.var(0, correction=0) + 1e-5).sqrt()]
        for sample in x:
            together = torch.cat((r, sample[None]))
            outputs.append(((sample - together.mean(0)) / (together.var(0, correction=0) + 1e-5).sqrt())[None])
        return outputs[0], torch.cat(outputs[1:])

    r, x = layer(net.one(r), net.one(x))
    return layer(net.two(r.tanh()), net.two(x.tanh()))


def test_the_reference_passes_through_a_whole_model():
    net, r, x = Net().double(), torch.randn(6, 4).double(), torch.randn(3, 4).double()
    names = dict(net.named_parameters())
    linear = [name for name in names if "one" in name or "two" in name]
    for _ in range(2):
        with virtual_batch(net, r) as y_r:
            y = net(x)
        want_r, want = naive(net, r, x)
        assert_close(y_r, want_r)
        assert_close(y, want)
        weights = torch.randn_like(y)
        parameters = [names[name] for name in linear]
        actual, expected = (dict(zip(linear, torch.autograd.grad((out * weights).sum(), parameters), strict=True)) for out in (y, want))
        # A bias before a norm has no effect: both gradients are rounding.
        drop = ("one.bias", "two.bias")
        assert_grads_close(*({k: g for k, g in grads.items() if k not in drop} for grads in (actual, expected)))
        assert all(actual[name].abs().max() < 1e-12 for name in drop)


def test_trains_and_evaluates():
    net, r = Net(), torch.randn(8, 4)
    net.register_buffer("reference", r)
    optimizer, x, target = torch.optim.SGD(net.parameters(), lr=0.05), torch.randn(16, 4), torch.randn(16, 3)
    losses = []
    for _ in range(20):
        with virtual_batch(net, net.reference):
            loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad(), virtual_batch(net.eval(), net.reference):
        whole = net(x)
        assert_close(torch.cat([net(sample[None]) for sample in x]), whole.double())


def test_without_a_reference_there_is_no_answer():
    net, x = Net(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="VirtualBatchNorm: there is no reference batch; call the model within"):
        net(x)
    with virtual_batch(net, x):
        net(x)
    with pytest.raises(RuntimeError, match="there is no reference batch"):
        net(x)
    with pytest.raises(ValueError, match="VirtualBatchNorm: the reference batch must not be empty, got shape"):
        make().set_reference(example(0))
    with (
        pytest.raises(ValueError, match="virtual_batch: Linear must hold at least one VirtualBatchNorm, found none"),
        virtual_batch(net.one, x),
    ):
        pass


def step(module):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_a_stale_reference_is_refused():
    net, x = Net(), torch.randn(3, 4)
    with virtual_batch(net, x):
        step(net.one)  # no layer can see this by itself
        with pytest.raises(RuntimeError, match="virtual_batch: parameters of Net changed after its reference pass"):
            net(x)
    norm = VirtualBatchNorm(3)
    norm.set_reference(example(4).float())
    step(norm)
    with pytest.raises(RuntimeError, match="VirtualBatchNorm: the layer's parameters changed after its reference was measured"):
        norm(example(2).float())
    assert copy.deepcopy(norm)._reference is None, "a copy must not make a stale reference fresh"
    norm.set_reference(example(4).float())
    norm(example(2).float())
    norm.load_state_dict(norm.state_dict())
    with pytest.raises(RuntimeError, match="stale"):
        norm(example(2).float())


def test_a_failed_reference_pass_leaves_nothing_behind():
    net = Net()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), virtual_batch(net, torch.randn(3, 5)):
        pass
    with virtual_batch(net, torch.randn(3, 4)):
        net(torch.randn(2, 4))
    assert not net._forward_pre_hooks


def test_a_layer_in_two_places_is_refused():
    norm = VirtualBatchNorm(3)
    net = nn.Sequential(norm, nn.ReLU(), norm)
    with (
        pytest.raises(RuntimeError, match="VirtualBatchNorm: a layer has one reference, but was called twice"),
        virtual_batch(net, torch.randn(4, 3)),
    ):
        pass


class Checkpointed(Net):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_reference_pass_cannot_be_checkpointed(reentrant):
    net = Checkpointed(reentrant)
    x = torch.randn(4, 4, requires_grad=True)
    with (
        pytest.raises(RuntimeError, match="VirtualBatchNorm: the reference pass cannot run within activation checkpointing"),
        virtual_batch(net, x),
    ):
        pass


def test_noise_in_the_weight_as_the_authors_start():
    weight = VirtualBatchNorm(4000, init_std=0.02).weight
    assert abs(weight.mean().item() - 1) < 0.002
    assert abs(weight.std().item() - 0.02) < 0.002
    assert VirtualBatchNorm(3).weight.eq(1).all()


def test_a_reference_moves_with_its_module():
    norm, x = make(), example(2)
    norm.set_reference(example(4))
    want = norm(x)
    assert_close(norm.float()(x.float()), want)
    assert_close(norm.double()(x), want)
    assert norm._reference.moments.mean.grad_fn is None
