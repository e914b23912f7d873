"""A trained batch-normalized network meets other data and batches of two: diagnosed by the probe, recalibrated, swapped, folded.

    python examples/batch_size_two.py [--seed N]

It trains on scikit-learn's handwritten digits (``pip install scikit-learn``), in less than a minute. Everything it prints is measured in
that run.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import equinorm
from equinorm.probe import Report
from equinorm.surgery import fold, recalibrate, swap

Data = tuple[Tensor, Tensor]  # images (N, 1, 8, 8) and classes (N,)
TRAINED_ON = 1200
RATES = (4e-4, 1e-3)  # the rate of the first training times sqrt(2 / 50), and Adam's default


def digits(contrast: float = 1.0, brightness: float = 0.0) -> tuple[Data, Data]:
    """The digits for training and for testing, as a scanner of that contrast and brightness gives them."""
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = contrast * (images - images.mean()) / images.std() + brightness
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], torch.tensor(classes)[order]
    return (images[:TRAINED_ON], targets[:TRAINED_ON]), (images[TRAINED_ON:], targets[TRAINED_ON:])


def network() -> nn.Sequential:
    """Three convolutions and two linear layers, with batch norm behind all but the last."""
    layers: list[nn.Module] = []
    channels = 1
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def train(model: nn.Module, data: Data, batch_size: int, epochs: int, lr: float) -> nn.Module:
    """Train in place; the model comes back in evaluation mode."""
    images, targets = data
    # Weight decay only where it belongs: on weights of two or more dimensions, and on no norm.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), targets[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch_size: int | None = None) -> float:
    """Share of digits that are recognised. With a batch size, norms use the statistics of the batch, as they do in training."""
    images, targets = data
    model = copy.deepcopy(model).train(batch_size is not None)
    count = len(images) // batch_size * batch_size if batch_size else len(images)
    found = torch.cat([model(batch).argmax(1) for batch in images[:count].split(batch_size or count)])
    return (found == targets[:count]).float().mean().item()


def findings(report: Report, *kinds: str) -> list[str]:
    """What a report says of these kinds."""
    return [f"[{f.severity}] {f.sentence}" for f in report.findings if f.kind in kinds]


def story(seed: int = 0) -> dict[str, Any]:
    """Run all steps and return what was measured: ``rows`` of (step, accuracy) and what probe and surgery said."""
    torch.manual_seed(seed)
    learned, first = digits()
    (images, targets), second = digits(contrast=0.4, brightness=1.0)
    rows: dict[str, float] = {}

    model = train(network(), learned, batch_size=50, epochs=10, lr=2e-3)
    rows["trained with batches of 50"] = accuracy(model, first)
    rows["the same on another scanner"] = accuracy(model, second)
    drift = equinorm.probe(model, (images[:256], targets[:256]), nn.CrossEntropyLoss())

    measured = copy.deepcopy(model)
    recalibrate(measured, images.split(100))
    rows["recalibrated there, without labels"] = accuracy(measured, second)
    cured = equinorm.probe(measured, (images[:256], targets[:256]), nn.CrossEntropyLoss())

    rows["normalized by batches of two"] = accuracy(measured, second, batch_size=2)
    small = equinorm.probe(copy.deepcopy(measured).train(), (images[:2], targets[:2]), nn.CrossEntropyLoss())

    swapped = copy.deepcopy(measured)
    swap_plan = swap(swapped, "group", num_groups=8, calibrate=images[:256])
    rows["batch norm swapped for group norm"] = accuracy(swapped, second)
    alone = equinorm.probe(copy.deepcopy(swapped).train(), (images[:2], targets[:2]), nn.CrossEntropyLoss())

    for lr in RATES:
        tuned = train(copy.deepcopy(measured), (images, targets), batch_size=2, epochs=1, lr=lr)
        rows[f"batch norm trained on by twos, rate {lr:g}"] = accuracy(tuned, second)
        recalibrate(tuned, images.split(100))
        rows[f"batch norm, that and recalibrated, {lr:g}"] = accuracy(tuned, second)
        tuned = train(copy.deepcopy(swapped), (images, targets), batch_size=2, epochs=1, lr=lr)
        rows[f"group norm trained on by twos, rate {lr:g}"] = accuracy(tuned, second)

    folded = copy.deepcopy(measured)
    fold_plan = fold(folded, second[0])
    rows["the recalibrated model, folded"] = accuracy(folded, second)
    return {
        "rows": rows, "drift": drift, "cured": cured, "small": small, "alone": alone, "swap": swap_plan, "fold": fold_plan,
    }  # fmt: skip


def table(rows: dict[str, float]) -> str:
    """Steps and accuracies, in percent."""
    return "\n".join(f"{step:<44}{100 * value:6.1f} %" for step, value in rows.items())


def told(result: dict[str, Any]) -> Iterable[str]:
    """What happened, in words, from what was measured."""
    rows = result["rows"]
    yield "What the probe said of the trained model on the other scanner:"
    yield from findings(result["drift"], "running_drift", "train_eval_gap") or ["nothing"]
    yield "and after recalibrating:"
    yield from findings(result["cured"], "running_drift", "train_eval_gap") or ["nothing"]
    yield "Of a training step with two images:"
    yield from findings(result["small"], "small_batch") or ["nothing"]
    yield "and with group norm instead:"
    yield from findings(result["alone"], "small_batch") or ["nothing"]
    for lr in RATES:
        lost = rows[f"batch norm trained on by twos, rate {lr:g}"] - rows["recalibrated there, without labels"]
        ahead = rows[f"group norm trained on by twos, rate {lr:g}"] - rows[f"batch norm trained on by twos, rate {lr:g}"]
        yield (
            f"At rate {lr:g}, training on by twos changed batch norm's accuracy by {100 * lost:+.1f} points; "
            f"group norm ends {100 * ahead:+.1f} points from it."
        )
    yield f"The swap moved outputs by {result['swap'].error:.2g} of the largest, the fold by {result['fold'].error:.2g}."


def main() -> None:
    """Print the table and the findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    result = story(parser.parse_args().seed)
    print(table(result["rows"]), "", *told(result), sep="\n")


if __name__ == "__main__":
    main()
