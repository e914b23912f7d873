"""Where modules stand in a model, and putting others in their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize


def places(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module and all names that it has in ``model``; a shared module has several. The model itself is called ""."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {module: tuple(of) for module, of in names.items()}


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values of ``replacements`` wherever its keys stand below ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """Which modules hold each parameter; a tied one has several."""
    found: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(parameter, []).append(module)
    return found


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the one that a parametrization puts in front."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def within(modules: set[nn.Module]) -> set[nn.Module]:
    """All modules that stand below one of ``modules``."""
    return {child for module in modules for child in module.modules() if child is not module}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the whole model is in evaluation mode; afterwards every module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
