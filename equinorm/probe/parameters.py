"""What is recorded of parameters: size, gradient, what the optimizer's next step would change, and the spectrum of weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.probe.kinds import LINEAR, is_norm
from equinorm.probe.measure import measure
from equinorm.probe.record import Parameter
from equinorm.probe.tensors import real

EXACT = 256  # weights whose smaller side is at most this get all singular values
CLOSE, ITERATIONS = 1e-4, 200  # of the power iteration for larger ones: relative change at which it stops, and at most so many


def described(model: nn.Module) -> list[tuple[Parameter, nn.Parameter]]:
    """One record per parameter tensor, in the model's order, without what a backward pass adds."""
    records: dict[int, tuple[Parameter, nn.Parameter, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{own}" if path else own
            if id(parameter) in records:
                records[id(parameter)][2].append(name)
                continue
            record = Parameter(
                name=name, module=path, module_type=type(module).__name__, role=_role(module, own, parameter), shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."), requires_grad=parameter.requires_grad,
            )  # fmt: skip
            records[id(parameter)] = record, parameter, []
    for record, _, aliases in records.values():
        record.aliases = tuple(aliases)
    return [(record, parameter) for record, parameter, _ in records.values()]


def _role(module: nn.Module, name: str, parameter: Tensor) -> str:
    if is_norm(module):
        return "affine bias" if "bias" in name else "affine weight"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if parameter.numel() == 1:
        return "scalar"
    if parameter.ndim >= 2:
        return "weight"
    return "bias" if "bias" in name or isinstance(module, LINEAR) else "other"


def fill(
    record: Parameter,
    parameter: nn.Parameter,
    gradient: Tensor | None,
    optimizer: torch.optim.Optimizer | None,
    *,
    weights: bool,
    backward: bool,
) -> str:
    """Complete a record after the backward pass. Returns the reason why no step could be tried, "" if there is none."""
    problem = ""
    if real(parameter) and parameter.numel():
        stats = measure(parameter)[0]
        record.rms = stats.rms if stats.finite else float("nan")
    if backward and parameter.requires_grad:
        record.used = gradient is not None
    if gradient is not None:
        record.gradient = measure(gradient)[0]
    group = _group(optimizer, parameter)
    if group is not None:
        record.weight_decay = _number(group.get("weight_decay"))
        record.lr = _number(group.get("lr"))
        if gradient is not None and record.rms > 0:
            assert optimizer is not None
            try:
                record.update = step_size(optimizer, group, parameter, gradient) / record.rms
            except Exception as error:  # noqa: BLE001 - other people's optimizers refuse in many ways, and the probe goes on without them
                problem = f"{type(error).__name__}: {error}"
    if weights and real(parameter) and record.role == "weight" and bool(torch.isfinite(parameter).all()):
        record.spectral_norm, record.stable_rank = spectrum(parameter, transposed="Transpose" in record.module_type)
    return problem


def _group(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> dict[str, Any] | None:
    for group in optimizer.param_groups if optimizer is not None else ():
        if any(p is parameter for p in group["params"]):
            return group
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1) else None


@torch.no_grad()
def step_size(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> float:
    """Root mean square of the change that the optimizer's next step would make to a parameter.

    A copy of the optimizer that holds a copy of this one parameter, with its state, makes the step; the optimizer itself is not touched.
    """
    trial = torch.nn.Parameter(parameter.detach().clone())
    trial.grad = gradient.detach().clone().to(trial.dtype)
    alone = copy.copy(optimizer)
    alone.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}  # schedulers put a counting step over it
    alone.param_groups = [{**{key: copy.deepcopy(value) for key, value in group.items() if key != "params"}, "params": [trial]}]
    alone.state = defaultdict(dict)
    if parameter in optimizer.state:
        alone.state[trial] = copy.deepcopy(optimizer.state[parameter])
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(alone, hooks, {})
    alone.step()
    return measure(trial.detach() - parameter.detach())[0].rms


@torch.no_grad()
def spectrum(weight: Tensor, *, transposed: bool = False) -> tuple[float, float]:
    """Spectral norm and stable rank of a weight as matrix (output units, rest)."""
    matrix = (weight.detach().transpose(0, 1) if transposed else weight.detach()).flatten(1)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if min(matrix.shape) <= EXACT:
        gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
        top = float(torch.linalg.eigvalsh(gram.double())[-1].clamp(min=0).sqrt())
    else:
        v = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
        top = 0.0
        for _ in range(ITERATIONS):
            u = matrix @ (v / v.norm().clamp(min=1e-30))
            v = matrix.mT @ (u / u.norm().clamp(min=1e-30))
            before, top = top, float(v.norm())
            if abs(top - before) <= CLOSE * top:
                break
    frobenius = float(matrix.double().square().sum())
    return top, frobenius / top**2 if top else 0.0
