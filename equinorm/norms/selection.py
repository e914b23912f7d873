"""Selecting with sparse switchable norms: the schedule of the radius, and the fixed form after the last choice."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from equinorm.norms.sparse_switch import SparseSwitchNorm

M = TypeVar("M", bound=nn.Module)


class SparsestMaxScheduler:
    """Grow the radius of every :class:`SparseSwitchNorm` in a model, linearly from 0, as a learning rate is scheduled.

    Args:
        model: holds the norms.
        total_steps: steps until the radius stands at its end; the authors count every iteration of training.
        r_max: the radius at the end. None for sqrt((K - 1) / K) with K candidates, where the last choice falls; the authors' code goes on
            to 1.

    Raises:
        ValueError: a model without such norms, no steps, or a negative radius.

    Example:
        >>> import equinorm
        >>> norm = equinorm.SparseSwitchNorm(8)
        >>> schedule = equinorm.SparsestMaxScheduler(norm, total_steps=2)
        >>> schedule.step()
        >>> norm.radius
        tensor(0.4082)
    """

    def __init__(self, model: nn.Module, total_steps: int, r_max: float | None = None) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, SparseSwitchNorm)]
        if not self.norms:
            raise ValueError(f"SparsestMaxScheduler: the model must hold a SparseSwitchNorm, found none in {type(model).__name__}")
        if total_steps < 1:
            raise ValueError(f"SparsestMaxScheduler: total_steps must be at least 1, got {total_steps}")
        if r_max is not None and not r_max >= 0:
            raise ValueError(f"SparsestMaxScheduler: r_max must be at least 0, or None, got {r_max}")
        self.total_steps, self.r_max, self.last_step = total_steps, r_max, 0
        self._set()

    def step(self) -> None:
        """Count one step and set the radius of every norm."""
        self.last_step += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """The settings and the count of steps."""
        return {"total_steps": self.total_steps, "r_max": self.r_max, "last_step": self.last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state_dict` was taken."""
        self.total_steps, self.r_max, self.last_step = state["total_steps"], state["r_max"], state["last_step"]
        self._set()

    def _set(self) -> None:
        for norm in self.norms:
            end = norm.circumradius if self.r_max is None else self.r_max
            norm.set_radius(end * min(self.last_step / self.total_steps, 1.0))


def ssn_to_fixed(model: M) -> M:
    """Let every :class:`SparseSwitchNorm` of a model compute only the statistics that it chose, and return the model.

    Call it when the radius has reached its end; what the model computes does not change. Loading a state dict opens the norms again.

    Args:
        model: changed in place.

    Raises:
        ValueError: norms that have not settled, all of them named; nothing is changed then.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, SparseSwitchNorm)}
    unsettled = [name or type(model).__name__ for name, norm in norms.items() if None in norm.choices().values()]
    if unsettled:
        raise ValueError(
            f"ssn_to_fixed: every SparseSwitchNorm must have settled on its statistics, but {', '.join(unsettled)} did not; train on with "
            "a SparsestMaxScheduler until its last step, and one step more"
        )
    for norm in norms.values():
        norm.fix()
    return model
