"""``equinorm trains``: the table of what every method learns."""

from __future__ import annotations

import argparse
import time
from argparse import ArgumentParser, Namespace
from typing import NamedTuple

import torch
from torch import Tensor

from equinorm import catalogue
from equinorm.compare.environment import require
from equinorm.compare.errors import InputError
from equinorm.trains.learners import learner

STEPS, BATCH, RATE, AVERAGED = 80, 64, 3e-3, 10


class Learned(NamedTuple):
    """What training one method gave.

    Attributes:
        task: what was learned.
        first: loss of the first step, before anything was learned.
        last: mean loss of the last ten steps.
        seconds: wall time of training.
    """

    task: str
    first: float
    last: float
    seconds: float

    @property
    def improved(self) -> bool:
        """Whether the loss is lower than it began with; not if it is not a number."""
        return self.last < self.first


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits: images (N, 1, 8, 8) from -1 to 1, and classes (N,)."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(classes).long()


def train(name: str, images: Tensor, classes: Tensor, steps: int = STEPS, seed: int = 0) -> Learned:
    """Train the network of one method with Adam, on batches of 64 drawn at random.

    Args:
        name: of the method in the catalogue.
        images, classes: the data.
        steps: how many batches, at least 1.
        seed: of weights, batches and noise. torch's global generator comes back as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = learner(name).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
        network.attach(optimizer)
        began, losses = time.monotonic(), []
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH,))
            loss = network.loss(images[chosen], classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    end = losses[-AVERAGED:]
    return Learned(network.task, losses[0], sum(end) / len(end), time.monotonic() - began)


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``equinorm trains``."""
    parser.description = f"""Train a small network with each method on scikit-learn's digits: {STEPS} steps of Adam at {RATE:g} on
batches of {BATCH}. Shows that a method learns, not how well: for comparisons there is `equinorm compare`. Exit code 1 when a loss is not
lower than it began with."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="as in `equinorm list` (default: every method)")
    parser.add_argument("--steps", type=number_of_steps, default=STEPS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def number_of_steps(text: str) -> int:
    """A number of steps that leaves room to learn."""
    if not text.isdecimal() or int(text) <= AVERAGED:
        raise argparse.ArgumentTypeError(f"must be an integer above {AVERAGED}, got {text}: the last {AVERAGED} losses are averaged")
    return int(text)


def run(arguments: Namespace) -> int:
    """Train, and print a line for each method as it is done. Returns the exit code."""
    require("compare")
    try:
        methods = [catalogue.resolve(name) for name in arguments.names] or list(catalogue.methods().values())
    except ValueError as error:
        raise InputError(str(error)) from error
    names = [method.facts.name for method in methods]  # type: ignore[union-attr]
    images, classes = digits()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get into each other's way on networks of this size
    try:
        return table(names, images, classes, arguments.steps, arguments.seed)
    finally:
        torch.set_num_threads(threads)


def table(names: list[str], images: Tensor, classes: Tensor, steps: int, seed: int) -> int:
    """Train and print. Returns the exit code."""
    width = max(map(len, names)) + 2
    print(f"{'method':<{width}}{'task':<10}{'first loss':>11}{'last loss':>11}{'seconds':>9}", flush=True)
    worse, began = [], time.monotonic()
    for name in names:
        result = train(name, images, classes, steps, seed)
        mark = "" if result.improved else "  not lower"
        print(f"{name:<{width}}{result.task:<10}{result.first:>11.4f}{result.last:>11.4f}{result.seconds:>9.1f}{mark}", flush=True)
        worse += [] if result.improved else [name]
    print(
        f"\n{len(names) - len(worse)} of {len(names)} methods end with a lower loss than they began with; {time.monotonic() - began:.0f} s"
    )
    return int(bool(worse))
