"""A probe leaves no trace, whatever the model does and however it ends."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import equinorm
from tests.probe import networks as net
from tests.probe.zoo import BROKEN, HEALTHY


def bits(tensor):
    return tensor.detach().clone().contiguous().view(torch.uint8) if tensor.numel() and tensor.ndim else tensor.detach().clone()


def photograph(model, batch, optimizer=None):
    """Everything that must be the same afterwards, identity and content."""
    seen = {"rng": torch.get_rng_state(), "python": random.getstate(), "grad": torch.is_grad_enabled()}
    for name, p in model.named_parameters(remove_duplicate=False):
        seen[f"{name} value"] = bits(p)
        seen[f"{name} identity"] = (id(p), p.requires_grad, id(p.grad), len(p._backward_hooks or ()))
        if p.grad is not None:
            seen[f"{name} grad"] = bits(p.grad)
    for name, b in model.named_buffers(remove_duplicate=False):
        seen[f"{name} buffer"] = bits(b)
        seen[f"{name} buffer identity"] = id(b)
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith(("_hooks", "_with_kwargs"))}
        seen[f"{name} module"] = (module.training, hooks, sorted(vars(module)), list(module._buffers), list(module._parameters))
    for i, tensor in enumerate(t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)):
        seen[f"batch {i}"] = bits(tensor)
        seen[f"batch {i} identity"] = (tensor.requires_grad, tensor.grad is None, tensor._version)
    if optimizer is not None:
        seen["optimizer"] = repr(optimizer.state_dict())
    return seen


def assert_untouched(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, f"{key} has changed"


@pytest.mark.parametrize("case", BROKEN + HEALTHY, ids=lambda case: case.build.__name__)
def test_every_network_of_the_zoo_is_given_back_as_it_was(case):
    torch.manual_seed(0)
    model, batch, options = case.build()
    for i, p in enumerate(model.parameters()):
        if i % 2:
            p.grad = torch.randn_like(p)
    before = photograph(model, batch, options.get("optimizer"))
    equinorm.probe(model, batch, **options)
    assert_untouched(before, photograph(model, batch, options.get("optimizer")))


class Restless(nn.Module):
    """Does everything that a forward should not do."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("rebound", torch.zeros(3))
        self.register_buffer("late", None)
        self.history, self.table, self.state = [], {}, torch.zeros(2)
        self.initialised = False

    def forward(self, x):
        if not self.initialised:
            with torch.no_grad():
                self.scale.copy_(x.std(0))
                self.fc.weight.data.mul_(1.5)
                torch.add(self.fc.bias, 1.0, out=self.fc.bias.data)
            self.initialised = True
        self.count += 1
        self.rebound = self.rebound + 1
        self.late = torch.ones(2)
        self.history.append(x)
        self.table["last"] = x
        self.state.add_(random.random())
        self.train(False)
        x.mul_(2)
        self.fc.bias.requires_grad_(False)
        return self.fc(F.dropout(x, 0.5, training=True)) * self.scale


def test_a_model_that_changes_everything_is_given_back_as_it_was():
    model, x = Restless(), torch.randn(16, 8)
    before, state = photograph(model, x), model.state.clone()
    report = equinorm.probe(model, x)
    assert report.failure is None
    assert_untouched(before, photograph(model, x))
    assert model.history == []
    assert model.table == {}
    assert model.initialised is False
    assert torch.equal(model.state, state)
    assert not report.notes or "changed parameters" not in " ".join(report.notes)


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.fc, self.norm, self.error = nn.Linear(8, 8), nn.BatchNorm1d(8), error

    def forward(self, x):
        x = self.norm(self.fc(x))
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_also_when_the_model_raises(error):
    model, x = Raising(error), torch.randn(4, 8)
    before = photograph(model, x)
    if isinstance(error, RuntimeError):
        report = equinorm.probe(model, x)
        assert report.failure.error == "RuntimeError: no"
        assert [call.name for call in report.calls] == ["fc", "norm"]
    else:
        with pytest.raises(type(error)):
            equinorm.probe(model, x)
    assert_untouched(before, photograph(model, x))


def test_also_when_the_loss_raises():
    model, x = net.mlp(2), torch.randn(4, 64)
    before = photograph(model, x)
    report = equinorm.probe(model, x, lambda y: 1 / 0)
    assert report.failure.phase == "loss"
    assert_untouched(before, photograph(model, x))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16))
        self.last, self.reentrant = nn.Linear(16, 4), reentrant

    def forward(self, x):
        return self.last(checkpoint(self.body, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_each_call_once_and_hurts_nothing(reentrant):
    model, x = Checkpointed(reentrant), torch.randn(8, 16)
    stepped = []
    model.last.weight.register_post_accumulate_grad_hook(stepped.append)
    model.first.weight.grad = torch.ones(16, 16)
    before = photograph(model, x)
    torch.manual_seed(1)
    before |= {"rng": torch.get_rng_state()}
    report = equinorm.probe(model, x)
    assert report.failure is None
    assert_untouched(before, photograph(model, x))
    assert not stepped
    names = [call.name for call in report.calls]
    assert len(names) == len(set(names))
    assert all(call.gradient is not None for call in report.leaves())
    assert all(p.used for p in report.parameters)

    plain = Checkpointed(reentrant)
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda x: plain.last(plain.body(plain.first(x)))
    torch.manual_seed(1)
    expected = {call.name: call.gradient.rms for call in equinorm.probe(plain, x).leaves()}
    assert {call.name: call.gradient.rms for call in report.leaves()} == pytest.approx(expected)


def test_a_scheduled_optimizer_does_not_notice():
    model, x = net.mlp(2), torch.randn(8, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append(a))
    before = photograph(model, x, optimizer)
    report = equinorm.probe(model, x, lambda y: y.sum(), optimizer=optimizer)
    assert_untouched(before, photograph(model, x, optimizer))
    assert not calls
    assert scheduler.last_epoch == 0

    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(x).sum().backward()
    optimizer.step()
    for record in report.parameters:
        if record.role == "weight":
            change = model.get_parameter(record.name).detach() - values[record.name]
            expected = change.square().mean().sqrt() / values[record.name].square().mean().sqrt()
            assert record.update == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_whatever_mode_it_is_called_in(context):
    model, x = net.mlp(2), torch.randn(4, 64)
    with context():
        report = equinorm.probe(model, x)
        assert not torch.is_grad_enabled()
    assert report.call("0").gradient is not None
