"""Training and measuring an image classifier: the loop of the built-in tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REFERENCE_BATCH_SIZE = 64
EVALUATION_BATCH_SIZE = 500

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Samples:
    """Images and their classes.

    Attributes:
        x: ``(N, ...)``.
        y: ``(N,)``, int64.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Samples:
        """Those at ``index``."""
        return Samples(self.x[index], self.y[index])

    def to(self, device: str) -> Samples:
        """On another device."""
        return Samples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Splits:
    """Training data, validation data to choose by, test data to report."""

    train: Samples
    validation: Samples
    test: Samples

    def to(self, device: str) -> Splits:
        """On another device."""
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device))


def check_batch_sizes(batch_sizes: Sequence[int], samples: int) -> None:
    """Refuse batch sizes for which there is not one full batch.

    Raises:
        ValueError: naming both numbers.
    """
    if max(batch_sizes) > samples:
        raise ValueError(f"a batch size must not be larger than the training data, got batch size {max(batch_sizes)} for {samples} images")


def train(
    model: nn.Module,
    data: Splits,
    *,
    batch_size: int,
    epochs: int,
    lr: float,
    order: torch.Generator,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    augment: Transform | None = None,
    prepare: Callable[[Tensor], Tensor] = Tensor.float,
) -> Iterator[dict[str, float]]:
    """Train with SGD and yield metrics after each epoch.

    An epoch is one pass over the training data at every batch size; a last incomplete batch is left out, so that every step sees
    ``batch_size`` samples. The learning rate is ``lr * batch_size / 64`` at the start, so that a pass over the data moves the weights about
    as far at every batch size (the linear rule of Goyal et al. 2017), and falls to 0 along half a cosine.

    Args:
        model: from ``(N, ...)`` to ``(N, classes)``.
        data: on the model's device.
        batch_size: samples per step.
        epochs: passes over the training data.
        lr: learning rate at batch size 64.
        order: draws the order of the data, a new one each epoch, and what ``augment`` draws; on the CPU.
        momentum: of SGD.
        weight_decay: of SGD.
        augment: changes a training batch at random.
        prepare: makes model input of stored images.

    Yields:
        ``train_loss``, ``validation_loss``, ``validation_accuracy``, ``test_accuracy``, ``seconds_per_step``.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr * batch_size / REFERENCE_BATCH_SIZE, momentum, weight_decay=weight_decay)
    steps = len(data.train) // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / (epochs * steps))) / 2)
    for _ in range(epochs):
        model.train()
        losses = []
        begin = time.perf_counter()
        for index in torch.randperm(len(data.train), generator=order)[: steps * batch_size].split(batch_size):
            batch = data.train.take(index)
            x = prepare(batch.x)
            loss = F.cross_entropy(model(augment(x, order) if augment else x), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses).mean().item()  # waits for the device, so that the time is that of the steps
        seconds = time.perf_counter() - begin
        validation_loss, validation_accuracy = evaluate(model, data.validation, prepare)
        yield {
            "train_loss": train_loss,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "test_accuracy": evaluate(model, data.test, prepare)[1],
            "seconds_per_step": seconds / steps,
        }


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, prepare: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in evaluation mode."""
    model.eval()
    loss = correct = 0.0
    for x, y in zip(samples.x.split(EVALUATION_BATCH_SIZE), samples.y.split(EVALUATION_BATCH_SIZE), strict=True):
        scores = model(prepare(x))  # (N, classes)
        loss += F.cross_entropy(scores, y, reduction="sum").item()
        correct += (scores.argmax(1) == y).sum().item()
    return loss / len(samples), correct / len(samples)


def generator(seed: int) -> torch.Generator:
    """A generator of one's own, which nothing else advances."""
    return torch.Generator().manual_seed(seed)
