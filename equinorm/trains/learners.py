"""A small network for every method of the catalogue, built around the method as it is meant to be used.

Three tasks on images of handwritten digits (N, 1, 8, 8): tell the class, remove noise (for methods with a condition), draw the image from
a latent (for the path length penalty). :func:`learner` is the one place that knows which method goes where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import equinorm
from equinorm import catalogue

CLASSES = 10
PIXELS = 64
WIDTH = 16  # channels of maps
FEATURES = 32  # of vectors
NOISE = 0.5  # standard deviation; pixels lie between -1 and 1
CONDITION = 1 + CLASSES  # what a condition vector holds: the noise level and the class


class Learner(nn.Module):
    """A network together with its loss.

    Attributes:
        task: what is learned, in a word.
    """

    task: ClassVar[str]

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        """The training loss on images (N, 1, 8, 8) and their classes (N,), a scalar."""
        raise NotImplementedError

    def attach(self, optimizer: Optimizer) -> None:
        """Hook what the method does around a step of the optimizer; most do nothing."""


class Classifier(Learner):
    """Cross-entropy of the class."""

    task = "classify"

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(self.body(images), classes)


def learner(name: str) -> Learner:
    """The network that shows a method at work.

    Args:
        name: in the catalogue. A method that is not known here must be a layer for maps (N, C, H, W) that needs nothing but the number of
            channels; it then stands behind each convolution.

    Raises:
        ValueError: no such method, or one that needs more and is missing here.
    """
    method: Any = catalogue.resolve(name)
    facts = method.facts
    if facts.name in SPECIAL:
        return SPECIAL[facts.name]()
    if facts.family == "weight":
        return weights(method)
    if facts.pools == "D":
        return vectors(lambda: equinorm.create(facts.name, FEATURES))
    return maps(lambda: equinorm.create(facts.name, WIDTH))


# ---------------------------------------------------------------------------------------------------------------------------------------
# the three common places of a method


def maps(norm: Callable[[], nn.Module], activation: Callable[[], nn.Module] = nn.ReLU) -> Classifier:
    """A method behind each of two convolutions."""
    return Classifier(
        *(nn.Conv2d(1, WIDTH, 3, padding=1), norm(), activation()),
        *(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), norm(), activation()),
        *(nn.Flatten(), nn.Linear(WIDTH * 16, CLASSES)),
    )


def vectors(norm: Callable[[], nn.Module]) -> Classifier:
    """A method behind each of two linear layers."""
    return Classifier(
        nn.Flatten(),
        *(nn.Linear(PIXELS, FEATURES), norm(), nn.ReLU()),
        *(nn.Linear(FEATURES, FEATURES), norm(), nn.ReLU()),
        nn.Linear(FEATURES, CLASSES),
    )


def weights(method: Callable[[nn.Module], nn.Module]) -> Classifier:
    """A method on the weights of all convolutions and linear layers but the last."""
    return Classifier(
        *(method(nn.Conv2d(1, WIDTH, 3, padding=1)), nn.ReLU()),
        *(method(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)), nn.ReLU()),
        *(nn.Flatten(), method(nn.Linear(WIDTH * 16, FEATURES)), nn.ReLU(), nn.Linear(FEATURES, CLASSES)),
    )


class Residual(nn.Module):
    """A residual sum of one's own making: ``add(x, branch(x))``."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], branch: nn.Module) -> None:
        super().__init__()
        self.add, self.branch = add, branch

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.branch(x))


BLOCKS = 3


def blocks(block: Callable[[], nn.Module]) -> Classifier:
    """Residual blocks on vectors."""
    return Classifier(nn.Flatten(), nn.Linear(PIXELS, FEATURES), *(block() for _ in range(BLOCKS)), nn.ReLU(), nn.Linear(FEATURES, CLASSES))


def branch() -> nn.Sequential:
    """The usual branch of a residual block."""
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES))


# ---------------------------------------------------------------------------------------------------------------------------------------
# methods with a condition


class Denoiser(Learner):
    """Removes noise from an image, told how much there is of it and which class is shown.

    Args:
        layers: two conditional layers.
        given: which condition the layers take: "classes", "vector" (noise level and class), or "sketch", the image at a quarter of its
            resolution.
    """

    task = "denoise"

    def __init__(self, layers: list[nn.Module], given: str) -> None:
        super().__init__()
        self.layers, self.given = nn.ModuleList(layers), given
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.middle = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        noisy, vector = corrupted(images, classes)
        condition = {"classes": classes, "vector": vector, "sketch": F.avg_pool2d(images, 2)}[self.given]
        h = self.layers[0](self.stem(noisy), condition).relu()
        h = self.layers[1](self.middle(h), condition).relu()
        return F.mse_loss(self.head(h), images)


class RowDenoiser(Learner):
    """The same on the eight rows of pixels as tokens, with adaptive layer norm."""

    task = "denoise"

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.stem, self.branch, self.head = nn.Linear(8, FEATURES), branch(), nn.Linear(FEATURES, 8)

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        noisy, condition = corrupted(images, classes)
        h = self.stem(noisy.squeeze(1))  # (N, 8, F)
        normed = self.norm(h, condition)
        h = h + (self.branch(normed) if isinstance(normed, Tensor) else normed[1] * self.branch(normed[0]))
        return F.mse_loss(self.head(h.relu()), images.squeeze(1))


def corrupted(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Images with noise of a level drawn per sample, and the condition (N, 11)."""
    level = NOISE * torch.rand(len(images), 1)
    noisy = images + level.view(-1, 1, 1, 1) * torch.randn_like(images)
    return noisy, torch.cat((level, F.one_hot(classes, CLASSES)), 1)


def denoiser(layer: Callable[[], nn.Module], given: str = "vector") -> Denoiser:
    """Two layers with a condition, each behind a convolution."""
    return Denoiser([layer(), layer()], given)


# ---------------------------------------------------------------------------------------------------------------------------------------
# methods with a network of their own


class Recurrent(Learner):
    """Reads an image row by row."""

    task = "classify"

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = layer(8, FEATURES, batch_first=True), nn.Linear(FEATURES, CLASSES)

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        outputs, _ = self.layer(images.squeeze(1))  # (N, 8, F)
        return F.cross_entropy(self.head(outputs[:, -1]), classes)


class Attention(nn.Module):
    """Self-attention among the rows of an image, with normalized queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = equinorm.QKNorm(FEATURES)
        self.project, self.place = nn.Linear(8, 3 * FEATURES), nn.Parameter(0.02 * torch.randn(8, 3 * FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        q, k, v = (self.project(images.squeeze(1)) + self.place).chunk(3, -1)  # each (N, 8, F)
        q, k = self.norm(q, k)
        return F.scaled_dot_product_attention(q, k, v)


class WithReference(Learner):
    """Virtual batch norm: the first batch stays the reference, and goes through the network before every step."""

    task = "classify"
    reference: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.inner = maps(lambda: equinorm.VirtualBatchNorm(WIDTH))

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        if self.reference is None:
            self.reference = images
        with equinorm.virtual_batch(self.inner.body, self.reference):
            return self.inner.loss(images, classes)


class Magnitudes(Classifier):
    """Layers with forced weight normalization, whose stored weights are brought back to unit size after every step."""

    def attach(self, optimizer: Optimizer) -> None:
        equinorm.project_after_step(self, optimizer)


class Clipped(Classifier):
    """Residual blocks without norms; the gradients of all layers but the last are clipped."""

    def attach(self, optimizer: Optimizer) -> None:
        def clip(*_: Any) -> None:
            equinorm.adaptive_clip_grad_([p for layer in list(self.body)[:-1] for p in layer.parameters()], clip_factor=0.1)

        optimizer.register_step_pre_hook(clip)


class Penalized(Classifier):
    """A discriminator of classes, with R1 on the images."""

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        logits = self.body(images)
        return F.cross_entropy(logits, classes) + equinorm.r1_penalty(logits, images, gamma=1e-3)


class Generator(Learner):
    """Draws the image from a latent that an encoder reads off it, with even steps in the latent space."""

    task = "draw"

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 8))
        self.generator = nn.Sequential(nn.Linear(8, FEATURES), nn.Softplus(), nn.Linear(FEATURES, PIXELS), nn.Unflatten(1, (1, 8, 8)))
        self.penalty = equinorm.PathLengthPenalty(weight=0.01)

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        latents = self.encoder(images)
        drawn = self.generator(latents)
        return F.mse_loss(drawn, images) + self.penalty(drawn, latents)


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def minibatch_std() -> Classifier:
    """The batch's deviation as one more channel in front of the head."""
    return Classifier(
        *(nn.Conv2d(1, WIDTH, 3, stride=2, padding=1), nn.ReLU(), equinorm.MinibatchStdDev()),
        *(nn.Flatten(), nn.Linear((WIDTH + 1) * 16, CLASSES)),
    )


def concatenation() -> Learner:
    """Blocks that concatenate, and a layer that brings the width back."""

    def block() -> nn.Module:
        return nn.Sequential(
            Residual(lambda x, b: equinorm.mp_cat(x, b), equinorm.MPLinear(FEATURES, 8)), equinorm.MPLinear(FEATURES + 8, FEATURES)
        )

    return blocks(block)


def standardized() -> Classifier:
    """Convolutions with standardized weights, whose outputs grow with the fan-in, in front of group norms, which take that away."""
    return Classifier(
        *(equinorm.weight_standardization(nn.Conv2d(1, WIDTH, 3, padding=1)), equinorm.GroupNorm(4, WIDTH), nn.ReLU()),
        *(equinorm.weight_standardization(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)), equinorm.GroupNorm(4, WIDTH), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(WIDTH * 16, CLASSES)),
    )


def cosines() -> Classifier:
    """Hidden layers and classes by cosines; those of the classes times 10, or a softmax could not be sure."""
    return Classifier(
        nn.Flatten(),
        *(equinorm.CosineLinear(PIXELS, FEATURES, centered=True), nn.ReLU()),
        equinorm.CosineLinear(FEATURES, CLASSES, scale=10.0),
    )


def fixup() -> Classifier:
    """Three residual branches without norms."""

    def block() -> nn.Module:
        return equinorm.FixupBlock(
            nn.Linear(FEATURES, FEATURES, bias=False), nn.Linear(FEATURES, FEATURES, bias=False), num_branches=BLOCKS
        )

    return blocks(block)


def scaled() -> nn.Module:
    """A residual block whose branch is scaled per feature."""
    return Residual(lambda x, b: x + b, nn.Sequential(branch(), equinorm.LayerScale(FEATURES, init=0.1)))


SPECIAL: dict[str, Callable[[], Learner]] = {
    # norms that need more than a number of channels, or another place
    "group": lambda: maps(lambda: equinorm.GroupNorm(4, WIDTH)),
    "batch_channel": lambda: maps(lambda: equinorm.BatchChannelNorm(WIDTH, num_groups=4)),
    "ghost_batch": lambda: maps(lambda: equinorm.GhostBatchNorm(WIDTH, virtual_batch_size=16)),
    "virtual_batch": WithReference,
    "evonorm_b": lambda: maps(lambda: equinorm.EvoNormB(WIDTH), nn.Identity),
    "evonorm_s": lambda: maps(lambda: equinorm.EvoNormS(WIDTH, groups=4), nn.Identity),
    "filter_response_tlu": lambda: maps(lambda: equinorm.FilterResponseNormTLU(WIDTH), nn.Identity),
    "thresholded_linear": lambda: maps(lambda: equinorm.TLU(WIDTH), nn.Identity),
    "in_place_batch": lambda: maps(lambda: equinorm.InPlaceABN(WIDTH), nn.Identity),
    "layer_lstm": lambda: Recurrent(equinorm.LayerNormLSTM),
    "layer_gru": lambda: Recurrent(equinorm.LayerNormGRU),
    "query_key": lambda: Classifier(Attention(), nn.Flatten(), nn.Linear(8 * FEATURES, CLASSES)),
    # conditional
    "ada_layer": lambda: RowDenoiser(equinorm.AdaLayerNorm(FEATURES, CONDITION)),
    "ada_layer_zero": lambda: RowDenoiser(equinorm.AdaLayerNormZero(FEATURES, CONDITION)),
    "adaptive_instance": lambda: denoiser(lambda: equinorm.AdaptiveInstanceNorm(WIDTH, CONDITION)),
    "conditional_batch": lambda: denoiser(lambda: equinorm.ConditionalBatchNorm(WIDTH, CLASSES), "classes"),
    "conditional_instance": lambda: denoiser(lambda: equinorm.ConditionalInstanceNorm(WIDTH, CLASSES), "classes"),
    "film": lambda: denoiser(lambda: equinorm.FiLM(WIDTH, CONDITION)),
    "spade": lambda: denoiser(lambda: equinorm.SPADE(WIDTH, 1, hidden_channels=WIDTH), "sketch"),
    "modulated": lambda: denoiser(lambda: equinorm.ModulatedConv2d(WIDTH, WIDTH, 3, CONDITION)),
    # weights
    "cosine": cosines,
    "weight_standardization": standardized,
    "forced_weight": lambda: Magnitudes(*weights(equinorm.forced_weight_norm).body),
    # residual sums and what stands in for a norm there
    "deep_norm": lambda: blocks(lambda: Residual(equinorm.DeepNorm(FEATURES, alpha=(2 * BLOCKS) ** 0.25), branch())),
    "dynamic_erf": lambda: vectors(lambda: equinorm.DynamicErf(FEATURES)),
    "dynamic_tanh": lambda: vectors(lambda: equinorm.DynamicTanh(FEATURES)),
    "fixup": fixup,
    "adaptive_gradient_clip": lambda: Clipped(*blocks(lambda: Residual(torch.add, branch())).body),
    "layer_scale": lambda: blocks(scaled),
    "mp_cat": concatenation,
    "mp_silu": lambda: blocks(lambda: nn.Sequential(equinorm.MPLinear(FEATURES, FEATURES), Apply(lambda x: equinorm.mp_silu(x)))),
    "mp_sum": lambda: blocks(lambda: Residual(lambda x, b: equinorm.mp_sum(x, b, 0.3), branch())),
    "normalized_residual": lambda: blocks(lambda: Residual(equinorm.NormalizedResidual(FEATURES, alpha_init=0.3), branch())),
    "rezero": lambda: blocks(lambda: equinorm.ReZero(branch(), branch())),
    "residual_scaling": lambda: blocks(lambda: Residual(lambda x, b: equinorm.variance_preserving_sum(x, b), branch())),
    "skip_init": lambda: blocks(lambda: Residual(equinorm.SkipInit(), branch())),
    # adversarial training
    "discriminator_block": lambda: Classifier(
        *(equinorm.DiscriminatorBlock(1, WIDTH), equinorm.DiscriminatorBlock(WIDTH, FEATURES)),
        *(nn.Flatten(), nn.Linear(4 * FEATURES, CLASSES)),
    ),
    "r1_penalty": lambda: Penalized(*maps(nn.Identity).body),
    "minibatch_std": minibatch_std,
    "path_length_penalty": Generator,
}
