"""In-place activated batch normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_momentum
from equinorm.core.channel import canonical_mask
from equinorm.core.overwrite import Invertible, overwriting_norm
from equinorm.core.running import RunningMoments
from equinorm.core.sync import refusing_together
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl, observed
from equinorm.kernels.activations import Activation, elu, identity, leaky_relu
from equinorm.kernels.reference import HALF
from equinorm.norms.batch import batch

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def invertible(activation: Activation) -> Invertible:
    """Of an activation that can be undone, what backward needs to work from the output."""
    assert activation.inverse is not None
    assert activation.pull is not None
    return Invertible(activation.function, activation.inverse, activation.pull, activation.least)


ACTIVATIONS: dict[str, Callable[[float], Activation]] = {"leaky_relu": leaky_relu, "elu": elu, "identity": lambda _: identity()}


def in_place_batch(
    x: Moments, weight: Tensor | None, bias: Tensor | None, eps: float, mode: str, group: Group = None
) -> tuple[Affine, Moments]:
    """Batch norm; in mode "abs" with the weight |weight| + eps, which is never 0."""
    if weight is not None and mode == "abs":
        weight = torch.where(weight < 0, -weight, weight) + eps  # of derivative 1, not 0, at 0
    return batch(x, weight, bias, eps, group)


class InPlaceABN(RunningMoments, ChannelNorm):
    r"""Batch norm and an invertible activation that store one tensor: the output, in the memory of the input.

    Formula:
        y = phi((x - mu) / sqrt(var + eps) * (|weight| + eps) + bias), with mu and the biased var of each channel over (N, *S); phi is leaky
        ReLU, ELU or the identity. Backward recovers x from y. Running estimates and evaluation are batch norm's.

    Use it when: activations fill the memory of a convolutional network; a pair of batch norm and ReLU stores two maps, this one.
    Not when: something else needs the input, as a sigmoid before it needs its own output, or a checkpointed part that begins with this
        layer; or the activation must be ReLU, which cannot be undone.
    Known trouble: the input is gone, in evaluation too. With ``weight_mode="abs"`` negative weights of a batch norm checkpoint turn their
        sign silently, and 1 + eps stands for 1; use "signed" for such. Channels that rounding the output would lose keep their input: those
        whose scale is tiny against their bias, and those where ELU saturates (below -9.7 in float32; half types refuse ELU). To know
        them costs a synchronisation with the device.

    Args:
        num_features: C.
        eps: added to the variance inside the root, and to |weight|.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        track_running_stats: keep running estimates; without them evaluation uses the batch.
        activation: "leaky_relu", "elu" or "identity".
        activation_param: the slope of leaky ReLU, alpha of ELU; positive.
        weight_mode: "abs" multiplies by |weight| + eps, as the authors' code does; "signed" by weight, as batch norm does.
        process_group: pool the statistics over this process group, or over all processes with "world".
        device, dtype: of the parameters. Estimates are float32, or float64 in a float64 module.

    Shape:
        x: (N, C, *S) to the same shape, dtype and memory. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: the input cannot be overwritten (a leaf that needs a gradient, a view), ELU of a half type, wrong number of channels,
            one value per channel in training, a mask of another shape, or settings out of range.
        RuntimeError: by autograd, in backward: something else needed the input's values.

    Example:
        >>> import torch, equinorm
        >>> conv, norm = torch.nn.Conv2d(3, 8, 3), equinorm.InPlaceABN(8)
        >>> x = conv(torch.randn(4, 3, 6, 6))
        >>> norm(x).data_ptr() == x.data_ptr()
        True

    Source: Rota Bulo, Porzi and Kontschieder 2018, section 3, variant I: activation and affine map are both inverted. |weight| + eps is the
    authors' code's, which stores nothing beside and cannot be differentiated twice.
    """

    facts: ClassVar[Facts] = Facts(
        name="in_place_batch",
        title="In-Place Activated Batch Normalization (InPlace-ABN)",
        paper=Paper(
            authors="Rota Bulo, Porzi and Kontschieder",
            title="In-Place Activated BatchNorm for Memory-Optimized Training of DNNs",
            year=2017,
            venue="CVPR 2018",
            arxiv="1712.02616",
            equation="section 3",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel",
        invariances=frozenset({"shift", "scale", "per-channel"}),
        batch_of_one="normalizes over the positions of the one sample; refused when there is one position",
        one_position="normalizes over the samples",
        reads_writes="2R+1W, activation included",
    )

    process_group: Group

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: Literal["leaky_relu", "elu", "identity"] = "leaky_relu",
        activation_param: float = 0.01,
        weight_mode: Literal["abs", "signed"] = "abs",
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_momentum(self, momentum)
        if activation not in ACTIVATIONS:
            raise ValueError(f"InPlaceABN: activation must be one that can be undone, out of {tuple(ACTIVATIONS)}, got {activation!r}")
        if not 0 < activation_param < float("inf"):
            raise ValueError(f"InPlaceABN: activation_param must be positive, or {activation} cannot be undone, got {activation_param}")
        if weight_mode not in ("abs", "signed"):
            raise ValueError(f'InPlaceABN: weight_mode must be "abs" or "signed", got {weight_mode!r}')
        self.momentum, self.activation, self.activation_param, self.weight_mode = momentum, activation, activation_param, weight_mode
        self.process_group = process_group
        self.register_running((num_features,), track=track_running_stats, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0; forget the running estimates."""
        super().reset_parameters()
        self.reset_running_stats()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        estimate = None if self.learning or self.running_mean is None else self.estimate()
        group = self.process_group if self.training and estimate is None else None
        with refusing_together(group, x.device):
            check_channels(self, x, self.num_features)
            self._check_input(x)
            mask = None if mask is None else canonical_mask(x, mask)
        if self.training and estimate is None and group is None and mask is None:
            check_batch(self, x)

        def rule(moments: Moments, weight: Tensor | None, bias: Tensor | None) -> tuple[Affine, Moments]:
            return in_place_batch(moments if estimate is None else estimate, weight, bias, self.eps, self.weight_mode, group)

        activation = invertible(ACTIVATIONS[self.activation](self.activation_param))
        y, seen = overwriting_norm(x, rule, self.weight, self.bias, activation=activation, measured=estimate is None, mask=mask, impl=impl)
        if self.learning and seen is not None:
            self.learn(seen)
        return y

    def _check_input(self, x: Tensor) -> None:
        """Raises ValueError where overwriting ``x`` would spoil something, or nothing could be recovered from what is written."""
        if self.activation == "elu" and x.dtype in HALF:
            raise ValueError(
                "InPlaceABN: elu cannot be undone in half types, where it saturates early (from -8.3 in float16, from -6.2 in bfloat16), "
                f'got {x.dtype}; use activation="leaky_relu", or float32'
            )
        if observed(x):
            return  # nothing is overwritten
        if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
            raise ValueError("InPlaceABN: the input is overwritten, so it must not be a leaf that requires a gradient; pass x.clone()")
        if x._is_view():
            raise ValueError(
                "InPlaceABN: the input is overwritten, so it must not be a view, which shares its memory with others, got one of shape "
                f"{tuple(x.shape)}; pass x.clone()"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.num_batches_tracked is not None:  # the authors' layer does not count batches
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, momentum={self.momentum}, activation={self.activation!r}, "
            f"activation_param={self.activation_param}, weight_mode={self.weight_mode!r}"
        )
