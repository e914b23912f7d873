"""Data-dependent initialisation of weight-normalized networks: one batch gives every pre-activation mean 0 and variance 1."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equinorm.weight.norm import _WeightNorm


@torch.no_grad()
def data_dependent_init_(
    model: nn.Module,
    *batch: Any,
    init_scale: float = 1.0,
    v_std: float | None = 0.05,
    eps: float = 1e-10,
    process_group: dist.ProcessGroup | Literal["world"] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Set lengths and biases of all weight-normalized layers from one batch: every pre-activation gets mean 0 and std ``init_scale``.

    The batch runs through the model once, without gradient and in the mode the model is in. Each layer is set when the batch reaches it,
    so it sees the output of layers already set. With v drawn anew and t = v x / ||v||, g = init_scale / sqrt(var[t] + eps) and
    b = -mean[t] g, with the biased variance over everything but the channels. A layer without bias keeps its mean. A layer used several
    times is set at its first use.

    Args:
        model: contains layers with :func:`weight_norm` on their ``weight`` (one length per output unit).
        *batch: arguments of ``model``; a batch like those of training, large enough for a variance.
        init_scale: wanted std of the pre-activations.
        v_std: std of the normal distribution v is drawn from; None keeps v.
        eps: added to the variance.
        process_group: pool the statistics over this process group, or over all processes with "world", and take v from its first rank.
        **kwargs: further arguments of ``model``.

    Returns:
        Names of the layers that were set, in the order in which the batch reached them.

    Raises:
        ValueError: the model has no weight-normalized layer, or the batch reaches none, or a pre-activation is constant over the batch or
            not finite; the message names the layer. Layers before it are already set then.

    Example:
        >>> import torch, equinorm
        >>> first, second = (equinorm.weight_norm(torch.nn.Linear(*sizes)) for sizes in ((5, 8), (8, 3)))
        >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
        >>> equinorm.data_dependent_init_(model, torch.randn(64, 5))
        ['0', '2']
        >>> abs(model(torch.randn(1000, 5)).mean().item()) < 1
        True

    Source: Salimans and Kingma, 2016, arXiv:1602.07868, section 3, Eq. 5 and 6. The published code adds 1e-10 to the variance in dense
        layers and 1e-8 in convolutions; we add 1e-10 in both.
    """
    layers = {module: name for name, module in model.named_modules() if _normalized_per_unit(module)}
    if not layers:
        raise ValueError(
            f"data_dependent_init_: {type(model).__name__} must contain a layer with weight_norm (one length per output unit), found none"
        )
    if process_group == "world":
        process_group = dist.group.WORLD
    reached: list[str] = []
    handles: dict[nn.Module, list[RemovableHandle]] = {}

    def start(layer: Any, _: Any) -> None:
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        g.fill_(1)
        if v_std is not None:
            v.normal_(0, v_std)
        if process_group is not None:
            dist.broadcast(v, group=process_group, group_src=0)
        if layer.bias is not None:
            layer.bias.zero_()

    def fit(layer: Any, _: Any, t: Tensor) -> Tensor:
        for handle in handles[layer]:
            handle.remove()
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        channel = t.ndim - 1 - (v.ndim - 2)
        mean, var = _moments(t, channel, process_group)
        # A constant that float32 cannot represent exactly leaves a variance of rounding errors.
        if not (var > (4 * torch.finfo(var.dtype).eps * mean).square()).all() or not var.isfinite().all():
            raise ValueError(
                f"data_dependent_init_: the pre-activations of every unit must vary over the batch and be finite; {layers[layer]!r} has "
                f"units of variance {var.min():.3g} to {var.max():.3g} in an output of shape {tuple(t.shape)}. "
                "Use a larger or more varied batch"
            )
        scale = init_scale * (var + eps).rsqrt()
        g.copy_(scale.view_as(g))
        reached.append(layers[layer])
        shape = [-1] + [1] * (v.ndim - 2)
        if layer.bias is None:
            return (t * scale.view(shape)).to(t.dtype)
        layer.bias.copy_(-mean * scale)
        return ((t - mean.view(shape)) * scale.view(shape)).to(t.dtype)

    for layer in layers:
        handles[layer] = [layer.register_forward_pre_hook(start), layer.register_forward_hook(fit)]
    try:
        model(*batch, **kwargs)
    finally:
        for handle in [handle for pair in handles.values() for handle in pair]:
            handle.remove()
    if not reached:
        raise ValueError(
            f"data_dependent_init_: the batch must pass through weight-normalized layers, but reached none of {list(layers.values())}"
        )
    return reached


def _normalized_per_unit(module: nn.Module) -> bool:
    steps = getattr(module, "parametrizations", {})
    first = steps["weight"][0] if "weight" in steps else None
    return isinstance(first, _WeightNorm) and first.units is not None


def _moments(t: Tensor, channel: int, process_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel in at least float32, over all processes of the group."""
    t = t.to(torch.promote_types(t.dtype, torch.float32)).movedim(channel, 0).flatten(1)  # (C, M)
    total = torch.cat((t.sum(1), t.new_tensor([t.shape[1]])))
    if process_group is not None:
        dist.all_reduce(total, group=process_group)
    mean = total[:-1] / total[-1]
    square = (t - mean[:, None]).square().sum(1)
    if process_group is not None:
        dist.all_reduce(square, group=process_group)
    return mean, square / total[-1]
