"""Normalized residuals (nGPT): hidden states and weights live on the unit sphere, and a branch turns the state a little."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from equinorm.core.base import check_count
from equinorm.facts import Facts, Paper
from equinorm.kernels.reference import wide
from equinorm.weight.units import safe_sqrt


def unit_length(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    """``x`` over its Euclidean norm along ``dim``; zeros stay zeros, without NaN in the gradient."""
    return x / safe_sqrt(x.square().sum(dim, keepdim=True)).clamp(min=eps)


class ScaledParameter(nn.Module):
    r"""A parameter stored at a scale of its own: calling the module gives ``stored * init / scale``, which is ``init`` at the start.

    Adam moves stored values by about the learning rate, so that ``scale`` decides how fast the effective value moves relative to others.

    Args:
        shape: of the parameter.
        init: effective value at the start.
        scale: stored value at the start.
        device, dtype: of the parameter.

    Raises:
        ValueError: scale 0.

    Example:
        >>> import torch, equinorm
        >>> s = equinorm.ScaledParameter(2, init=0.05, scale=0.25)
        >>> s.stored.detach(), s().detach()
        (tensor([0.2500, 0.2500]), tensor([0.0500, 0.0500]))

    Source: Loshchilov et al., 2024, arXiv:2410.01131, section 2.5.
    """

    def __init__(
        self, shape: int | tuple[int, ...], init: float, scale: float, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if scale == 0:
            raise ValueError("ScaledParameter: scale must differ from 0: the effective value is stored * init / scale")
        self.init, self.scale = init, scale
        self.stored = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The stored value back to ``scale``."""
        nn.init.constant_(self.stored, self.scale)

    def forward(self) -> Tensor:
        return self.stored * (self.init / self.scale)

    def extra_repr(self) -> str:
        return f"{tuple(self.stored.shape)}, init={self.init}, scale={self.scale:.6g}"


class NormalizedResidual(nn.Module):
    r"""Turn a hidden state of unit length towards a branch's output, by a learned share per dimension, and bring it back to unit length.

    Formula:
        h <- norm(h + |alpha| * (norm(f(h)) - norm(h))),  norm(x) = x / max(||x||, eps)

        alpha is learned, one share per dimension, 0.05 at the start (about 1 over the number of layers), stored at the scale 1 / sqrt(dim).

    Use it when: building a normalized transformer, in place of the residual sum and of every layer norm; with :func:`normalize_weights_`
        after each step, and without weight decay and warm-up.
    Not when: only some parts of the network are normalized: the method needs embeddings, states and weights on the sphere together.
    Known trouble: queries and keys are normalized too, after the rotary embedding, and the softmax scale is then sqrt(head size) instead
        of its inverse. Averages of weights leave the sphere: normalize them again. Where state and branch are opposite and alpha is 1/2,
        the sum is zero and stays zero.

    Args:
        dim: size of the state.
        alpha_init: share at the start.
        alpha_scale: scale it is stored at; None for 1 / sqrt(dim).
        eps: smallest norm that is divided by.
        device, dtype: of alpha.

    Shape: state and branch ``(..., dim)``, same out; half types are computed in float32. Parameter: ``alpha.stored`` (dim,).

    Raises:
        ValueError: ``dim`` below 1, another last dimension, eps not positive.

    Example:
        >>> import torch, equinorm
        >>> h = torch.tensor([1.0, 0.0])
        >>> equinorm.NormalizedResidual(2, alpha_init=0.5)(h, torch.tensor([0.0, 9.0])).detach()
        tensor([0.7071, 0.7071])

    Source: Loshchilov et al., 2024, arXiv:2410.01131, Eq. 10 and 11. The absolute value and the normalization of h inside are in the
        authors' code; that code divides by the norm without a clamp, so that a zero vector gives NaN.
    """

    facts: ClassVar[Facts] = Facts(
        name="normalized_residual",
        title="Normalized Residual (nGPT)",
        paper=Paper(
            authors="Loshchilov et al.",
            title="nGPT: Normalized Transformer with Representation Learning on the Hypersphere",
            year=2024,
            venue="ICLR 2025",
            arxiv="2410.01131",
        ),
        family="residual",
        pools="D",
        invariances=frozenset({"scale", "per-sample"}),
        reads_writes="2R+1W",
    )

    def __init__(
        self,
        dim: int,
        alpha_init: float = 0.05,
        alpha_scale: float | None = None,
        eps: float = 1e-12,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(self, dim=dim)
        if not eps > 0:
            raise ValueError(f"NormalizedResidual: eps must be positive, got {eps}")
        self.dim, self.eps = dim, eps
        self.alpha = ScaledParameter(dim, alpha_init, dim**-0.5 if alpha_scale is None else alpha_scale, device, dtype)

    def forward(self, state: Tensor, branch: Tensor) -> Tensor:
        if state.shape != branch.shape or state.shape[-1:] != (self.dim,):
            raise ValueError(
                f"NormalizedResidual: state and branch must have one shape (..., {self.dim}), got {tuple(state.shape)} and "
                f"{tuple(branch.shape)}"
            )
        h, target = unit_length(wide(state), eps=self.eps), unit_length(wide(branch), eps=self.eps)
        return unit_length(h + wide(self.alpha()).abs() * (target - h), eps=self.eps).to(state.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


@torch.no_grad()
def normalize_weights_(model: nn.Module, plan: Mapping[str, int], eps: float = 1e-12) -> list[str]:
    """Bring weights to unit length along one dimension each, in place: the one whose size is that of the hidden state.

    Args:
        model: whose parameters are normalized.
        plan: dimension by parameter name; shell patterns are understood, the first that matches counts. For a transformer: rows
            (dimension 1) of embeddings, query, key, value and first feed-forward weights, columns (dimension 0) of output projections.
        eps: smallest norm that is divided by.

    Returns:
        The names of the normalized parameters.

    Raises:
        ValueError: a pattern that matches no parameter, or a dimension that a parameter does not have; nothing is changed then.

    Example:
        >>> import torch, equinorm
        >>> model = torch.nn.ModuleDict({"query": torch.nn.Linear(4, 8, bias=False), "out": torch.nn.Linear(8, 4, bias=False)})
        >>> equinorm.normalize_weights_(model, {"out.weight": 0, "*.weight": 1})
        ['query.weight', 'out.weight']
        >>> model["out"].weight.norm(dim=0).allclose(torch.ones(8))
        True

    Source: Loshchilov et al., 2024, arXiv:2410.01131, section 2.6.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    unused = set(plan)
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in plan if fnmatchcase(name, pattern)), None)
        if pattern is None:
            continue
        unused.discard(pattern)
        if not -parameter.ndim <= plan[pattern] < parameter.ndim:
            raise ValueError(f"normalize_weights_: {name} of shape {tuple(parameter.shape)} must have dimension {plan[pattern]}")
        found[name] = parameter, plan[pattern]
    if unused:
        raise ValueError(f"normalize_weights_: every pattern must match a parameter of the model; {', '.join(sorted(unused))} matches none")
    for parameter, dim in found.values():
        parameter.copy_(unit_length(wide(parameter), dim, eps))
    return list(found)


def normalize_after_step(model: nn.Module, optimizer: Optimizer, plan: Mapping[str, int]) -> RemovableHandle:
    """Call :func:`normalize_weights_` now and after every step of ``optimizer``.

    Args:
        model: as for :func:`normalize_weights_`.
        optimizer: trains the model.
        plan: as for :func:`normalize_weights_`.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: as :func:`normalize_weights_`.
    """
    normalize_weights_(model, plan)

    def normalize(*_: Any) -> None:
        normalize_weights_(model, plan)

    return optimizer.register_step_post_hook(normalize)
