"""Filter response normalization."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_channels
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl

PAPER = Paper(
    authors="Singh and Krishnan",
    title="Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks",
    year=2019,
    venue="CVPR 2020",
    arxiv="1911.09737",
    equation="Eq. 1",
)


def filter_response(x: Moments, weight: Tensor | None, bias: Tensor | None, eps_l: Tensor | None, eps: float) -> Affine:
    """Divide by the root mean square of each channel of each sample; the mean stays."""
    nu2 = x.var + x.mean.square()  # (N, C)
    scale = (nu2 + eps + (0 if eps_l is None else eps_l.abs())).rsqrt()
    zero = scale.new_zeros(())
    return Affine(zero, scale if weight is None else scale * weight, zero if bias is None else bias.to(scale.dtype))


class FilterResponseNorm(ChannelNorm):
    r"""Divide each channel of each sample by its root mean square over the positions, without centring.

    Formula:
        y = x / sqrt(nu2 + eps + |eps_l|) * weight + bias, with nu2 the mean of x^2 over the positions of one channel of one sample, and the
        learned eps_l only where ``learnable_eps`` is set.

    Use it when: a convolutional network trains with one or few samples per process; follow it with ``TLU`` instead of a ReLU, or use
        ``FilterResponseNormTLU``.
    Not when: inputs have one position and eps stays at 1e-6: the result is then nearly the sign of the input. Set ``learnable_eps``.
    Known trouble: without centring, a ReLU behind it loses what the learned threshold recovers. The paper warms up the learning rate. Do
        not decay eps_l. A channel of zeros comes out as ``bias``, with gradient weight / sqrt(eps) = 1000.

    Args:
        num_features: C.
        eps: added to the mean square inside the root.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        learnable_eps: learn ``eps_l``, (C,), whose absolute value is added to eps: for layers behind which one position is left.
        eps_init: initial eps_l, not 0, where its gradient vanishes.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.FilterResponseNorm(1)(torch.tensor([[[1.0, -2.0, 2.0, 4.0]]])).detach()
        tensor([[[ 0.4000, -0.8000,  0.8000,  1.6000]]])

    Source: Singh and Krishnan 2019, Eq. 1; eps and eps_l as in section 3.1. TensorFlow Addons learns one eps_l for all channels, others one
    per channel, as here; checkpoints of either kind load.
    """

    facts: ClassVar[Facts] = Facts(
        name="filter_response",
        title="Filter Response Normalization",
        paper=PAPER,
        family="sample",
        pools="S",
        invariances=frozenset({"scale", "per-sample", "per-channel"}),
        one_position="nearly the sign of the input while eps is small; learn eps",
        reads_writes="2R+1W",
    )

    eps_l: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        learnable_eps: bool = False,
        eps_init: float = 1e-4,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        if not 0 < abs(eps_init) < float("inf"):
            raise ValueError(f"FilterResponseNorm: eps_init must be finite and not 0, where |eps_l| has no gradient, got {eps_init}")
        self.eps_init = eps_init
        self.register_parameter("eps_l", nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if learnable_eps else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, eps_l its initial value."""
        super().reset_parameters()
        if self.eps_l is not None:
            nn.init.constant_(self.eps_l, self.eps_init)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)

        def rule(moments: Moments, weight: Tensor | None, bias: Tensor | None, eps_l: Tensor | None) -> Affine:
            return filter_response(moments, weight, bias, eps_l, self.eps)

        return channel_norm(x, rule, self.weight, self.bias, self.eps_l, mask=mask, impl=impl)[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        theirs = state_dict.get(prefix + "eps_l")
        if self.eps_l is not None and theirs is not None and theirs.numel() == 1:  # one for all channels
            state_dict[prefix + "eps_l"] = theirs.reshape(1).expand_as(self.eps_l)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learnable_eps={self.eps_l is not None}"
