"""A task of a few milliseconds for the tests of compare, run from a copy in the test's folder."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

STARTS = Path(__file__).with_name("starts.txt")


def task(norm_layer, batch_size, seed, *, lr=0.1, epochs=2, pause=0.0, fail="", weight_layer=None):
    """One linear layer and a norm.

    Two epochs.
    """
    with STARTS.open("a") as file:
        print(type(norm_layer(8)).__name__, batch_size, seed, lr, os.getpid(), file=file)
    linear = torch.nn.Linear(4, 8)
    if weight_layer is not None:
        linear = weight_layer(linear)
    norm = norm_layer(8)
    for epoch in range(epochs):
        time.sleep(pause)
        norm(linear(torch.randn(batch_size, 4)))
        if batch_size == 3 and epoch == 1:
            if fail == "raise":
                raise RuntimeError("no such luck")
            if fail == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        loss = float("nan") if fail == "diverge" and batch_size == 3 and epoch == 1 else 1.0 / (epoch + 1) + lr
        print("this must not reach the results")
        # The best rate on validation data, 0.1, is not the best on test data.
        yield {
            "validation_accuracy": 1 - abs(lr - 0.1),
            "test_accuracy": linear.weight.mean().item() + lr,
            "train_loss": loss,
            "seconds_per_step": 0.5,
        }


def plain(norm_layer, batch_size, seed):
    """No more than the protocol asks for."""
    yield {"accuracy": 0.5}
    yield {"accuracy": 0.75}


def silent(norm_layer, batch_size, seed):
    return iter(())


def empty(norm_layer, batch_size, seed):
    yield {}


def words(norm_layer, batch_size, seed):
    yield {"accuracy": "good"}


def no_dict(norm_layer, batch_size, seed):
    yield 0.9


def other_metric(norm_layer, batch_size, seed):
    yield {"loss": 0.1}


def no_generator(norm_layer, batch_size, seed):
    return {"accuracy": 1.0}


def no_norm_layer(batch_size, seed):
    yield {"accuracy": 1.0}


def picky(norm_layer, batch_size, seed):
    yield {"accuracy": 1.0}


def _check(batch_sizes, **options):
    raise ValueError("the moon is not full")


picky.check = _check
