"""What a module or function is to the diagnosis, read off its class: torch's types first, then what it carries and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts
from equinorm.kernels.activations import TABLE, Activation, of_module
from equinorm.probe.record import Role

CONV = (nn.modules.conv._ConvNd,)
LINEAR = (nn.Linear, nn.Bilinear, *CONV)
BATCH = (nn.modules.batchnorm._BatchNorm,)  # SyncBatchNorm is one
INSTANCE = (nn.modules.instancenorm._InstanceNorm,)
NORM = (*BATCH, *INSTANCE, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
SOFTMAX = (nn.Softmax, nn.Softmax2d)
POOL = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.ZeroPad2d,
)
RECURRENT = (nn.RNNBase, nn.modules.rnn.RNNCellBase)
NORM_FAMILIES = ("batch", "sample", "learned", "conditional", "whitening", "local")  # of equinorm.facts.FAMILIES

# Functions of the table by the callable that a model writes; in-place forms and methods of tensors included.
ACTIVATIONS: dict[Callable[..., Any], str] = {}
for _name in (name for name in TABLE if name not in ("identity", "linear", "gelu_tanh")):
    for _home in (torch, F, Tensor):
        for _spelling in (_name, f"{_name}_"):
            if (_function := getattr(_home, _spelling, None)) is not None:
                ACTIVATIONS[_function] = _name
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
NORM_FUNCTIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm}
DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout, torch.dropout_,
    torch.feature_dropout,
}  # fmt: skip


def facts_of(module: nn.Module) -> Facts | None:
    """What a method of this library says about itself."""
    facts = getattr(type(module), "facts", None)
    return facts if isinstance(facts, Facts) else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: torch's norms, this library's, and whatever keeps running statistics or calls itself a norm."""
    if isinstance(module, NORM):
        return True
    if (facts := facts_of(module)) is not None:
        return facts.family in NORM_FAMILIES and not isinstance(module, RECURRENT) and not any(True for _ in module.children())
    if any(True for _ in module.children()):
        return False
    return isinstance(getattr(module, "running_mean", None), Tensor) or type(module).__name__.lower().rstrip("0123456789d").endswith("norm")


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is random in training and nothing in evaluation, as far as its class says."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return True
    return (
        "drop" in type(module).__name__.lower()
        and not any(True for _ in module.children())
        and not any(True for _ in module.parameters())
    )  # fmt: skip


def role_of(module: nn.Module) -> Role:
    """The role of a module; "container" for those with children that are nothing else."""
    if is_norm(module):
        return "norm"
    if isinstance(module, LINEAR):
        return "linear"
    if isinstance(module, RECURRENT):
        return "recurrent"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten)):
        return "shape"
    if is_dropout(module):
        return "dropout"
    if isinstance(module, SOFTMAX) or of_module(module) is not None:
        return "activation"
    if isinstance(module, POOL):
        return "pool"
    if any(True for _ in module.children()):
        return "container"
    if any(parameter.ndim >= 2 for parameter in module._parameters.values() if parameter is not None):
        return "linear"  # somebody's own linear map
    return "other"


def activation_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation:
    """The entry of the table for a function as it was called, with its keyword arguments where the table has them."""
    name = ACTIVATIONS[function]
    if name == "leaky_relu":
        return _built("leaky_relu", negative_slope=kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01))
    if name == "gelu":
        return TABLE["gelu_tanh" if kwargs.get("approximate", args[1] if len(args) > 1 else "none") == "tanh" else "gelu"]()
    return TABLE[name]()


def _built(name: str, **options: float) -> Activation:
    build: Callable[..., Activation] = TABLE[name]
    return build(**options)


def channel_axis(module: nn.Module, role: Role, output: Tensor, inherited: int | None) -> int | None:
    """The dimension of the channels in the output of a module.

    Convolutions, norms over channels and pooling have them in dimension 1 (0 without a batch), linear layers, embeddings, recurrent and
    attention layers in the last one. Elementwise modules have those of their input. Elsewhere: dimension 1 of four and more, else the last.
    """
    ndim = output.ndim
    if ndim < 2:
        return None
    if isinstance(module, CONV):
        spatial = len(module.kernel_size)
        return 1 if ndim == spatial + 2 else 0 if ndim == spatial + 1 else None
    if isinstance(module, (*BATCH, *INSTANCE, nn.GroupNorm)):
        return 1
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm)) or role in ("recurrent", "attention", "embedding"):
        return ndim - 1
    if inherited is not None and inherited < ndim:
        return inherited
    return 1 if ndim >= 4 else ndim - 1


def norm_geometry(module: nn.Module, shape: tuple[int, ...]) -> tuple[str, int | None, str, int | None]:
    """What a norm does to an input of ``shape``.

    Returns:
        What it pools over, values per statistic, what mean it removes, and the axis of its running estimates.

    Letters are those of :class:`equinorm.facts.Facts`; values is None where they do not tell.
    """
    facts = facts_of(module)
    running = getattr(module, "running_mean", None)
    axis = None
    if isinstance(running, Tensor) and running.ndim == 1 and len(shape) >= 2:
        axis = 1 if shape[1] == len(running) else len(shape) - 1 if shape[-1] == len(running) else None
    batch = shape[0] if shape else 1
    channels = shape[1] if len(shape) > 1 else 1
    positions = 1
    for n in shape[2:]:
        positions *= n
    if isinstance(module, BATCH) or (facts is None and axis is not None and not isinstance(module, INSTANCE)):
        values = 1
        for d, n in enumerate(shape):
            values *= 1 if d == axis or (axis is None and d == 1) else n
        return "NS", values, "channel", axis
    if isinstance(module, INSTANCE):
        return "S", positions, "channel", axis
    if isinstance(module, nn.GroupNorm):
        return "GS", channels // module.num_groups * positions, "all" if module.num_groups < channels else "channel", None
    if isinstance(module, nn.LayerNorm):
        values = 1
        for n in module.normalized_shape:
            values *= n
        return "D", values, "all", None
    if isinstance(module, nn.RMSNorm) or facts is None:
        return ("D" if isinstance(module, nn.RMSNorm) or "rms" in type(module).__name__.lower() else ""), None, "", axis
    sizes = {"N": batch, "C": channels, "S": positions, "D": shape[-1] if shape else 1}
    groups = getattr(module, "num_groups", None)
    if isinstance(groups, int) and groups > 0:
        sizes["G"] = channels // groups
    values = 1
    for letter in facts.pools:
        values = values * sizes[letter] if values is not None and letter in sizes else None
    removes = ""
    if "shift" in facts.invariances:
        removes = "channel" if facts.pools in ("NS", "S", "N") else "all"
    return facts.pools, values if facts.pools else None, removes, axis
