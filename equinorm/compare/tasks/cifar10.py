"""The task on CIFAR-10: 60000 photographs of 32x32 pixels in ten classes, from a folder that the user names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from equinorm.compare.task import states
from equinorm.compare.tasks.cifar10_files import load, sizes
from equinorm.compare.tasks.classifier import Splits, check_batch_sizes, generator, train
from equinorm.compare.tasks.models import NormLayer, WeightLayer, plain_weights, vgg

VALIDATION_SHARE = 10
STAGES = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]


def _check(batch_sizes: Sequence[int], data: str | None = None, **options: Any) -> None:
    training, _ = sizes(data)
    if training < VALIDATION_SHARE:
        raise ValueError(f"at least {VALIDATION_SHARE} training images are needed to keep some back for validation, got {training}")
    check_batch_sizes(batch_sizes, training - training // VALIDATION_SHARE)


@states(metric="accuracy", check=_check)
def cifar10(
    norm_layer: NormLayer,
    batch_size: int,
    seed: int,
    *,
    data: str | None = None,
    lr: float = 0.025,
    epochs: int = 30,
    weight_layer: WeightLayer = plain_weights,
    device: str = "cpu",
) -> Iterator[dict[str, float]]:
    """CIFAR-10, VGG with 13 convolutions.

    3x3 convolutions in five stages of 64, 128, 256, 512 and 512 channels (convolution, norm, ReLU), 2x2 max pooling after each stage; He
    initialization; SGD with momentum 0.9 and weight decay 5e-4. A tenth of the published training images, always the same, validates; the
    published test images test. Training images are shifted by up to 4 pixels and mirrored at random. By default 30 passes over the training
    data at every batch size. The default learning rate is 0.025 at batch size 64; it is proportional to the batch size and falls to 0 along
    half a cosine. The order of the data and the shifts are drawn from a generator of their own, so they are the same for every norm.
    """
    weights, order = generator(seed), generator(seed + 1)
    model = vgg(STAGES, 10, norm_layer, weight_layer, weights)
    images = _splits(data).to(device)
    mean, std = _mean_and_std(images.train.x)

    def prepare(x: Tensor) -> Tensor:
        return (x.float() - mean) / std

    yield from train(
        model.to(device),
        images,
        batch_size=batch_size,
        epochs=epochs,
        lr=lr,
        order=order,
        weight_decay=5e-4,
        augment=shift_and_mirror,
        prepare=prepare,
    )


def shift_and_mirror(x: Tensor, order: torch.Generator, reach: int = 4) -> Tensor:
    """Move each image by up to ``reach`` pixels in each direction, filling with 0 (the mean colour), and mirror every second one.

    Args:
        x: (N, C, H, W).
        order: draws the shifts and which images are mirrored.
        reach: in pixels.
    """
    n, _, height, width = x.shape
    shifts = torch.randint(2 * reach + 1, (2, n, 1), generator=order)  # (2, N, 1)
    mirrored = torch.rand(n, 1, generator=order) < 0.5
    rows = torch.arange(height) + shifts[0]  # (N, H)
    columns = torch.arange(width) + shifts[1]  # (N, W)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (reach,) * 4)
    sample = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _splits(folder: str | None) -> Splits:
    published_training, test = load(folder)
    shuffled = torch.randperm(len(published_training), generator=generator(0))
    kept_back = len(published_training) // VALIDATION_SHARE
    return Splits(published_training.take(shuffled[kept_back:]), published_training.take(shuffled[:kept_back]), test)


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, (1, 3, 1, 1), from a histogram of the stored bytes: exact, and without a float copy of the data set."""
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    shares = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()  # (3, 256)
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ levels  # (3,)
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float()[None, :, None, None], std.float()[None, :, None, None]
