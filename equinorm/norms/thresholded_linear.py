"""The thresholded linear unit: the activation that belongs behind a norm that does not centre."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import accept_published_shapes, check_channels, check_count
from equinorm.core.pointwise import Point, pointwise_norm, where_larger
from equinorm.facts import Facts
from equinorm.norms.filter_response import PAPER


def _pull(dy: Tensor, x: Tensor, tau: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    dx = where_larger(dy, x - tau)
    return dx, (dy - dx,)


LARGER = Point(torch.maximum, _pull)


class TLU(nn.Module):
    r"""A ReLU whose threshold is learned for each channel.

    Formula:
        z = max(y, tau) = relu(y - tau) + tau, with tau for each channel.

    Use it when: the layer before it is ``FilterResponseNorm``, which leaves the mean where it is, so that a fixed threshold of 0 would cut
        at an arbitrary place.
    Not when: the norm before it centres, or another activation follows: a ReLU behind it defeats the threshold.
    Known trouble: do not decay tau. Where y equals tau exactly the gradient is split in halves.

    Args:
        num_features: C.
        device, dtype: of ``tau``, initially 0: a ReLU.

    Shape:
        x: (N, C, *S) to the same shape and dtype.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels.

    Example:
        >>> import torch, equinorm
        >>> equinorm.TLU(2)(torch.tensor([[-1.0, 2.0]])).detach()
        tensor([[0., 2.]])

    Source: Singh and Krishnan 2019, Eq. 3.
    """

    facts: ClassVar[Facts] = Facts(
        name="thresholded_linear",
        title="Thresholded Linear Unit (TLU)",
        paper=PAPER,
        family="sample",
        pools="",
        invariances=frozenset({"per-sample", "per-channel"}),
    )

    def __init__(self, num_features: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_count(self, num_features=num_features)
        self.num_features = num_features
        self.tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The unit for ``channels`` channels, as the catalogue builds it."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """Threshold 0."""
        nn.init.zeros_(self.tau)

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.num_features)

        def rule(_: None, tau: Tensor) -> tuple[tuple[Tensor, ...], None]:
            return (tau.unsqueeze(0),), None

        return pointwise_norm(x, rule, LARGER, self.tau, per=None)[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        accept_published_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}"
