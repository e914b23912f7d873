"""Parameter groups of an optimizer, when a model's parameters are replaced."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

Exchange = tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]  # parameters of one module by name: before, after


def exchange(optimizer: torch.optim.Optimizer, exchanges: Iterable[Exchange], alive: set[nn.Parameter]) -> list[str]:
    """Take replaced parameters out of the groups, with their state, and put the new ones where the old ones of that name were.

    A new parameter whose name the old module did not have goes to the group of another parameter of that module. Settings of groups
    (learning rate, weight decay) stay. Where none of the old parameters were optimized, neither are the new ones.

    Args:
        optimizer: changed in place.
        exchanges: for each replaced module its parameters before and after, by name.
        alive: parameters of the changed model; an old one among them stays.

    Returns:
        what was done, as sentences for a plan.
    """
    groups = optimizer.param_groups
    lists = [list(group["params"]) for group in groups]
    home = {parameter: index for index, params in enumerate(lists) for parameter in params}
    removed: list[nn.Parameter] = []
    added = 0
    for old, new in exchanges:
        known = [parameter for parameter in old.values() if parameter in home]
        for name, parameter in new.items():
            if parameter in home or not known:
                continue
            before = old.get(name)
            beside = before if before is not None and before in home else known[0]
            index = home[beside]
            at = next((k for k, p in enumerate(lists[index]) if p is beside), len(lists[index]))
            lists[index].insert(at, parameter)
            home[parameter] = index
            added += 1
        removed += [parameter for parameter in known if parameter not in alive and not any(parameter is p for p in removed)]
    gone = set(removed)
    for group, params in zip(groups, lists, strict=True):
        group["params"][:] = [parameter for parameter in params if parameter not in gone]
    for parameter in removed:
        optimizer.state.pop(parameter, None)
    return [f"optimizer: {len(removed)} parameters taken out with their state, {added} put in"]


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by the last part of their name; a parametrized weight's original counts as the weight."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        found.setdefault(parts[parts.index("parametrizations") + 1] if "parametrizations" in parts else parts[-1], parameter)
    return found
