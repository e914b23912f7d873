"""DeepNorm: a layer norm behind a residual sum whose skip is boosted, with weights that start smaller; for very deep transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equinorm.core.base import check_eps, check_trailing
from equinorm.core.row import row_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import wide


class DeepNormConstants(NamedTuple):
    """alpha and beta of the encoder and of the decoder; None for a part that the model does not have."""

    encoder_alpha: float | None
    encoder_beta: float | None
    decoder_alpha: float | None
    decoder_beta: float | None


def deepnorm_constants(encoder_layers: int = 0, decoder_layers: int = 0) -> DeepNormConstants:
    """The constants of DeepNorm for a transformer of N encoder and M decoder layers.

    =================  ==================  =======================  ============  =============
    model              encoder alpha       encoder beta             decoder alpha decoder beta
    =================  ==================  =======================  ============  =============
    encoder only       (2N)^(1/4)          (8N)^(-1/4)
    decoder only                                                    (2M)^(1/4)    (8M)^(-1/4)
    both               0.81 (N^4 M)^(1/16) 0.87 (N^4 M)^(-1/16)     (3M)^(1/4)    (12M)^(-1/4)
    =================  ==================  =======================  ============  =============

    Args:
        encoder_layers: N.
        decoder_layers: M.

    Raises:
        ValueError: negative numbers, or no layer at all.

    Example:
        >>> import equinorm
        >>> constants = equinorm.deepnorm_constants(decoder_layers=12)
        >>> round(constants.decoder_alpha, 6), round(constants.decoder_beta, 6)
        (2.213364, 0.319472)

    Source: Wang et al., 2022, arXiv:2203.00555, Figure 2. The authors' code divides by 1.15 where the paper says 0.87.
    """
    n, m = encoder_layers, decoder_layers
    if n < 0 or m < 0 or n + m == 0:
        raise ValueError(f"deepnorm_constants: the numbers of layers must be at least 0 and not both 0, got {n} and {m}")
    if m == 0:
        return DeepNormConstants((2 * n) ** 0.25, (8 * n) ** -0.25, None, None)
    if n == 0:
        return DeepNormConstants(None, None, (2 * m) ** 0.25, (8 * m) ** -0.25)
    mixed = (n**4 * m) ** (1 / 16)
    return DeepNormConstants(0.81 * mixed, 0.87 / mixed, (3 * m) ** 0.25, (12 * m) ** -0.25)


SCALED_NAMES = frozenset({"linear1", "linear2", "fc1", "fc2", "v_proj", "value_proj", "out_proj", "o_proj"})


@torch.no_grad()
def deepnorm_init_(model: nn.Module, beta: float, scaled: Callable[[str], bool] | None = None) -> list[str]:
    """Initialise a transformer's linear layers by Glorot's rule, those of values, outputs and feed-forward parts with gain ``beta``.

    Biases become 0. Of the packed projection of ``torch.nn.MultiheadAttention`` the query and key thirds get gain 1, the value third
    ``beta``. Call it on the encoder with its beta and on the decoder with its own.

    Args:
        model: contains ``Linear`` and ``MultiheadAttention`` modules.
        beta: see :func:`deepnorm_constants`.
        scaled: says by the name of a linear layer whether it gets ``beta``; by default whether the last part of the name is one of
            linear1, linear2, fc1, fc2, v_proj, value_proj, out_proj, o_proj. All others get gain 1.

    Returns:
        Names of the weights that got ``beta``.

    Raises:
        ValueError: ``beta`` is not positive, or no layer would get it.

    Example:
        >>> import torch, equinorm
        >>> equinorm.deepnorm_init_(torch.nn.TransformerEncoderLayer(8, 2), beta=0.5)
        ['self_attn.in_proj_weight', 'self_attn.out_proj.weight', 'linear1.weight', 'linear2.weight']

    Source: Wang et al., 2022, arXiv:2203.00555, Figure 2. The authors' code finds layers by substrings of parameter names and divides
        whatever initialisation is there.
    """
    if not beta > 0:
        raise ValueError(f"deepnorm_init_: beta must be positive, got {beta}")
    wanted = scaled or (lambda name: name.rpartition(".")[2] in SCALED_NAMES)
    found = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                for third, gain in zip(module.in_proj_weight.chunk(3), (1.0, 1.0, beta), strict=True):
                    nn.init.xavier_normal_(third, gain)
                found.append(f"{prefix}in_proj_weight")
            else:
                for part, gain in (("q_proj_weight", 1.0), ("k_proj_weight", 1.0), ("v_proj_weight", beta)):
                    nn.init.xavier_normal_(getattr(module, part), gain)
                found.append(f"{prefix}v_proj_weight")
            if module.in_proj_bias is not None:
                nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            gets_beta = wanted(name)
            nn.init.xavier_normal_(module.weight, beta if gets_beta else 1.0)
            found += [f"{prefix}weight"] * gets_beta
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if not found:
        names = ", ".join(sorted(SCALED_NAMES))
        raise ValueError(
            f"deepnorm_init_: at least one linear layer of {type(model).__name__} must get beta, found none; pass scaled=, which says so "
            f"by name (the default looks for {names})"
        )
    return found


class DeepNorm(nn.Module):
    r"""Layer norm of a residual sum whose skip is boosted by a constant.

    Formula:
        y = LayerNorm(alpha * x + G(x))

        with alpha from :func:`deepnorm_constants` and the weights of G initialised by :func:`deepnorm_init_`.

    Use it when: a transformer is so deep (hundreds of layers) that post-norm diverges, and pre-norm's loss in quality is not acceptable.
    Not when: the network is not initialised with the matching beta: alpha alone does not bound the update.
    Known trouble: alpha is a constant of the module and not in the state dict: build the model with the same number of layers. A widespread
        copy multiplies G(x) instead of x, which is the opposite of the method.

    Args:
        normalized_shape: the last dimensions.
        alpha: factor of the skip.
        eps: added to the variance.
        elementwise_affine: learn ``weight`` (1) and ``bias`` (0).
        device, dtype: of the parameters.

    Shape: x and G(x), ``(..., *normalized_shape)``, same out. mask: boolean, broadcastable to x, as in :class:`equinorm.LayerNorm`.

    Raises:
        TypeError: the input is not floating point.
        ValueError: x and G(x) of different shapes, another trailing shape, alpha not positive, eps negative.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.DeepNorm(4, alpha=equinorm.deepnorm_constants(decoder_layers=8).decoder_alpha)
        >>> norm(torch.randn(2, 4), torch.randn(2, 4)).shape
        torch.Size([2, 4])

    Source: Wang et al., 2022, arXiv:2203.00555, section 3.
    """

    facts: ClassVar[Facts] = Facts(
        name="deep_norm",
        title="DeepNorm",
        paper=Paper(
            authors="Wang et al.",
            title="DeepNet: Scaling Transformers to 1,000 Layers",
            year=2022,
            venue="TPAMI 2024",
            arxiv="2203.00555",
            equation="section 3",
        ),
        family="residual",
        pools="D",
        invariances=frozenset({"shift", "per-sample"}),
        reads_writes="3R+1W",
    )

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        alpha: float,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < alpha < math.inf:
            raise ValueError(f"DeepNorm: alpha must be positive and finite, got {alpha}")
        check_eps(self, eps)
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.alpha, self.eps, self.elementwise_affine = alpha, eps, elementwise_affine
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype)) if elementwise_affine else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, branch: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_trailing(self, x, self.normalized_shape, mask)
        if x.shape != branch.shape:
            raise ValueError(f"DeepNorm: x and the branch's output must have one shape, got {tuple(x.shape)} and {tuple(branch.shape)}")
        dims = tuple(range(-len(self.normalized_shape), 0))
        # The norm does not see a constant along a row, but the rounding of the sum does: take the large part of it off first.
        level = wide(x if mask is None else torch.where(mask, x, 0)).detach().mean(dims, keepdim=True)
        total = self.alpha * (wide(x) - level) + wide(branch)
        return row_norm(total, len(self.normalized_shape), self.weight, self.bias, self.eps, mask=mask, impl=impl).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, alpha={self.alpha:.6g}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
