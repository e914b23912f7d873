"""Running statistics that stay as they are while the model trains."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from equinorm.core.running import RunningState
from equinorm.surgery.kinds import Norm, Where, chosen, norms
from equinorm.surgery.plan import Change, Plan, Refusal


def freeze(model: nn.Module, where: Where = None, *, affine: bool = False, dry_run: bool = False) -> Plan:
    """Hold running statistics still, in place: the norms behave as in evaluation, whatever ``model.train()`` says.

    The norms of equinorm have a switch for it, ``frozen``. Norms of torch and their subclasses are put in evaluation mode, and their
    ``train`` is replaced, on the instance, by a function that keeps them there. Classes, parameters, buffers and the keys of the state
    dict stay; ``copy.deepcopy``, ``pickle`` and ``torch.save`` keep the freeze.

    Args:
        model: any module.
        where: which norms, as for :func:`~equinorm.surgery.swap`.
        affine: stop weight and bias, too: ``requires_grad`` becomes False.
        dry_run: work the plan out and change nothing.

    Returns:
        The plan, applied unless ``dry_run``.

    Raises:
        ValueError: no norm matches, or none that does keeps running statistics.

    Example:
        >>> import torch
        >>> from equinorm.surgery import freeze
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> _ = freeze(model)
        >>> _ = model.train()(torch.randn(8, 2))
        >>> model[0].running_mean
        tensor([0., 0.])
    """
    plan = Plan("freeze")
    chosen_norms = _with_statistics(model, where, plan)
    for norm, names in list(chosen_norms.items()):
        if is_frozen(norm.layer):
            plan.refusals.append(Refusal(names, str(norm), "is frozen already"))
            if not affine:
                del chosen_norms[norm]
                continue
        kept = ("weight and bias in training",) if not affine and any(True for _ in norm.layer.parameters()) else ()
        plan.changes.append(Change(names, f"{norm}: frozen" + (" with weight and bias" if affine else ""), kept=kept))
    if dry_run:
        return plan
    for norm in chosen_norms:
        if isinstance(norm.layer, RunningState):
            norm.layer.frozen = True
        elif not is_frozen(norm.layer):
            norm.layer.eval()
            norm.layer.train = partial(stay_in_evaluation, norm.layer)
        if affine:
            norm.layer.requires_grad_(False)
    plan.applied = True
    return plan


def unfreeze(model: nn.Module, where: Where = None, *, affine: bool = False, dry_run: bool = False) -> Plan:
    """Let frozen running statistics move again, in place: the inverse of :func:`freeze`.

    A norm of torch gets back the mode of the model.

    Args:
        model: any module.
        where: which norms, as for :func:`~equinorm.surgery.swap`.
        affine: let weight and bias train again, too.
        dry_run: work the plan out and change nothing.

    Returns:
        The plan, applied unless ``dry_run``.

    Raises:
        ValueError: no norm matches, or none that does keeps running statistics.

    Example:
        >>> import torch
        >>> from equinorm.surgery import freeze, unfreeze
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> _ = freeze(model)
        >>> print(unfreeze(model))
        unfreeze (done): 1 change, 0 refusals
          0: BatchNorm1d(2): learns again
    """
    plan = Plan("unfreeze")
    chosen_norms = _with_statistics(model, where, plan)
    for norm, names in list(chosen_norms.items()):
        if is_frozen(norm.layer) or affine:
            plan.changes.append(Change(names, f"{norm}: learns again"))
        else:
            plan.refusals.append(Refusal(names, str(norm), "is not frozen"))
            del chosen_norms[norm]
    if dry_run:
        return plan
    for norm in chosen_norms:
        if isinstance(norm.layer, RunningState):
            norm.layer.frozen = False
        elif is_frozen(norm.layer):
            del norm.layer.__dict__["train"]
            norm.layer.train(model.training)
        if affine:
            norm.layer.requires_grad_(True)
    plan.applied = True
    return plan


def stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    """What stands in place of ``norm.train`` while it is frozen; whatever the mode, evaluation stays."""
    return norm


def is_frozen(norm: Any) -> bool:
    """Whether a norm has been frozen, by its switch or by :func:`freeze`."""
    train = vars(norm).get("train")
    return bool(getattr(norm, "frozen", False)) or (isinstance(train, partial) and train.func is stay_in_evaluation)


def _with_statistics(model: nn.Module, where: Where, plan: Plan) -> dict[Norm, tuple[str, ...]]:
    """The norms that ``where`` asks for and that training moves; the plan refuses the others.

    Raises:
        ValueError: there are none.
    """
    found = chosen(plan.operation, norms(model), where)
    kept = {}
    for norm, names in found.items():
        layer = norm.layer
        moves = any(name != "num_batches_tracked" for name, _ in layer.named_buffers(recurse=False))
        tracks = getattr(layer, "running_mean", None) is not None and hasattr(layer, "momentum")
        if tracks or (isinstance(layer, RunningState) and moves):
            kept[norm] = names
        elif where is not None:
            plan.refusals.append(Refusal(names, str(norm), "keeps no running statistics"))
    if not kept:
        kinds = sorted({type(norm.layer).__name__ for norm in found})
        raise ValueError(
            f"{plan.operation}: none of the norms in question ({', '.join(kinds)}) keeps running statistics that training moves"
        )
    return kept
