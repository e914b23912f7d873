"""Filter response normalization with the activation that the paper puts behind it."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core import Moments
from equinorm.core.base import check_channels, check_count, check_eps
from equinorm.core.channel import canonical_mask, split
from equinorm.core.pointwise import Point, pointwise_norm, where_larger
from equinorm.facts import Facts
from equinorm.kernels import Impl
from equinorm.norms.filter_response import PAPER, FilterResponseNorm, filter_response
from equinorm.norms.thresholded_linear import TLU


def thresholded(x: Tensor, scale: Tensor, shift: Tensor, tau: Tensor) -> Tensor:
    """The larger of the normalized value and the threshold."""
    return torch.maximum(x * scale + shift, tau)


def _pull(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, tau: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    to_affine = where_larger(dy, (x * scale).add_(shift).sub_(tau))
    return to_affine * scale, (to_affine * x, to_affine, dy - to_affine)


THRESHOLDED = Point(thresholded, _pull)


class FilterResponseNormTLU(nn.Module):
    r"""Filter response normalization and its learned threshold: the layer as the paper proposes it.

    Formula:
        z = max(x / sqrt(nu2 + eps + |eps_l|) * weight + bias, tau), with nu2 the mean of x^2 over the positions of one channel of one
        sample.

    Use it when: it replaces a pair of batch norm and ReLU in a convolutional network that trains with few samples per process.
    Not when: another activation follows.
    Known trouble: as for ``FilterResponseNorm`` and ``TLU``, which it consists of as ``norm`` and ``tlu``.

    Args:
        num_features: C.
        eps: added to the mean square inside the root.
        affine: learn ``norm.weight`` (1) and ``norm.bias`` (0), both (C,).
        learnable_eps: learn ``norm.eps_l``, (C,), whose absolute value is added to eps.
        eps_init: initial eps_l, not 0.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.FilterResponseNormTLU(1)
        >>> _ = torch.nn.init.constant_(layer.tlu.tau, -0.3)
        >>> layer(torch.tensor([[[1.0, -2.0, 2.0, 4.0]]])).detach()
        tensor([[[ 0.4000, -0.3000,  0.8000,  1.6000]]])

    Source: Singh and Krishnan 2019, Eq. 1 to 3. Published layers keep ``weight``, ``bias``, ``tau`` and ``eps_l`` side by side; their
    checkpoints load.
    """

    facts: ClassVar[Facts] = Facts(
        name="filter_response_tlu",
        title="Filter Response Normalization with Thresholded Linear Unit",
        paper=PAPER,
        family="sample",
        pools="S",
        invariances=frozenset({"scale", "per-sample", "per-channel"}),
        one_position="nearly the sign of the input while eps is small; learn eps",
        reads_writes="2R+1W",
    )

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
        super().__init__()
        check_count(self, num_features=num_features)
        check_eps(self, eps)
        self.norm = FilterResponseNorm(num_features, eps, affine, learnable_eps, eps_init, device, dtype)
        self.tlu = TLU(num_features, device, dtype)

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The layer for ``channels`` channels with its default settings, as the catalogue builds it."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, threshold 0, eps_l its initial value."""
        self.norm.reset_parameters()
        self.tlu.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.norm.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        norm = self.norm

        def rule(
            m: Moments, tau: Tensor, weight: Tensor | None, bias: Tensor | None, eps_l: Tensor | None
        ) -> tuple[tuple[Tensor, ...], None]:
            _, scale, shift = split(filter_response(m, weight, bias, eps_l, norm.eps))[0]  # it does not centre
            return (scale, shift, tau.unsqueeze(0)), None

        return pointwise_norm(x, rule, THRESHOLDED, self.tlu.tau, norm.weight, norm.bias, norm.eps_l, mask=mask, impl=impl)[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, own in {"weight": "norm.weight", "bias": "norm.bias", "eps_l": "norm.eps_l", "tau": "tlu.tau"}.items():
            if prefix + name in state_dict:
                state_dict[prefix + own] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
