"""The attention of attentive norm: a few numbers per sample from the moments of its channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.core import Moments, normalize
from equinorm.core.running import RunningMoments

if TYPE_CHECKING:
    from equinorm.core.sync import Group

# name -> the activation behind each linear map, and whether a norm stands before it: the authors' modes 0, 1, 2, 3, 4, 5 and 6
HEADS: dict[str, tuple[tuple[str, ...], bool]] = {
    "sigmoid": (("sigmoid",), False),
    "hidden_sigmoid": (("relu", "sigmoid"), False),
    "norm_hsigmoid": (("hsigmoid",), True),
    "hidden_norm_hsigmoid": (("relu", "hsigmoid"), True),
    "hsigmoid": (("hsigmoid",), False),
    "norm_sigmoid": (("sigmoid",), True),
    "norm_softmax": (("softmax",), True),
}
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "hsigmoid": lambda z: F.relu6(z + 3) / 6,  # torch's hardsigmoid has no second derivative
    "relu": torch.relu,
    "softmax": lambda z: z.softmax(1),
}
Tensors = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]


class Stage(RunningMoments):
    """A linear map, a norm over the batch or over the units or none, and an activation; pure, for use in a rule.

    What it learns from and with is handed to it by the rule's owner, which decides when the estimates move.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: str,
        norm: Literal["batch", "layer"] | None,
        eps: float,
        momentum: float | None,
        track: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.activation, self.norm, self.eps, self.momentum = activation, norm, eps, momentum
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))
        for name, wanted in (("bias", norm is None), ("norm_weight", norm is not None), ("norm_bias", norm is not None)):
            self.register_parameter(name, nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if wanted else None)
        self.register_running((outputs,), track=norm == "batch" and track, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """As a linear layer, with the norm at weight 1 and bias 0; forget the running estimates."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        self.reset_running_stats()

    def tensors(self) -> Tensors:
        """The parameters, as arguments of a rule."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias

    def run(self, z: Tensor, by: Tensors, estimate: Moments | None, samples: int | Tensor, group: Group) -> tuple[Tensor, Moments | None]:
        """The output for z (N, in), and the moments of the batch if it was measured.

        Args:
            z: what comes in.
            by: the parameters, as from :meth:`tensors`.
            estimate: what stands for the moments of the batch; None to measure them.
            samples: (N, 1), how often each sample counts; or 1.
            group: processes to pool over.
        """
        weight, bias, norm_weight, norm_bias = by
        z, seen = F.linear(z, weight.to(z.dtype), bias if bias is None else bias.to(z.dtype)), None
        if self.norm is not None:
            if self.norm == "layer":
                var, mean = torch.var_mean(z, 1, correction=0, keepdim=True)
                by_moments = Moments(mean, var, z.shape[1])
            else:
                seen = Moments(z, torch.zeros_like(z), samples).over_batch(group) if estimate is None else None
                by_moments = seen or estimate
            assert by_moments is not None
            mean, scale, shift = normalize(by_moments, norm_weight, norm_bias, self.eps)
            z = (z - mean) * scale + shift
        return ACTIVATIONS[self.activation](z), seen
