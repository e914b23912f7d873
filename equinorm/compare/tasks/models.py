"""The models of the built-in tasks: linear layer or convolution, norm, ReLU, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]
WeightLayer = Callable[[nn.Module], nn.Module]


def deep_mlp(
    inputs: int, width: int, depth: int, classes: int, norm_layer: NormLayer, weight_layer: WeightLayer, generator: torch.Generator
) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` features on flat input, ``(N, inputs)`` to ``(N, classes)``."""
    layers: list[nn.Module] = []
    for features in [inputs, *[width] * (depth - 1)]:
        layers += [weight_layer(_he(nn.Linear(features, width), generator)), norm_layer(width), nn.ReLU()]
    return nn.Sequential(*layers, _he(nn.Linear(width, classes), generator))


def vgg(
    stages: Sequence[Sequence[int]],
    classes: int,
    norm_layer: NormLayer,
    weight_layer: WeightLayer,
    generator: torch.Generator,
    channels: int = 3,
) -> nn.Sequential:
    """3x3 convolutions in stages, each followed by 2x2 max pooling; the mean over what is left of the image; one linear layer.

    Args:
        stages: per stage, the channels of its convolutions.
        classes: number of outputs.
        norm_layer: makes the norm after each convolution.
        weight_layer: applied to each convolution.
        generator: draws the initial weights.
        channels: of the image.

    Shape: ``(N, channels, H, W)`` to ``(N, classes)``.
    """
    layers: list[nn.Module] = []
    for stage in stages:
        for width in stage:
            layers += [weight_layer(_he(nn.Conv2d(channels, width, 3, padding=1), generator)), norm_layer(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, _MeanOverPositions(), _he(nn.Linear(channels, classes), generator))


def plain_weights(module: nn.Module) -> nn.Module:
    """The layer as it is."""
    return module


class _MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))  # (N, C)


def _he(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> nn.Module:
    """He et al. 2015, for ReLU: weights of variance 2 / fan_in, no bias."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
