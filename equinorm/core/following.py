"""What follows a norm: an activation, kept by name so that the module can be copied and pickled."""

from __future__ import annotations

from typing import Any

from equinorm.kernels.activations import Activation, named


def set_activation(module: Any, activation: str | None, parameter: float | None) -> None:
    """Keep what follows the norm, as two plain attributes.

    Raises:
        ValueError: unknown activation, or a parameter for one that has none.
    """
    if activation is None and parameter is not None:
        raise ValueError(f"{type(module).__name__}: activation_param={parameter} needs an activation")
    if activation is not None:
        try:
            named(activation, parameter)
        except ValueError as error:
            raise ValueError(f"{type(module).__name__}: {error}") from None
    module.activation, module.activation_param = activation, parameter


def following(module: Any) -> Activation | None:
    """The activation that follows the norm."""
    return None if module.activation is None else named(module.activation, module.activation_param)


def shown_activation(module: Any) -> str:
    """The activation, for the end of a repr."""
    if module.activation is None:
        return ""
    parameter = "" if module.activation_param is None else f", activation_param={module.activation_param}"
    return f", activation={module.activation!r}{parameter}"
