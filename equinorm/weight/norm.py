"""Weight normalization: every output unit's weights are a length times a direction, and both are trained."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.units import Units, named_weight, register, safe_sqrt, units_of, wide


class _WeightNorm(nn.Module):
    def __init__(self, units: Units | None, eps: float) -> None:
        super().__init__()
        self.units, self.eps = units, eps

    def length(self, unfolded: Tensor) -> Tensor:
        """Norm of every unit, or of the whole tensor."""
        return safe_sqrt(unfolded.square().sum()) if self.units is None else self.units.norm(unfolded)

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        units = self.units or Units()
        direction = units.unfold(wide(v))
        w = wide(g) * (direction / self.length(direction).clamp(min=self.eps))
        return units.fold(w).to(v.dtype)

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        units = self.units or Units()
        w = units.unfold(wide(value))
        length = self.length(w)
        # v = 0 has no direction, and with g = 0 neither would ever receive a gradient: a zero unit starts from the direction of the mean.
        direction = torch.where(length > 0, w, w.numel() ** -0.5)
        return length.to(value.dtype), units.fold(direction).to(value.dtype)

    def extra_repr(self) -> str:
        return "whole tensor" if self.units is None else f"dim={self.units.dim}, eps={self.eps}"


@describes(
    Facts(
        name="weight",
        title="Weight Normalization",
        paper=Paper(
            authors="Salimans and Kingma",
            title="Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
            year=2016,
            venue="NeurIPS",
            arxiv="1602.07868",
            equation="Eq. 2",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"weight-scale", "per-sample"}),
        reads_writes="0R+0W",
    )
)
def weight_norm(module: nn.Module, name: str = "weight", dim: int | Literal["auto"] | None = "auto", eps: float = 1e-12) -> nn.Module:
    r"""Write every output unit's weights as a trained length times a trained direction.

    Formula:
        w = g * v / max(||v||, eps)

        g is one length per output unit, v has the shape of the weight. Registering it keeps the function: g = ||w||, v = w. Gradients:
        dL/dg = <dL/dw, v> / ||v||, and dL/dv is orthogonal to v, so gradient descent lets ||v|| only grow.

    Use it when: no statistics of activations are wanted (recurrent nets, reinforcement learning, generative models, audio vocoders).
    Not when: the scale of the activations must be controlled: only the data-dependent initialisation looks at it, and only once.
    Known trouble: weight decay on v does not change the function, only the effective learning rate; decay g instead. An all-zero v (set by
        hand) gives zero weights and a gradient of g / eps.

    Args:
        module: the layer.
        name: its parameter.
        dim: the dimension that counts the lengths; "auto" for one per output unit (dimension 1 and per group in transposed convolutions,
            where torch counts input channels: ``dim=0`` loads its checkpoints); None for one length of the whole tensor.
        eps: smallest norm that v is divided by.

    Returns:
        The same module; g is ``parametrizations.<name>.original0``, v is ``original1`` (torch's keys; ``<name>_g`` and ``<name>_v`` of
        older checkpoints are understood). Both are new parameters: create the optimizer afterwards. An all-zero unit starts with g = 0 and
        all entries of v equal. Half types are computed in float32.

    Raises:
        ValueError: no such parameter, a dimension the weight does not have, eps not positive, or already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.weight_norm(torch.nn.Linear(2, 1))
        >>> layer.weight = torch.tensor([[3.0, 4.0]])
        >>> layer.parametrizations.weight.original0.item()
        5.0

    Source: Salimans and Kingma, 2016, arXiv:1602.07868, Eq. 2; section 3 is :func:`data_dependent_init_`. The clamp of the norm is ours;
        torch divides by zero.
    """
    if not eps > 0:
        raise ValueError(f"weight_norm: eps must be positive, got {eps}")
    if dim is None:
        named_weight("weight_norm", module, name)
    units = None if dim is None else units_of("weight_norm", module, name, None if dim == "auto" else dim)
    register("weight_norm", module, name, _WeightNorm(units, eps))

    def rename_old_keys(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}{name}_g" in state_dict and f"{prefix}{name}_v" in state_dict:
            state_dict[f"{prefix}parametrizations.{name}.original0"] = state_dict.pop(f"{prefix}{name}_g")
            state_dict[f"{prefix}parametrizations.{name}.original1"] = state_dict.pop(f"{prefix}{name}_v")

    module._register_load_state_dict_pre_hook(rename_old_keys)
    return module
