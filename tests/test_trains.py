"""``equinorm trains``: every method has a network that uses it, and learns in it."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

import equinorm
from equinorm import catalogue
from equinorm.cli import main
from equinorm.trains.command import digits, train
from equinorm.trains.learners import SPECIAL, learner


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.mark.parametrize("name", catalogue.methods())
def test_every_method_has_a_network_that_uses_it(name, data, monkeypatch):
    """A method that the catalogue gains needs its network here: one that does without it would prove nothing."""
    method, calls = catalogue.methods()[name], []
    if not inspect.isclass(method):

        def counted(*args, **options):
            calls.append(name)
            return method(*args, **options)

        monkeypatch.setattr(equinorm, method.__name__, counted)
        counted.facts = method.facts
        monkeypatch.setattr(catalogue, "resolve", lambda _: counted)
    network = learner(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network.attach(optimizer)
    loss = network.loss(*(part[:16] for part in data))
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    used = any(isinstance(module, method) for module in network.modules()) if inspect.isclass(method) else bool(calls)
    assert used, f"the network of {name} does not contain it: equinorm/trains/learners.py"


def test_no_network_is_left_over():
    assert set(SPECIAL) <= set(catalogue.methods())


def test_a_method_that_needs_more_than_channels_and_has_no_network_is_not_passed_over(monkeypatch):
    monkeypatch.delitem(SPECIAL, "spade")
    with pytest.raises(TypeError, match="label_channels"):
        learner("spade")


def test_training_repeats_and_leaves_the_random_generator_alone(data):
    before = torch.get_rng_state()
    first = train("batch", *data, steps=12)
    assert torch.equal(torch.get_rng_state(), before)
    again = train("batch", *data, steps=12)
    assert (first.first, first.last) == (again.first, again.last)
    assert first.improved


def test_a_loss_that_is_not_lower_is_told(data, monkeypatch, capsys):
    """A network whose loss cannot fall, and one whose loss is no number."""

    class Constant(nn.Module):
        task = "nothing"

        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def attach(self, optimizer):
            pass

        def loss(self, images, classes):
            return self.value * 0 + self.value.detach()

    monkeypatch.setitem(SPECIAL, "batch", lambda: Constant(1.0))
    monkeypatch.setitem(SPECIAL, "group", lambda: Constant(math.nan))
    assert main(["trains", "batch", "group", "layer", "--steps", "11"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("not lower")] == ["batch", "group"]
    assert "1 of 3 methods end with a lower loss" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["btach"], "no normalization method is called 'btach'; did you mean 'batch'"),
        (["batch", "--steps", "10"], "integer above 10, got 10"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys):
    try:
        code = main(["trains", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_method_trains(capsys):
    assert main(["trains"]) == 0, capsys.readouterr().out
