"""One call for all layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from equinorm.init.layers import CONVOLUTIONS, LAYERS, TRANSPOSED, Layer, checked, identity_of
from equinorm.init.orthogonal import delta_orthogonal_, no_delta, orthogonal_
from equinorm.init.scaling import What, he_, lecun_, xavier_
from equinorm.kernels.activations import of_module


def _lecun(layer: nn.Module, _: What, **options: Any) -> None:
    lecun_(layer, **options)


def _delta(layer: nn.Module, activation: What, **options: Any) -> None:
    deep = isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    (delta_orthogonal_ if deep else orthogonal_)(layer, activation, **options)


METHODS: dict[str, Callable[..., None]] = {
    "he": he_,
    "xavier": xavier_,
    "lecun": _lecun,
    "orthogonal": orthogonal_,
    "delta_orthogonal": _delta,
}


def initialize(model: nn.Module, method: str = "he", activation: What | None = None, **options: Any) -> list[str]:
    """Initialise every linear and convolution layer of a model alike.

    Biases become 0. Everything else (norms, embeddings, recurrent and attention parameters) is left; compare the names that come back.
    A weight that two layers share is set once.

    Args:
        model: any module.
        method: "he", "xavier", "lecun", "orthogonal" or "delta_orthogonal" (linear layers orthogonal).
        activation: the network's activation, as for :func:`gain`. None reads it from the model, where all activation modules are of one
            kind; activations called as functions cannot be seen.
        **options: of the method: ``fan``, ``distribution``, ``generator``.

    Returns:
        Names of the layers that were initialised.

    Raises:
        ValueError: unknown method; no activation module, or several kinds, and none was given; a layer that the method cannot initialise
            (all layers are checked before any is changed).

    Example:
        >>> import torch, equinorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 4))
        >>> equinorm.init.initialize(model, "he")
        ['0', '3']

    Source: see the methods.
    """
    if method not in METHODS:
        raise ValueError(f"initialize: method must be one of {', '.join(METHODS)}, got {method!r}")
    layers: dict[int, tuple[str, Layer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            layer = checked("initialize", module, name)
            layers.setdefault(identity_of(layer), (name, layer))
    if not layers:
        raise ValueError(f"initialize: {type(model).__name__} holds no linear or convolution layer")
    if method == "delta_orthogonal":
        for name, layer in layers.values():
            if not isinstance(layer, nn.Linear) and (problem := no_delta(layer)):
                raise ValueError(f"initialize: delta_orthogonal cannot take layer {name}: {problem}")
    activation = "identity" if method == "lecun" else _the_activation(model) if activation is None else activation
    for _, layer in layers.values():
        METHODS[method](layer, activation, **options)
    return [name for name, _ in layers.values()]


def _the_activation(model: nn.Module) -> nn.Module:
    """The one kind of activation module in a model."""
    kinds = {
        repr(module).replace(", inplace=True", "").replace("inplace=True", ""): module
        for module in model.modules()
        if not isinstance(module, nn.Identity) and of_module(module) is not None
    }
    if len(kinds) != 1:
        what = f"holds several kinds of activation: {', '.join(sorted(kinds))}" if kinds else "holds no activation module"
        raise ValueError(
            f'initialize: {type(model).__name__} {what}; say which one counts, such as activation="relu" '
            "(or call he_ on each layer with the activation before it)"
        )
    return next(iter(kinds.values()))
