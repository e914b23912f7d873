"""Fixup: an initialisation, scalar biases and a scalar factor that let residual networks train without norm layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts, Paper


@torch.no_grad()
def fixup_init_(
    branches: Iterable[Sequence[nn.Module]], classifier: nn.Module | None = None, mode: Literal["fan_in", "fan_out"] = "fan_out"
) -> None:
    r"""Initialise the weight layers of all residual branches of a network so that one step of SGD changes its function by a bounded amount.

    The last layer of every branch is set to 0; the others to He's initialisation times L^(-1 / (2m - 2)), with L branches in the network
    and m weight layers in the branch (2: L^(-1/2), 3: L^(-1/4)). The classifier's weight and bias are set to 0. A branch of one layer is
    0.

    Args:
        branches: for every residual branch its weight layers in order (``Linear``, ``Conv``).
        classifier: the network's last layer, or None to leave it.
        mode: which fan He's initialisation takes.

    Raises:
        ValueError: no branch, an empty branch, or a layer without a weight of at least 2 dimensions.

    Example:
        >>> import torch, equinorm
        >>> branch = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
        >>> equinorm.fixup_init_([branch] * 4)
        >>> branch[1].weight.any().item()
        False

    Source: Zhang, Dauphin and Ma, 2019, arXiv:1901.09321, section 3, rules 1 and 2; He's initialisation over the fan-out, as in the code.
    """
    every = [list(branch) for branch in branches]
    if not every:
        raise ValueError("fixup_init_: there must be at least one branch, got none")
    for branch in every:
        _check_branch("fixup_init_", branch)
    for branch in every:
        _init_branch(branch, len(every), mode)
    if classifier is not None:
        _zero(classifier)


def _check_branch(method: str, layers: Sequence[nn.Module]) -> None:
    weights = [getattr(layer, "weight", None) for layer in layers]
    if not weights or any(not isinstance(weight, Tensor) or weight.ndim < 2 for weight in weights):
        came = ", ".join(type(layer).__name__ for layer in layers) or "none"
        raise ValueError(f"{method}: a branch must hold at least one layer, each with a weight of at least 2 dimensions; got {came}")


@torch.no_grad()
def _init_branch(layers: Sequence[nn.Module], branches: int, mode: Literal["fan_in", "fan_out"]) -> None:
    for layer in layers[:-1]:
        weight: Any = layer.weight
        nn.init.kaiming_normal_(weight, mode=mode, nonlinearity="relu")
        weight.mul_(branches ** (-1 / (2 * len(layers) - 2)))
    _zero(layers[-1])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        parameter.zero_()


def fixup_parameter_groups(model: nn.Module, lr: float, scalar_factor: float = 0.1, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: parameters of one element learn at ``scalar_factor`` times the rate, without weight decay.

    Args:
        model: contains scalars (Fixup, SkipInit, ReZero).
        lr: learning rate of all other parameters.
        scalar_factor: that of the scalars relative to it.
        **options: further options of the other parameters, such as ``weight_decay``.

    Returns:
        Two groups, weights and scalars.

    Example:
        >>> import torch, equinorm
        >>> groups = equinorm.fixup_parameter_groups(equinorm.ReZero(torch.nn.Linear(2, 2)), lr=0.1, weight_decay=1e-4)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
        [(2, 0.1, 0.0001), (1, 0.010000000000000002, 0.0)]
    """
    scalars = [p for p in model.parameters() if p.numel() == 1]
    others = [p for p in model.parameters() if p.numel() != 1]
    return [{"params": others, "lr": lr, **options}, {"params": scalars, "lr": lr * scalar_factor, "weight_decay": 0.0}]


class FixupBlock(nn.Module):
    r"""A residual block with Fixup: no norm layer, a scalar bias before every layer and activation, one scalar factor, zero at the start.

    Formula:
        z = x + b_0;  z = layer_1(z);  z = layer_j(act(z + b) + b') for j > 1;  y = act(shortcut(x) + s z + b'')

        Scalars b start at 0 and s at 1; weights as in :func:`fixup_init_`: the last layer 0, so that a fresh block passes its shortcut on.

    Use it when: a residual network (up to thousands of layers) is to train without any norm, for instance with batches of one.
    Not when: regularisation is missing: without batch norm's noise the authors need mixup on large data sets.
    Known trouble: the scalars learn at a tenth of the learning rate and without weight decay (``fixup_parameter_groups``). At the first
        step only the last layer of the branch receives a gradient. The layers' own biases are superfluous.

    Args:
        *layers: the weight layers of the branch, without bias, in order; a block initialises them.
        num_branches: L, how many residual branches the whole network has.
        shortcut: what the input passes on the other way, or None. It receives x + b_0, as in the authors' code.
        activation: elementwise function between the layers and behind the sum.
        final_activation: False leaves out the one behind the sum.
        mode: which fan He's initialisation takes.

    Shape: that of the last layer's output.

    Raises:
        ValueError: no layer, a layer without a weight of at least 2 dimensions, or ``num_branches`` below 1.

    Example:
        >>> import torch, equinorm
        >>> block = equinorm.FixupBlock(torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(4, 2, bias=False), num_branches=16)
        >>> block(torch.tensor([1.0, 2.0])).detach()
        tensor([1., 2.])

    Source: Zhang, Dauphin and Ma, 2019, arXiv:1901.09321, section 3. The order of biases is that of the authors' code.
    """

    facts: ClassVar[Facts] = Facts(
        name="fixup",
        title="Fixup",
        paper=Paper(
            authors="Zhang, Dauphin and Ma",
            title="Fixup Initialization: Residual Learning Without Normalization",
            year=2019,
            venue="ICLR",
            arxiv="1901.09321",
            equation="section 3",
        ),
        family="residual",
        pools="",
        invariances=frozenset({"per-sample"}),
        reads_writes="2R+1W",
    )

    def __init__(
        self,
        *layers: nn.Module,
        num_branches: int,
        shortcut: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
        final_activation: bool = True,
        mode: Literal["fan_in", "fan_out"] = "fan_out",
    ) -> None:
        super().__init__()
        _check_branch("FixupBlock", layers)
        if num_branches < 1:
            raise ValueError(f"FixupBlock: num_branches must be at least 1, got {num_branches}")
        self.layers, self.shortcut = nn.ModuleList(layers), shortcut
        self.activation, self.final_activation = activation, final_activation
        _init_branch(layers, num_branches, mode)
        options = {"device": layers[0].weight.device, "dtype": layers[0].weight.dtype}  # type: ignore[union-attr]
        self.before_layer = nn.ParameterList(torch.zeros(1, **options) for _ in layers)  # type: ignore[arg-type]
        self.before_activation = nn.ParameterList(torch.zeros(1, **options) for _ in layers[1:])  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.ones(1, **options))  # type: ignore[arg-type]
        self.after = nn.Parameter(torch.zeros(1, **options))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        start = x + self.before_layer[0].to(x.dtype)
        z = self.layers[0](start)
        for layer, bias, shift in zip(list(self.layers)[1:], self.before_activation, list(self.before_layer)[1:], strict=True):
            z = layer(self.activation(z + bias.to(z.dtype)) + shift.to(z.dtype))
        z = z * self.scale.to(z.dtype) + self.after.to(z.dtype)
        y = z + (x if self.shortcut is None else self.shortcut(start))
        return self.activation(y) if self.final_activation else y
