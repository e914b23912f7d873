"""Adaptive gradient clipping: every unit's gradient is clipped in proportion to the unit's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.units import Units, wide


def unit_norm(x: Tensor, units: Units | None, norm_type: float) -> Tensor:
    """The norm of every output unit of a weight, broadcastable against the unfolded weight; of a vector, its norm as a whole."""
    if units is None:
        return torch.linalg.vector_norm(x, norm_type)
    return torch.linalg.vector_norm(x, norm_type, dim=units.within(x), keepdim=True)


def usual_units(parameter: Tensor) -> Units | None:
    """Units along dimension 0; none for scalars, vectors, and what is a vector but for dimensions of size 1 (a gain (C, 1, 1, 1))."""
    return None if parameter.squeeze().ndim <= 1 else Units()


@describes(
    Facts(
        name="adaptive_gradient_clip",
        title="Adaptive Gradient Clipping",
        paper=Paper(
            authors="Brock et al.",
            title="High-Performance Large-Scale Image Recognition Without Normalization",
            year=2021,
            venue="ICML",
            arxiv="2102.06171",
            equation="Eq. 3",
        ),
        family="residual",
        pools="W",
        invariances=frozenset({"per-sample"}),
        reads_writes="0R+0W",
    )
)
@torch.no_grad()
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
    units: Mapping[Tensor, Units | None] | None = None,
) -> None:
    r"""Clip, in place, the gradient of every output unit to a share of the norm of the unit's weights.

    Formula:
        G_i <- clip_factor * max(||W_i||, eps) / max(||G_i||, 1e-6) * G_i   where ||G_i|| > clip_factor * max(||W_i||, eps)

        i runs over output units: rows, filters; biases and gains count as one unit.

    Use it when: a network without norm layers is to train with large batches and learning rates.
    Not when: norm layers or a global gradient norm do the job; on the last linear layer, which the authors leave out.
    Known trouble: of weights that start at zero eps decides how far the first steps go. It comes after gradients are unscaled and
        averaged over processes, and before weight decay. Not finite gradients stay so: check for them. Parameters that are flattened or
        sharded across units (FSDP's flat parameters) hide the units.

    Args:
        parameters: with gradients; others are skipped.
        clip_factor: largest ratio of the gradient's norm to the weights' norm.
        eps: smallest weight norm to count.
        norm_type: p of the p-norm.
        units: where the units of some parameters lie, None for a parameter that is one unit; by default along dimension 0, and vectors
            are one unit. :class:`AdaptiveGradientClip` fills it from the model.

    Raises:
        ValueError: clip_factor or eps is not positive.

    Example:
        >>> import torch, equinorm
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> w.grad = torch.tensor([[1.0, 0.0], [0.01, 0.0]])
        >>> equinorm.adaptive_clip_grad_(w)
        >>> w.grad
        tensor([[5.0000e-02, 0.0000e+00],
                [1.0000e-05, 0.0000e+00]])

    Source: Brock et al., 2021, arXiv:2102.06171, Eq. 3. A gain of shape (C, 1, 1, 1) counts as the vector that it is, as in the authors'
        code; timm clips it per element.
    """
    if not clip_factor > 0 or not eps > 0:
        raise ValueError(f"adaptive_clip_grad_: clip_factor and eps must be positive, got {clip_factor} and {eps}")
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if p.grad is None:
            continue
        own = units[p] if units is not None and p in units else usual_units(p)
        w, g = (wide(t) if own is None else own.unfold(wide(t)) for t in (p, p.grad))
        largest = clip_factor * unit_norm(w, own, norm_type).clamp(min=eps)
        norm = unit_norm(g, own, norm_type)
        factor = torch.where(norm > largest, largest / norm.clamp(min=1e-6), 1)
        p.grad.copy_(g * factor if own is None else own.fold(g * factor))


class AdaptiveGradientClip:
    """Apply :func:`adaptive_clip_grad_` to a model's parameters, just before every step of an optimizer if one is given.

    It knows the layers: transposed convolutions have their output units along dimension 1 (and per group), an embedding's units are its
    rows, and the layers named in ``exclude`` are left alone.

    Args:
        model: whose parameters are clipped.
        optimizer: hook to its step; None to call :meth:`clip` yourself (after unscaling, under mixed precision).
        exclude: modules to leave out, usually the last linear layer.
        clip_factor, eps, norm_type: those of :func:`adaptive_clip_grad_`.

    Raises:
        ValueError: an excluded module is not part of the model; clip_factor or eps is not positive.

    Example:
        >>> import torch, equinorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clip = equinorm.AdaptiveGradientClip(model, optimizer, exclude=[model[1]])
        >>> model(torch.randn(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> clip.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        exclude: Iterable[nn.Module] = (),
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        norm_type: float = 2.0,
    ) -> None:
        if not clip_factor > 0 or not eps > 0:
            raise ValueError(f"AdaptiveGradientClip: clip_factor and eps must be positive, got {clip_factor} and {eps}")
        inside, left_out = set(model.modules()), set(exclude)
        if foreign := left_out - inside:
            raise ValueError(
                f"AdaptiveGradientClip: excluded modules must be part of the model, {', '.join(type(m).__name__ for m in foreign)} is not"
            )
        skipped = {p for module in left_out for p in module.parameters()}
        self.parameters = [p for p in model.parameters() if p not in skipped]
        self.units: dict[Tensor, Units | None] = {}
        for module in inside:
            if isinstance(module, _ConvTransposeNd) and isinstance(module._parameters.get("weight"), Tensor):
                self.units[module.weight] = Units(dim=1, groups=module.groups)
        self.clip_factor, self.eps, self.norm_type = clip_factor, eps, norm_type
        self.handle: RemovableHandle | None = None
        if optimizer is not None:
            self.handle = optimizer.register_step_pre_hook(lambda *_: self.clip())

    def clip(self) -> None:
        """Clip the gradients that are there."""
        adaptive_clip_grad_(self.parameters, self.clip_factor, self.eps, self.norm_type, self.units)

    def remove(self) -> None:
        """Stop clipping before the optimizer's steps."""
        if self.handle is not None:
            self.handle.remove()
