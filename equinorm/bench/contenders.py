"""Which norms are timed, and beside whom."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import equinorm
from equinorm.bench import formulas

Formula = Callable[..., Tensor]
Builder = Callable[[nn.Module, int], nn.Module]


@dataclass(frozen=True)
class Contender:
    """One method, ours and its peers on the same input with parameters and estimates of the same values.

    Attributes:
        name: in the catalogue.
        geometry: "channel" for inputs (N, C, H, W), "row" for (rows, D).
        ours: from the number of channels or features to our module.
        peers: by name, from our module and that number to a module that computes the same. A peer whose library is not installed is
            left out.
        torch: whether torch has the layer, so that the goals for such layers hold.
        channel_rule: whether it is a rule on the moments per sample and channel and nothing else, so that it should cost what batch norm
            costs.
        extra: further inputs of our forward and of formulas, from x.
        divisor: of the number of channels.
    """

    name: str
    geometry: Literal["channel", "row"]
    ours: Callable[[int], nn.Module]
    peers: dict[str, Builder]
    torch: bool = False
    channel_rule: bool = False
    extra: Callable[[Tensor], tuple[Any, ...]] = field(default=lambda x: ())
    divisor: int = 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the method takes an input of this shape."""
        if self.geometry == "row":
            return len(shape) == 2
        return len(shape) == 4 and shape[1] % self.divisor == 0

    def installed(self) -> dict[str, Builder]:
        """The peers whose library is there."""
        return {name: build for name, build in self.peers.items() if name != "timm" or importlib.util.find_spec("timm")}


class Composed(nn.Module):
    """A published formula with the parameters and buffers of ours."""

    def __init__(self, own: nn.Module, formula: Formula) -> None:
        super().__init__()
        self.formula = formula
        self.names = {name: name.replace(".", "__") for name in own.state_dict()}
        for name, parameter in own.named_parameters():
            self.register_parameter(self.names[name], nn.Parameter(parameter.detach().clone()))
        for name, buffer in own.named_buffers():
            self.register_buffer(self.names.get(name, name), buffer.detach().clone())

    def forward(self, x: Tensor, *extra: Any) -> Tensor:
        state = {name: getattr(self, own) for name, own in self.names.items()}
        return self.formula(x, state, self.training, *extra)


def composed(formula: Formula) -> Builder:
    """A peer that is a formula of tensor operations."""
    return lambda own, size: Composed(own, formula)


def layer(build: Callable[[int], nn.Module], rename: dict[str, str] | None = None) -> Builder:
    """A layer of a library, with the state of ours; ``rename`` maps our names to its where they differ."""

    def made(own: nn.Module, size: int) -> nn.Module:
        other = build(size)
        state = copy.deepcopy(own.state_dict())
        other.load_state_dict({(rename or {}).get(name, name): value.view_as(_at(other, rename, name)) for name, value in state.items()})
        return other

    return made


def _at(module: nn.Module, rename: dict[str, str] | None, name: str) -> Tensor:
    return module.state_dict()[(rename or {}).get(name, name)]


def timm_layer(name: str, rename: dict[str, str], module: str = "timm.layers", **options: Any) -> Builder:
    """A layer of timm; most are found in ``timm.layers``."""

    def build(size: int) -> nn.Module:
        return getattr(importlib.import_module(module), name)(size, **options)

    return layer(build, rename)


def classes(x: Tensor) -> tuple[Tensor]:
    """A class out of ten for each sample."""
    return (torch.arange(x.shape[0]) % 10,)


def condition(x: Tensor) -> tuple[Tensor]:
    """A vector of 64 numbers for each sample."""
    return (torch.linspace(-1, 1, 64 * x.shape[0], dtype=x.dtype).view(-1, 64),)


def style(x: Tensor) -> tuple[Tensor]:
    """A second feature map of the same size and layout."""
    return (x.detach().cos(),)


CONTENDERS = (
    Contender("batch", "channel", equinorm.BatchNorm, {"torch": layer(nn.BatchNorm2d)}, torch=True),
    Contender(
        "instance",
        "channel",
        lambda c: equinorm.InstanceNorm(c, affine=True),
        {"torch": layer(lambda c: nn.InstanceNorm2d(c, affine=True))},
        torch=True,
    ),
    Contender(
        "group", "channel", lambda c: equinorm.GroupNorm(32, c), {"torch": layer(lambda c: nn.GroupNorm(32, c))}, torch=True, divisor=32
    ),
    Contender("layer", "row", equinorm.LayerNorm, {"torch": layer(nn.LayerNorm)}, torch=True),
    Contender("rms", "row", equinorm.RMSNorm, {"torch": layer(nn.RMSNorm)}, torch=True),
    Contender(
        "local_response",
        "channel",
        lambda c: equinorm.LocalResponseNorm(5),
        {"torch": layer(lambda c: nn.LocalResponseNorm(5))},
        torch=True,
    ),
    Contender("switch", "channel", equinorm.SwitchNorm, {"composed": composed(formulas.switch)}, channel_rule=True),
    Contender(
        "batch_channel",
        "channel",
        lambda c: equinorm.BatchChannelNorm(c, 32),
        {"composed": composed(formulas.batch_channel), "torch's two layers": composed(formulas.batch_channel_layers)},
        channel_rule=True,
        divisor=32,
    ),
    Contender("batch_renorm", "channel", equinorm.BatchRenorm, {"composed": composed(formulas.batch_renorm)}, channel_rule=True),
    Contender(
        "ghost_batch",
        "channel",
        lambda c: equinorm.GhostBatchNorm(c, num_splits=4),
        {"torch's layer on each part": composed(formulas.ghost_batch)},
        channel_rule=True,
    ),
    Contender(
        "mean_only_batch", "channel", equinorm.MeanOnlyBatchNorm, {"composed": composed(formulas.mean_only_batch)}, channel_rule=True
    ),
    Contender(
        "evonorm_b",
        "channel",
        equinorm.EvoNormB,
        {"composed": composed(formulas.evonorm_b), "timm": timm_layer("EvoNorm2dB0", {}, eps=1e-5)},
    ),
    Contender(
        "evonorm_s",
        "channel",
        equinorm.EvoNormS,
        {"composed": composed(formulas.evonorm_s), "timm": timm_layer("EvoNorm2dS0", {}, groups=32)},
        divisor=32,
    ),
    Contender(
        "filter_response", "channel", equinorm.FilterResponseNorm, {"composed": composed(formulas.filter_response)}, channel_rule=True
    ),
    Contender(
        "filter_response_tlu",
        "channel",
        equinorm.FilterResponseNormTLU,
        {
            "composed": composed(formulas.filter_response_tlu),
            "timm": timm_layer("FilterResponseNormTlu2d", {"norm.weight": "weight", "norm.bias": "bias", "tlu.tau": "tau"}, eps=1e-6),
        },
    ),
    Contender(
        "global_response",
        "channel",
        lambda c: equinorm.GlobalResponseNorm(c, channel_dim=1),
        {
            "composed": composed(formulas.global_response),
            "timm": timm_layer("GlobalResponseNorm", {}, "timm.layers.grn", channels_last=False),
        },
        channel_rule=True,
    ),
    Contender(
        "layer_scaling", "channel", lambda c: equinorm.LayerScaling(), {"composed": composed(formulas.layer_scaling)}, channel_rule=True
    ),
    Contender("pixel", "channel", lambda c: equinorm.PixelNorm(), {"composed": composed(formulas.pixel)}),
    Contender(
        "positional", "channel", lambda c: equinorm.PositionalNorm(return_moments=False), {"composed": composed(formulas.positional)}
    ),
    Contender("mode", "channel", equinorm.ModeNorm, {"composed": composed(formulas.mode)}, channel_rule=True),
    Contender("mode_group", "channel", equinorm.ModeGroupNorm, {"composed": composed(formulas.mode_group)}, channel_rule=True),
    Contender(
        "conditional_instance",
        "channel",
        lambda c: equinorm.ConditionalInstanceNorm(c, 10),
        {"composed": composed(formulas.conditional_instance)},
        channel_rule=True,
        extra=classes,
    ),
    Contender(
        "decorrelated_batch",
        "channel",
        lambda c: equinorm.DecorrelatedBatchNorm(c, 16),
        {"composed": composed(formulas.decorrelated_batch)},
        divisor=16,
    ),
    Contender("iterative", "channel", lambda c: equinorm.IterNorm(c, 64), {"composed": composed(formulas.iterative)}, divisor=64),
    Contender("local_contrast", "channel", lambda c: equinorm.LocalContrastNorm(), {"composed": composed(formulas.local_contrast)}),
    Contender("generalized_divisive", "channel", equinorm.GeneralizedDivisiveNorm, {"composed": composed(formulas.generalized_divisive)}),
    Contender("thresholded_linear", "channel", equinorm.TLU, {"composed": composed(formulas.thresholded_linear)}),
    Contender("film", "channel", lambda c: equinorm.FiLM(c, 64), {"composed": composed(formulas.film)}, channel_rule=True, extra=condition),
    Contender(
        "adaptive_instance", "channel", equinorm.AdaptiveInstanceNorm, {"composed": composed(formulas.adaptive_instance)}, extra=style
    ),
    Contender(
        "conditional_batch",
        "channel",
        lambda c: equinorm.ConditionalBatchNorm(c, 10),
        {"composed": composed(formulas.conditional_batch)},
        channel_rule=True,
        extra=classes,
    ),
    Contender("scale", "row", equinorm.ScaleNorm, {"composed": composed(formulas.scale)}),
    Contender("dynamic_erf", "row", equinorm.DynamicErf, {"composed": composed(formulas.dynamic_erf)}),
    Contender("dynamic_tanh", "row", equinorm.DynamicTanh, {"composed": composed(formulas.dynamic_tanh)}),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}
