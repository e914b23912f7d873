"""Generalized divisive normalization, its approximate inverse, and the simplified form."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import check_channels, check_count
from equinorm.core.precision import without_autocast
from equinorm.core.roots import power
from equinorm.facts import Facts, Paper
from equinorm.kernels.reference import wide

PEDESTAL = 2.0**-36  # keeps the root that parameters are stored as away from zero, where its derivative vanishes


def generalized_divisive(x: Tensor, beta: Tensor, gamma: Tensor, alpha: float, epsilon: float, inverse: bool) -> Tensor:
    """Divide (or multiply) each channel by a weighted sum of the powers of all channels at the same position."""
    powers = x.square() if alpha == 2 else x.abs() if alpha == 1 else x.abs().pow(alpha)
    powers = powers.flatten(2) if x.ndim > 2 else powers.unsqueeze(2)  # (N, C, S)
    with without_autocast(x):
        pool = torch.baddbmm(beta.unsqueeze(1), gamma.expand(x.shape[0], -1, -1), powers).view_as(x)
    return x * power(pool, epsilon if inverse else -epsilon)


class GeneralizedDivisiveNorm(nn.Module):
    """Divide each channel by a learned combination of the magnitudes of all channels at the same position.

    Formula:
        y_i = x_i / (beta_i + sum_j gamma_ij |x_j|^alpha)^epsilon at every position; with ``inverse`` the power multiplies instead.

        alpha = 2, epsilon = 1/2 is the classic form (GDN), alpha = epsilon = 1 the simplified one (GDN1). beta (C,) at least beta_min and
        gamma (C, C) at least 0 are stored as roots: v = max(p, sqrt(min + 2^-36))^2 - 2^-36. The bound lets a gradient pass where p is
        above it or where descent would raise p, so that a parameter can come back from its bound.

    Use it when: an image codec or a density model needs local gain control that makes responses nearly Gaussian and independent.
    Not when: activations must have a fixed scale: nothing is measured, only divided.
    Known trouble: the inverse form is one step of a fixed-point iteration, not the inverse map. Weight decay pulls the stored roots towards
        their bounds. TensorFlow Compression stores gamma transposed (input, output) and defaults to alpha = epsilon = 1. Keep the
        parameters in float32: steps of training are far below the resolution of half types.

    Args:
        num_features: C.
        inverse: multiply instead of divide (IGDN), for decoders.
        beta_min: smallest beta, positive.
        gamma_init: gamma starts as this number times the identity.
        alpha: exponent of the magnitudes, at least 1 (below, its slope at 0 is infinite).
        epsilon: exponent of the sum, positive.
        rectify: apply a ReLU to the input first.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.GeneralizedDivisiveNorm(2)
        >>> norm(torch.tensor([[3.0, -4.0]])).detach()  # 3 / sqrt(1 + 0.1 * 9), -4 / sqrt(1 + 0.1 * 16)
        tensor([[ 2.1764, -2.4807]])

    Source: Ballé, Laparra and Simoncelli 2015, section 3, with one exponent for all channels as in Ballé et al. 2016 (arXiv:1611.01704);
    GDN1 from Johnston et al. 2019 (arXiv:1912.08771). Parametrisation, names and index order are those of CompressAI, whose checkpoints
    load.
    """

    facts: ClassVar[Facts] = Facts(
        name="generalized_divisive",
        title="Generalized Divisive Normalization (GDN)",
        paper=Paper(
            authors="Ballé, Laparra and Simoncelli",
            title="Density Modeling of Images using a Generalized Normalization Transformation",
            year=2015,
            venue="ICLR 2016",
            arxiv="1511.06281",
            equation="section 3",
        ),
        family="local",
        pools="C",
        invariances=frozenset({"per-sample"}),
    )

    def __init__(
        self,
        num_features: int,
        inverse: bool = False,
        beta_min: float = 1e-6,
        gamma_init: float = 0.1,
        alpha: float = 2.0,
        epsilon: float = 0.5,
        rectify: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(self, num_features=num_features)
        for name, value, least, wanted in (
            ("beta_min", beta_min, None, "positive"),
            ("gamma_init", gamma_init, 0, "at least 0"),
            ("alpha", alpha, 1, "at least 1"),
            ("epsilon", epsilon, None, "positive"),
        ):
            if not (value > 0 if least is None else value >= least) or value == float("inf"):
                raise ValueError(f"GeneralizedDivisiveNorm: {name} must be finite and {wanted}, got {value}")
        self.num_features, self.inverse, self.beta_min, self.gamma_init = num_features, inverse, beta_min, gamma_init
        self.alpha, self.epsilon, self.rectify = alpha, epsilon, rectify
        self.beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.gamma = nn.Parameter(torch.empty(num_features, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm for ``channels`` channels with its default settings, as the catalogue builds it."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """Beta 1, gamma ``gamma_init`` times the identity."""
        with torch.no_grad():
            self.beta.fill_((1 + PEDESTAL) ** 0.5)
            self.gamma.fill_(PEDESTAL**0.5)
            self.gamma.fill_diagonal_((self.gamma_init + PEDESTAL) ** 0.5)

    def constrained(self) -> tuple[Tensor, Tensor]:
        """Beta (C,) and gamma (C, C) as they enter the formula; the parameters of these names are their stored roots."""
        return _constrained(self.beta, self.beta_min), _constrained(self.gamma, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.num_features)
        data = wide(x).relu() if self.rectify else wide(x)
        beta, gamma = (value.to(data.dtype) for value in self.constrained())
        return generalized_divisive(data, beta, gamma, self.alpha, self.epsilon, self.inverse).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in [key for key in state_dict if key.startswith((f"{prefix}beta_reparam.", f"{prefix}gamma_reparam."))]:
            del state_dict[name]  # constants that CompressAI keeps as buffers
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        options = f"inverse={self.inverse}, alpha={self.alpha}, epsilon={self.epsilon}"
        return f"{self.num_features}, {options}" + ", rectify=True" * self.rectify


def _constrained(root: Tensor, least: float) -> Tensor:
    return _LowerBound.apply(wide(root), (least + PEDESTAL) ** 0.5).square() - PEDESTAL


class _LowerBound(torch.autograd.Function):
    """``max(p, bound)`` through which a gradient also passes where following it would raise p."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, bound: float) -> Tensor:
        return p.clamp(min=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        p, bound = inputs
        ctx.save_for_backward(p >= bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        return torch.where(above | (grad < 0), grad, 0), None
