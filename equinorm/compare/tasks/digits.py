"""The tasks on scikit-learn's handwritten digits: 1797 images of 8x8 pixels, which come with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits

from equinorm.compare.task import states
from equinorm.compare.tasks.classifier import Samples, Splits, check_batch_sizes, generator, train
from equinorm.compare.tasks.models import NormLayer, WeightLayer, deep_mlp, plain_weights, vgg

TRAINING, VALIDATION = 1024, 373  # leaves 400 for the test


def _check(batch_sizes: Sequence[int], **options: Any) -> None:
    check_batch_sizes(batch_sizes, TRAINING)


@states(metric="accuracy", check=_check)
def digits_mlp(
    norm_layer: NormLayer,
    batch_size: int,
    seed: int,
    *,
    lr: float = 0.025,
    epochs: int = 4,
    depth: int = 10,
    width: int = 128,
    weight_layer: WeightLayer = plain_weights,
    device: str = "cpu",
) -> Iterator[dict[str, float]]:
    """Handwritten digits, deep multilayer perceptron.

    Hidden layers (linear, norm, ReLU) on flat input, by default 10 of 128 features; He initialization; SGD with momentum 0.9. 1024 images
    train, 373 validate, 400 test; the split is the same for all. By default 4 passes over the training data at every batch size. The
    default learning rate is 0.025 at batch size 64; it is proportional to the batch size and falls to 0 along half a cosine. It was chosen
    once, because at 0.05 the model without norms learns less at batch size 64. The order of the data is drawn from a generator of its own,
    so it is the same for every norm. Features are vectors without positions, so norms over positions cannot be used.
    """
    weights, order = generator(seed), generator(seed + 1)
    model = deep_mlp(64, width, depth, 10, norm_layer, weight_layer, weights)
    images = _splits()
    flat = Splits(*(Samples(part.x.flatten(1), part.y) for part in (images.train, images.validation, images.test)))
    yield from train(model.to(device), flat.to(device), batch_size=batch_size, epochs=epochs, lr=lr, order=order)


@states(metric="accuracy", check=_check)
def digits(
    norm_layer: NormLayer,
    batch_size: int,
    seed: int,
    *,
    lr: float = 0.025,
    epochs: int = 3,
    weight_layer: WeightLayer = plain_weights,
    device: str = "cpu",
) -> Iterator[dict[str, float]]:
    """Handwritten digits, small VGG.

    Six 3x3 convolutions with 32, 32, 64, 64, 128 and 128 channels (convolution, norm, ReLU), 2x2 max pooling after every second; He
    initialization; SGD with momentum 0.9. 1024 images train, 373 validate, 400 test; the split is the same for all. By default 3 passes
    over the training data at every batch size. The default learning rate is 0.025 at batch size 64; it is proportional to the batch size
    and falls to 0 along half a cosine. The order of the data is drawn from a generator of its own, so it is the same for every norm.
    """
    weights, order = generator(seed), generator(seed + 1)
    model = vgg([[32, 32], [64, 64], [128, 128]], 10, norm_layer, weight_layer, weights, channels=1)
    yield from train(model.to(device), _splits().to(device), batch_size=batch_size, epochs=epochs, lr=lr, order=order)


def _splits() -> Splits:
    """The images, from -1 to 1, in the order of a fixed shuffle."""
    pixels, classes = load_digits(return_X_y=True)  # (N, 64) from 0 to 16, (N,)
    everything = Samples(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(classes).long())
    shuffled = torch.randperm(len(everything), generator=generator(0))
    train, validation, test = shuffled.split([TRAINING, VALIDATION, len(everything) - TRAINING - VALIDATION])
    return Splits(everything.take(train), everything.take(validation), everything.take(test))
