"""Layer-sequential unit variance: what fans and gains only promise, measured on data and set right."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.init.layers import LAYERS, Layer, assign, blocks, checked, identity_of
from equinorm.init.orthogonal import orthogonal_


@torch.no_grad()
def lsuv(
    model: nn.Module,
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layers: Collection[nn.Module] | None = None,
    orthonormal: bool = True,
    tolerance: float = 0.01,
    trials: int = 10,
) -> dict[str, float]:
    r"""Scale the weights so that the output of every linear and convolution layer has standard deviation 1 on a batch.

    Formula:
        in the order of the calls: W <- W / std(y), y the layer's output, until \|std(y) - 1\| <= tolerance

        The standard deviation is over the whole output: samples, channels and positions. One forward pass serves all layers: each is set
        right in the moment it is called, so that the next one sees its new output.

    Use it when: activations, skips or layers are such that no gain is known.
    Not when: norms stand behind the layers: they do the same all the time.
    Known trouble: what the batch does not show is not seen: take one that is typical, normalized as in training.

    Args:
        model: any module, run in the mode that it is in. A compiled or wrapped model: give the original.
        batch: what the model is called with: positional arguments (tuple, list), keywords (mapping), or the one argument (anything else).
        forward: ``forward(model, batch)`` runs the model, where that does not fit.
        layers: modules to scale; None takes all linear and convolution layers that are called.
        orthonormal: start from orthonormal weights and bias 0, as in the paper; False scales the weights that are there.
        tolerance: of the standard deviation.
        trials: how often a layer may be scaled.

    Returns:
        For each layer, by name and in the order of the calls, the standard deviation that its output had before it was scaled. Layers that
        the batch did not reach are missing and unchanged. Buffers, random state and gradients are as before.

    Raises:
        ValueError: no layer was called; the output of a layer is constant or not finite, or cannot be scaled (a parametrization that fixes
            the scale). TypeError: ``layers`` holds another kind. Whatever is raised, the model is as it was before.

    Example:
        >>> import torch, equinorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64))
        >>> x = torch.randn(256, 64)
        >>> list(equinorm.init.lsuv(model, x))
        ['0', '2']
        >>> round(model(x).std().item(), 2)
        1.0

    Source: Mishkin and Matas, 2015, arXiv:1511.06422, Algorithm 1. Its tolerance is 0.1 of the variance,
    and it runs the model once per layer and trial.
    """
    if not tolerance > 0 or trials < 1:
        raise ValueError(f"lsuv: tolerance must be positive and trials at least 1, got {tolerance} and {trials}")
    names = {module: name for name, module in model.named_modules()}
    if layers is not None:
        for layer in layers:
            if layer not in names:
                raise ValueError(f"lsuv: every one of layers must belong to the model, got a {type(layer).__name__} that does not")
    chosen = [checked("lsuv", m, names[m]) for m in (names if layers is None else layers) if layers is not None or isinstance(m, LAYERS)]
    found: dict[str, float] = {}
    done: set[int] = set()
    generator: dict[torch.device, torch.Generator] = {}

    def before(layer: nn.Module, _: Any) -> None:
        assert isinstance(layer, LAYERS)
        if orthonormal and identity_of(layer) not in done:
            device = layer.weight.device
            if device not in generator:
                generator[device] = torch.Generator(device).manual_seed(seed)
            orthogonal_(layer, generator=generator[device])

    def behind(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        assert isinstance(layer, LAYERS)
        if identity_of(layer) in done:
            return output
        done.add(identity_of(layer))
        name = names[layer] or "the model"
        found[name] = std = _std(output, name)
        for _ in range(trials):
            if abs(std - 1) <= tolerance:
                return output
            assign(layer, blocks(layer) / std)
            output = layer.forward(*args, **kwargs)
            std = _std(output, name)
        if abs(std - 1) > tolerance:
            raise ValueError(
                f"lsuv: the output of {name} must reach standard deviation 1, got {std:.3g} after scaling {trials} times; its weight's "
                "scale is fixed by a parametrization, or its bias is too large"
            )
        return output

    # The random numbers of the weights must not be those that come next, so they start from one that is drawn; the model's are given back.
    seed = int(torch.randint(2**62, ()).item())
    with _as_before(model, chosen):
        handles = [layer.register_forward_pre_hook(before) for layer in chosen]
        handles += [layer.register_forward_hook(behind, with_kwargs=True) for layer in chosen]
        try:
            (forward or _call)(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise ValueError(f"lsuv: the batch must reach a linear or convolution layer of {type(model).__name__}, none was called")
    return found


def _std(output: Tensor, name: str) -> float:
    std = output.double().std(correction=0).item() if output.numel() else math.nan
    if not 0 < std < math.inf:
        raise ValueError(f"lsuv: the output of {name} must vary and be finite, got standard deviation {std:.3g} for {tuple(output.shape)}")
    return std


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def _as_before(model: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """Give back buffers and random state; where something is raised, the layers' parameters too."""
    buffers = [(module, name, b, b.clone()) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    parameters = [(p, p.clone()) for layer in layers for p in layer.parameters()]
    devices = {p.device for p, _ in parameters if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    except BaseException:
        for parameter, values in parameters:
            parameter.copy_(values)
        raise
    finally:
        for module, name, tensor, values in buffers:
            module._buffers[name] = tensor
            tensor.copy_(values)
