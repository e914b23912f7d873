"""The table: one line per activation norm of the catalogue. From its line a method earns every shared property in test_catalogue.py.

A line says how to build the method, on what input, which naive reference it must equal, and with which options. What the method claims of
itself (invariances, whether training differs from evaluation, what is synchronised, what happens at batch size 1) is read from its facts
and checked, not repeated here. Weight parametrizations have their own table in tests/weight/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import equinorm
from tests.references import batch_family, conditional, evonorm, learned, local, mixture, mode, moving, online, recurrent, whitening
from tests.references import norms as reference
from tests.references import residual as residual_reference
from tests.references import weight as weight_reference

Reference = Callable[..., tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method under test.

    Attributes:
        cls: the class.
        args: positional arguments of the constructor.
        seen_as: a subclass of the same name that is tested in its place, because the shared tests cannot call the class itself.
        reference: ``reference(x, p, *extra, training, mask, **options) -> (y, updates)``: the method retyped naively from its paper, in
            differentiable float64 PyTorch, loops welcome, importing nothing of ours. ``p`` maps the names of parameters and buffers to
            their values; ``options`` are the constructor's keyword arguments; ``updates`` are the new values of buffers that a training
            step moves. ``mask`` is None or boolean (N, *S) (channel geometry), or broadcastable to x (row geometry).
        options: keyword arguments of the constructor, one dict per variant; the first is the plain one.
        geometry: "channel" for inputs (N, C, *S), "row" for inputs (..., D).
        shape: the shape of the input; small, every size different.
        spatial: how many spatial dimensions the method takes (channel geometry).
        extra: makes further inputs of ``forward`` after x, from (x, generator).
        masked: whether ``forward`` takes ``mask``.
        derivative: False where the backward is by definition not the derivative of the forward.
        steady: False where a training forward must not be repeated with the same result (the output depends on state that it moved).
        bad: ``name -> (call, exception, pattern)``: calls that must raise, and what the message must say.
        counted: whether the class is told the number of channels, and so refuses any other.
        wide_products: False where convolutions or matrix products run in the type of the parameters, or of autocast, as they do outside
            of a norm.
        ready: brings a fresh module to a state in which evaluation makes sense (data-dependent initialisation), from (module, x).
    """

    cls: type[nn.Module]
    args: tuple[Any, ...]
    reference: Reference
    options: tuple[Mapping[str, Any], ...] = ({},)
    geometry: Literal["channel", "row"] = "channel"
    shape: tuple[int, ...] = (4, 6, 5, 3)
    spatial: tuple[int, ...] = (0, 1, 2, 3)
    extra: Callable[..., tuple[Any, ...]] | None = None
    masked: bool = True
    derivative: bool = True
    steady: bool = True
    counted: bool = True
    wide_products: bool = True
    bad: Mapping[str, tuple[Callable[[], Any], type[Exception], str]] = field(default_factory=dict)
    ready: Callable[[nn.Module, Tensor], None] | None = None
    seen_as: type[nn.Module] | None = None

    def make(self, variant: int = 0, **more: Any) -> nn.Module:
        """Build the module of one variant."""
        return (self.seen_as or self.cls)(*self.args, **{**self.options[variant], **more})

    @property
    def name(self) -> str:
        """The catalogue name."""
        return self.cls.facts.name


def vector(width: int) -> Callable[..., tuple[Tensor]]:
    """A condition (N, width) that depends on the sample alone, so that a share of the batch gets its share of the conditions."""
    return lambda x, generator: (
        x.detach().flatten(1)[:, :width].sin() + torch.rand(width, generator=generator, dtype=torch.float64).to(x),
    )


def classes(count: int) -> Callable[..., tuple[Tensor]]:
    """Class numbers (N,) that depend on the sample alone."""
    return lambda x, generator: ((x.detach().flatten(1)[:, :3].sum(1) * 7).long() % count,)


def style(x: Tensor, generator: torch.Generator) -> tuple[Tensor]:
    """A second feature map, of another size than x."""
    return (torch.cat([x.detach().cos()] * 2, -1)[..., 1:] * 2 + 3,)


def labels(channels: int) -> Callable[..., tuple[Tensor]]:
    """A soft label map (N, channels, *T) of another size than x."""
    return lambda x, generator: (torch.cat([x.detach()[:, :channels].sin()] * 2, -1)[..., 1:],)


class LayerNormLSTM(equinorm.LayerNormLSTM):
    """Without the final state."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(*args, **kwargs)[0]


class LayerNormGRU(equinorm.LayerNormGRU):
    """Without the final state."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(*args, **kwargs)[0]


class AdaLayerNormZero(equinorm.AdaLayerNormZero):
    """With its two outputs, the branch's input and the gate, as the even and odd features of one."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, gate = super().forward(*args, **kwargs)
        return torch.where(torch.arange(y.shape[-1]) % 2 == 0, y, gate)


def fitted(module: nn.Module, x: Tensor) -> None:
    """A mixture norm after its first batch, with components apart from each other."""
    with torch.no_grad():
        spread = torch.linspace(-2.0, 3.0, module.running_mean.numel()).reshape(module.running_mean.shape)
        module.running_mean.copy_(spread.sin() * 2)
        module.running_var.copy_(1 + spread.square() / 4)
        module.running_share.copy_(torch.arange(1.0, 1 + len(spread)) / (len(spread) * (len(spread) + 1) / 2))
        module.initialized.fill_(True)


class QKNorm(equinorm.QKNorm):
    """Its queries alone; tests/norms/test_query_key.py looks at the keys."""

    def forward(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        return super().forward(q, k, **options)[0]


class VirtualBatchNorm(equinorm.VirtualBatchNorm):
    """With a fixed reference batch; it is no part of the state dict, so a loaded norm measures it again."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        if self._reference is None:
            with torch.no_grad():
                self.set_reference(batch_family.reference_batch(self.num_features).to(x.dtype))
        return super().forward(x, mask, **options)


class InPlaceABN(equinorm.InPlaceABN):
    """With an input of its own to overwrite; tests/norms/test_in_place_batch.py looks at what is overwritten."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return super().forward(x.clone(), mask, **options)


CASES: tuple[Case, ...] = (
    Case(
        cls=equinorm.BatchNorm,
        args=(6,),
        reference=reference.batch,
        options=({}, {"momentum": None, "eps": 1e-3}, {"affine": False}, {"bias": False}, {"track_running_stats": False}),
    ),
    Case(
        cls=equinorm.SyncBatchNorm,
        args=(6,),
        reference=reference.batch,
        options=({}, {"momentum": None, "eps": 1e-3}, {"affine": False}, {"bias": False}, {"track_running_stats": False}),
    ),
    Case(
        cls=equinorm.ActNorm,
        args=(6,),
        reference=batch_family.activation,
        options=({}, {"logscale_factor": 3.0, "scale": 2.0}, {"batch_variance": True}),
        ready=lambda module, x: module.initialize(x),
        bad={
            "scale": (lambda: equinorm.ActNorm(6, scale=0.0), ValueError, "ActNorm: scale must be a positive finite number, got 0.0"),
            "factor": (lambda: equinorm.ActNorm(6, logscale_factor=-1.0), ValueError, "ActNorm: logscale_factor must be .* got -1.0"),
        },
    ),
    Case(
        cls=equinorm.DynamicTanh,
        args=(6,),
        reference=residual_reference.dynamic_tanh,
        options=({}, {"alpha_init": 0.9, "bias": False}, {"elementwise_affine": False}),
        geometry="row",
        shape=(4, 5, 6),
        masked=False,
        bad={"size": (lambda: equinorm.DynamicTanh(0), ValueError, "DynamicTanh: normalized_shape must hold sizes of at least 1, got 0")},
    ),
    Case(
        cls=equinorm.DynamicErf,
        args=(6,),
        reference=residual_reference.dynamic_erf,
        options=({}, {"alpha_init": 0.9, "shift_init": 0.3, "bias": False}, {"elementwise_affine": False}),
        geometry="row",
        shape=(4, 5, 6),
        masked=False,
    ),
    Case(
        cls=equinorm.LayerScale,
        args=(6,),
        reference=residual_reference.layer_scale,
        options=({"init": 0.1}, {}),
        geometry="row",
        shape=(4, 5, 6),
        masked=False,
        bad={"dim": (lambda: equinorm.LayerScale(0), ValueError, "LayerScale: dim must be at least 1, got 0")},
    ),
    Case(
        cls=equinorm.DeepNorm,
        args=(6, 2.5),
        reference=lambda x, p, branch, **kw: residual_reference.deep_norm(x, p, branch, alpha=2.5, **kw),
        options=({}, {"eps": 1e-3}, {"elementwise_affine": False}),
        geometry="row",
        shape=(4, 5, 6),
        extra=lambda x, generator: (2 * x.detach().sin(),),
        bad={
            "alpha": (lambda: equinorm.DeepNorm(6, 0.0), ValueError, "DeepNorm: alpha must be positive and finite, got 0.0"),
            "eps": (lambda: equinorm.DeepNorm(6, 1.0, eps=-1.0), ValueError, "DeepNorm: eps must be"),
        },
    ),
    Case(
        cls=equinorm.MeanOnlyBatchNorm,
        args=(6,),
        reference=weight_reference.mean_only_batch,
        options=({}, {"momentum": None}, {"bias": False}),
    ),
    Case(
        cls=equinorm.BatchRenorm,
        args=(6,),
        reference=batch_family.batch_renorm,
        options=(
            {},
            {"warmup": None, "momentum": 0.1},
            {"warmup": None, "r_max": 1.1, "d_max": 0.1, "momentum": None},
            {"warmup": (0, 3, 2), "track": "var", "eps": 1e-5, "affine": False, "momentum": 0.3},
        ),
        bad={
            "r_max": (lambda: equinorm.BatchRenorm(6, r_max=0.5), ValueError, "BatchRenorm: r_max must be .* at least 1 .* got 0.5"),
            "d_max": (lambda: equinorm.BatchRenorm(6, d_max=-1.0), ValueError, "BatchRenorm: d_max must be .* at least 0 .* got -1.0"),
            "infinity": (lambda: equinorm.BatchRenorm(6, r_max=float("inf")), ValueError, "BatchRenorm: r_max cannot open linearly"),
            "warmup": (lambda: equinorm.BatchRenorm(6, warmup=(5, 5, 9)), ValueError, r"BatchRenorm: warmup must be .* got \(5, 5, 9\)"),
            "track": (lambda: equinorm.BatchRenorm(6, track="sd"), ValueError, "BatchRenorm: track must be .* got 'sd'"),
            "momentum": (lambda: equinorm.BatchRenorm(6, momentum=2.0), ValueError, "BatchRenorm: momentum"),
        },
    ),
    Case(
        cls=equinorm.GhostBatchNorm,
        args=(6,),
        reference=batch_family.ghost_batch,
        options=(
            {"num_splits": 2},
            {},
            {"virtual_batch_size": 2, "running_stats": "mean", "affine": False},
            {"num_splits": 3, "momentum": None, "eps": 1e-3},
            {"virtual_batch_size": 1, "track_running_stats": False},
        ),
        bad={
            "both": (
                lambda: equinorm.GhostBatchNorm(6, 8, num_splits=2),
                ValueError,
                "GhostBatchNorm: give virtual_batch_size or num_splits",
            ),
            "size": (lambda: equinorm.GhostBatchNorm(6, 0), ValueError, "GhostBatchNorm: virtual_batch_size must be .* got 0"),
            "splits": (lambda: equinorm.GhostBatchNorm(6, num_splits=0), ValueError, "GhostBatchNorm: num_splits must be .* got 0"),
            "stats": (
                lambda: equinorm.GhostBatchNorm(6, running_stats="last"),
                ValueError,
                "GhostBatchNorm: running_stats must be .* 'last'",
            ),
            "momentum": (lambda: equinorm.GhostBatchNorm(6, momentum=2.0), ValueError, "GhostBatchNorm: momentum"),
        },
    ),
    Case(
        cls=equinorm.VirtualBatchNorm,
        seen_as=VirtualBatchNorm,
        args=(6,),
        reference=batch_family.virtual_batch,
        options=({}, {"eps": 1e-3}, {"affine": False}),
        ready=lambda module, x: module(x),
        bad={
            "init_std": (lambda: equinorm.VirtualBatchNorm(6, init_std=-1.0), ValueError, "VirtualBatchNorm: init_std must be .* got -1.0")
        },
    ),
    Case(
        cls=equinorm.InPlaceABN,
        seen_as=InPlaceABN,
        args=(6,),
        reference=batch_family.in_place_batch,
        options=(
            {},
            {"weight_mode": "signed", "activation": "elu", "activation_param": 1.0, "momentum": None},
            {"activation": "elu", "activation_param": 0.5, "eps": 1e-3},
            {"activation": "identity", "affine": False, "track_running_stats": False},
        ),
        bad={
            "relu": (lambda: equinorm.InPlaceABN(6, activation="relu"), ValueError, "InPlaceABN: activation must be one .* got 'relu'"),
            "slope": (lambda: equinorm.InPlaceABN(6, activation_param=0.0), ValueError, "InPlaceABN: activation_param must be positive"),
            "mode": (lambda: equinorm.InPlaceABN(6, weight_mode="sign"), ValueError, "InPlaceABN: weight_mode must be .* got 'sign'"),
            "momentum": (lambda: equinorm.InPlaceABN(6, momentum=2.0), ValueError, "InPlaceABN: momentum"),
        },
    ),
    Case(
        cls=equinorm.InstanceNorm,
        args=(6,),
        reference=reference.instance,
        options=({}, {"affine": True}, {"track_running_stats": True}, {"track_running_stats": True, "momentum": None, "affine": True}),
        spatial=(1, 2, 3),
    ),
    Case(
        cls=equinorm.GroupNorm,
        args=(3, 6),
        reference=lambda x, p, **kw: reference.group(x, p, num_groups=3, **kw),
        options=({}, {"eps": 1e-3}, {"affine": False}, {"bias": False}),
    ),
    Case(
        cls=equinorm.LayerNorm,
        args=(6,),
        reference=reference.layer,
        options=({}, {"eps": 1e-3}, {"elementwise_affine": False}, {"bias": False}),
        geometry="row",
        shape=(4, 5, 6),
    ),
    Case(
        cls=equinorm.RMSNorm,
        args=(6,),
        reference=reference.rms,
        options=(
            {"eps": 1e-6},
            {},
            {"bias": True},
            {"elementwise_affine": False},
            {"partial": 0.4},
            {"eps_inside": False, "eps": 1e-3, "partial": 0.5, "bias": True},
            {"weight_offset": 1.0},
            {"cast_before_weight": True},
        ),
        geometry="row",
        shape=(4, 5, 6),
    ),
    Case(
        cls=equinorm.FilterResponseNorm,
        args=(6,),
        reference=batch_family.filter_response,
        options=({}, {"eps": 1e-3, "affine": False}, {"learnable_eps": True}),
        bad={
            "eps_init": (
                lambda: equinorm.FilterResponseNorm(6, eps_init=0.0),
                ValueError,
                "FilterResponseNorm: eps_init must be .* got 0.0",
            )
        },
    ),
    Case(cls=equinorm.TLU, args=(6,), reference=batch_family.thresholded_linear, masked=False),
    Case(
        cls=equinorm.FilterResponseNormTLU,
        args=(6,),
        reference=batch_family.filter_response_tlu,
        options=({}, {"eps": 1e-3, "affine": False}, {"learnable_eps": True}),
    ),
    Case(
        cls=equinorm.SwitchNorm,
        args=(6,),
        reference=reference.switch,
        options=(
            {},
            {"using": ("layer", "batch")},
            {"using": ("instance", "layer")},
            {"momentum": None, "affine": False},
            {"last_gamma": True},
        ),
    ),
    Case(
        cls=equinorm.BatchChannelNorm,
        args=(6, 3),
        reference=lambda x, p, **kw: reference.batch_channel(x, p, num_groups=3, **kw),
        options=({}, {"estimate": True}, {"estimate": True, "variance": "batch"}, {"estimate": True, "momentum": None}, {"affine": False}),
    ),
    Case(
        cls=equinorm.AdaptiveInstanceNorm,
        args=(6,),
        reference=conditional.adaptive_instance,
        options=({}, {"unbiased": True, "eps": 1e-3}),
        spatial=(1, 2, 3),
        extra=style,
        bad={"cond_dim": (lambda: equinorm.AdaptiveInstanceNorm(6, 0), ValueError, "AdaptiveInstanceNorm: cond_dim must be an integer")},
    ),
    Case(
        cls=equinorm.AdaptiveInstanceNorm,
        args=(6,),
        reference=conditional.adaptive_instance,
        options=({"cond_dim": 5}, {"cond_dim": 5, "unbiased": True}),
        spatial=(1, 2, 3),
        extra=vector(5),
    ),
    Case(
        cls=equinorm.ModeNorm,
        args=(6,),
        reference=mode.mode,
        options=(
            {},
            {"num_modes": 3, "momentum": None},
            {"num_modes": 1, "affine": False},
            {"num_modes": 3, "count_weighted": True},
            {"count_weighted": True, "momentum": None},
        ),
        bad={"num_modes": (lambda: equinorm.ModeNorm(6, 0), ValueError, "ModeNorm: num_modes must be an integer of at least 1")},
    ),
    Case(
        cls=equinorm.ModeGroupNorm,
        args=(6,),
        reference=mode.mode_group,
        options=({}, {"num_modes": 3, "eps": 1e-3}, {"num_modes": 1, "affine": False}),
        bad={
            "num_modes": (lambda: equinorm.ModeGroupNorm(6, 0), ValueError, "ModeGroupNorm: num_modes must be an integer of at least 1"),
            "one value": (
                lambda: equinorm.ModeGroupNorm(1)(torch.zeros(4, 1)),
                ValueError,
                "ModeGroupNorm: a sample needs more than one value",
            ),
        },
    ),
    # Per position, local and whitening
    Case(
        cls=equinorm.GlobalResponseNorm,
        args=(6,),
        reference=local.global_response,
        options=({"channel_dim": 1}, {"channel_dim": 1, "eps": 0.5}),
    ),
    Case(
        cls=equinorm.LocalResponseNorm,
        args=(3,),
        reference=lambda x, p, **kw: local.local_response(x, p, size=3, **kw),
        options=({"alpha": 1.0, "k": 2.0}, {}, {"alpha": 1.0, "beta": 0.5, "mode": "within"}),
        counted=False,
        bad={
            "size": (lambda: equinorm.LocalResponseNorm(0), ValueError, "LocalResponseNorm: size must be an integer of at least 1, got 0"),
            "alpha": (lambda: equinorm.LocalResponseNorm(5, alpha=-1.0), ValueError, "LocalResponseNorm: alpha must be .* got -1"),
            "mode": (lambda: equinorm.LocalResponseNorm(5, mode="in"), ValueError, "LocalResponseNorm: mode must be .* got 'in'"),
        },
    ),
    Case(
        cls=equinorm.GeneralizedDivisiveNorm,
        args=(6,),
        reference=local.generalized_divisive,
        options=({}, {"inverse": True, "beta_min": 1e-2}, {"alpha": 1.0, "epsilon": 1.0}, {"alpha": 1.5, "rectify": True}),
        masked=False,
        # Below their bounds the gradient of the parameters is by design not the derivative; test_generalized_divisive.py looks there.
        ready=lambda module, x: [p.data.abs_().add_(0.1) for p in module.parameters()],
    ),
    Case(
        cls=equinorm.LocalContrastNorm,
        args=(),
        reference=local.local_contrast,
        options=(
            {"kernel_size": 3},
            {},
            {"sigma": None, "across_channels": False, "kernel_size": (3, 5)},
            {"kernel_size": 3, "threshold": 0.7, "sigma": 1.0},
        ),
        spatial=(1, 2, 3),
        counted=False,
    ),
    Case(
        cls=equinorm.SubtractiveNorm,
        args=(),
        reference=local.subtractive,
        options=({"kernel_size": 3}, {"sigma": None, "across_channels": False}),
        spatial=(1, 2, 3),
        counted=False,
    ),
    Case(
        cls=equinorm.DivisiveNorm,
        args=(),
        reference=local.divisive,
        options=({"kernel_size": 3}, {"sigma": None, "across_channels": False, "threshold": 1.5}, {"eps": 3.0, "kernel_size": 3}),
        spatial=(1, 2, 3),
        counted=False,
    ),
    Case(
        cls=equinorm.DecorrelatedBatchNorm,
        args=(6,),
        reference=whitening.decorrelated_batch,
        options=(
            {"channels_per_group": 2},
            {"channels_per_group": 3, "momentum": None, "running": "covariance"},
            {"eps": 0.5, "affine": False},
            {"channels_per_group": 1},
        ),
        bad={
            "groups": (
                lambda: equinorm.DecorrelatedBatchNorm(6, 4),
                ValueError,
                r"DecorrelatedBatchNorm: channels_per_group must divide num_features, got 4 for 6 channels; use one of \[1, 2, 3, 6\]",
            ),
            "running": (lambda: equinorm.DecorrelatedBatchNorm(6, running="mean"), ValueError, "running must be .* got 'mean'"),
            "momentum": (lambda: equinorm.DecorrelatedBatchNorm(6, momentum=2.0), ValueError, "DecorrelatedBatchNorm: momentum"),
        },
    ),
    Case(
        cls=equinorm.IterNorm,
        args=(6,),
        reference=whitening.iterative,
        options=(
            {"channels_per_group": 2},
            {"channels_per_group": 3, "T": 7, "momentum": None, "running": "covariance"},
            {"eps": 0.5, "affine": False, "T": 0},
            {"T": 1},
        ),
        bad={
            "T": (lambda: equinorm.IterNorm(6, T=-1), ValueError, 'IterNorm: T must be an integer of at least 0, or "auto"; got -1'),
            "groups": (lambda: equinorm.IterNorm(6, 4), ValueError, "IterNorm: channels_per_group must divide num_features, got 4 for 6"),
        },
    ),
    Case(
        cls=equinorm.PixelNorm,
        args=(),
        reference=local.pixel,
        options=({}, {"eps": 0.5}),
        masked=False,
        counted=False,
    ),
    Case(
        cls=equinorm.PositionalNorm,
        args=(),
        reference=local.positional,
        options=({"return_moments": False}, {"return_moments": False, "unbiased": True, "eps": 0.5}),
        masked=False,
        counted=False,
    ),
    Case(
        cls=equinorm.ScaleNorm,
        args=(6,),
        reference=local.scale,
        options=({}, {"eps": 3.0, "init_scale": 0.5}),
        geometry="row",
        shape=(4, 5, 6),
    ),
    Case(
        cls=equinorm.QKNorm,
        seen_as=QKNorm,
        args=(6,),
        reference=local.query_key,
        options=(
            {},
            {"kind": "layer", "eps": 1e-3, "bias": True},
            {"kind": "l2", "init_scale": 3.0},
            {"learnable_scale": False},
            {"kind": "l2", "init_scale": 3.0, "learnable_scale": False},
        ),
        geometry="row",
        shape=(4, 5, 6),
        extra=lambda x, generator: (x.detach().flip(-1) * 2,),
        masked=False,
    ),
    Case(
        cls=equinorm.ConditionalInstanceNorm,
        args=(6,),
        reference=conditional.conditional_instance,
        options=({"num_classes": 4}, {"num_classes": 7, "eps": 1e-3}),
        spatial=(1, 2, 3),
        extra=classes(4),
    ),
    Case(
        cls=equinorm.ConditionalInstanceNorm,
        args=(6,),
        reference=conditional.conditional_instance,
        options=({"num_classes": 5},),
        spatial=(1, 2, 3),
        extra=vector(5),
        bad={"classes": (lambda: equinorm.ConditionalInstanceNorm(6, 0), ValueError, "ConditionalInstanceNorm: num_classes must be")},
    ),
    Case(
        cls=equinorm.ConditionalBatchNorm,
        args=(6,),
        reference=conditional.conditional_batch,
        options=(
            {"cond_dim": 5},
            {"num_classes": 5},  # a blend
            {"cond_dim": 5, "hidden_dim": 3, "momentum": None, "eps": 1e-3},
            {"num_classes": 5, "track_running_stats": False},
        ),
        extra=vector(5),
        bad={
            "neither": (lambda: equinorm.ConditionalBatchNorm(6), ValueError, "ConditionalBatchNorm: give either .* got num_classes=None"),
            "both": (lambda: equinorm.ConditionalBatchNorm(6, 3, 4), ValueError, "give either .* got num_classes=3 and cond_dim=4"),
            "mixed": (lambda: equinorm.ConditionalBatchNorm(6, 3, hidden_dim=4), ValueError, "belong to cond_dim"),
            "init_std": (lambda: equinorm.ConditionalBatchNorm(6, cond_dim=3, init_std=-1.0), ValueError, "init_std must be .* got -1.0"),
            "momentum": (lambda: equinorm.ConditionalBatchNorm(6, 3, momentum=2.0), ValueError, "ConditionalBatchNorm: momentum"),
        },
    ),
    Case(
        cls=equinorm.FiLM,
        args=(6, 5),
        reference=conditional.film,
        options=({}, {"zero_init": True}),
        extra=vector(5),
        masked=False,
        bad={"cond_dim": (lambda: equinorm.FiLM(6, 0), ValueError, "FiLM: cond_dim must be an integer of at least 1, got 0")},
    ),
    Case(
        cls=equinorm.AdaLayerNorm,
        args=(6, 4),
        reference=conditional.ada_layer,
        options=({}, {"eps": 1e-3}, {"zero_init": False}),
        geometry="row",
        shape=(4, 5, 6),
        extra=vector(4),
        bad={"dim": (lambda: equinorm.AdaLayerNorm(0, 4), ValueError, "AdaLayerNorm: dim must be")},
    ),
    Case(
        cls=AdaLayerNormZero,
        args=(6, 4),
        reference=conditional.ada_layer_zero,
        options=({}, {"eps": 1e-3}),
        geometry="row",
        shape=(4, 5, 6),
        extra=vector(4),
        bad={"dim": (lambda: equinorm.AdaLayerNormZero(0, 4), ValueError, "AdaLayerNormZero: dim must be")},
    ),
    Case(
        cls=equinorm.EvoNormB,
        args=(6,),
        reference=evonorm.series_b,
        options=(
            {},
            {"variant": "B1", "eps": 1e-3},
            {"variant": "B2", "affine": False},
            {"apply_act": False},
            {"apply_act": False, "keep_norm": True},
        ),
        bad={
            "variant": (lambda: equinorm.EvoNormB(6, "S0"), ValueError, "EvoNormB: variant must be one of B0, B1, B2, got 'S0'"),
            "keep_norm": (lambda: equinorm.EvoNormB(6, keep_norm=True), ValueError, "EvoNormB: keep_norm says what"),
            "momentum": (lambda: equinorm.EvoNormB(6, momentum=2.0), ValueError, "EvoNormB: momentum must be a number in"),
        },
    ),
    Case(
        cls=equinorm.EvoNormS,
        args=(6,),
        reference=evonorm.series_s,
        options=(
            {"groups": 3},
            {"groups": 2, "variant": "S1", "eps": 1e-3},
            {"group_size": 3, "variant": "S2", "affine": False},
            {"groups": 3, "apply_act": False},
            {"groups": 3, "apply_act": False, "keep_norm": True, "variant": "S2"},
        ),
        bad={
            "groups": (lambda: equinorm.EvoNormS(6), ValueError, "EvoNormS: groups must divide num_features, got 32 groups for 6 channels"),
            "group_size": (lambda: equinorm.EvoNormS(6, group_size=4), ValueError, "EvoNormS: group_size must divide num_features, got 4"),
            "variant": (lambda: equinorm.EvoNormS(6, 3, "B0"), ValueError, "EvoNormS: variant must be one of S0, S1, S2, got 'B0'"),
            "keep_norm": (lambda: equinorm.EvoNormS(6, 3, keep_norm=True), ValueError, "EvoNormS: keep_norm says what"),
            "one value": (
                lambda: equinorm.EvoNormS(6, 6)(torch.zeros(4, 6)),
                ValueError,
                "EvoNormS: a group needs more than one value to have a variance",
            ),
        },
    ),
    Case(
        cls=equinorm.SPADE,
        args=(6, 2),
        reference=conditional.spade,
        options=(
            {"hidden_channels": 3},
            {"hidden_channels": 3, "norm": "instance", "kernel_size": 1},
            {"hidden_channels": 3, "momentum": None, "eps": 1e-3},
        ),
        spatial=(2,),
        extra=labels(2),
        wide_products=False,
        bad={
            "norm": (lambda: equinorm.SPADE(6, 2, norm="layer"), ValueError, "SPADE: norm must be .* got 'layer'"),
            "kernel": (lambda: equinorm.SPADE(6, 2, kernel_size=4), ValueError, "SPADE: kernel_size must be odd.* got 4"),
            "rank": (lambda: equinorm.SPADE(6, 2, spatial_dims=4), ValueError, "SPADE: spatial_dims must be 1, 2 or 3, got 4"),
            "group": (lambda: equinorm.SPADE(6, 2, norm="instance", process_group="world"), ValueError, "process_group must be None"),
        },
    ),
    Case(
        cls=equinorm.MixtureNorm,
        args=(6,),
        reference=mixture.mixture,
        options=(
            {},
            {"num_components": 2, "em_steps": 1, "momentum": 0.5},
            {"num_components": 1, "affine": False},
            {"fisher_scale": False, "eps": 1e-3},
        ),
        derivative=False,  # the posteriors are constants to it
        ready=fitted,
        bad={
            "num_components": (lambda: equinorm.MixtureNorm(6, 0), ValueError, "MixtureNorm: num_components must be an integer"),
            "em_steps": (lambda: equinorm.MixtureNorm(6, em_steps=0), ValueError, "MixtureNorm: em_steps must be an integer of at least 1"),
            "momentum": (lambda: equinorm.MixtureNorm(6, momentum=None), ValueError, r"MixtureNorm: momentum must be a number in \[0, 1\]"),
            "responsibilities": (
                lambda: equinorm.MixtureNorm(6)(torch.zeros(4, 6, 5), responsibilities=torch.zeros(4, 3, 6)),
                ValueError,
                r"MixtureNorm: responsibilities must have shape \(N, K\) = \(4, 3\) or \(N, K, \*S\) = \(4, 3, 5\), got \(4, 3, 6\)",
            ),
        },
    ),
    Case(
        cls=equinorm.AttentiveNorm,
        args=(6, 4),
        reference=learned.attentive,
        options=(
            {},
            {"norm": "group", "num_groups": 3, "attention": "hsigmoid"},
            {"norm": "group", "num_groups": 2},
            {"attention": "sigmoid", "track_running_stats": False},
            {"attention": "hidden_sigmoid"},
            {"attention": "hidden_norm_hsigmoid", "momentum": None, "eps": 1e-3},
            {"attention": "norm_sigmoid", "normalize_attention": True},
            {"attention": "norm_softmax", "track_running_stats": False},
        ),
        spatial=(1, 2, 3),
        bad={
            "norm": (lambda: equinorm.AttentiveNorm(6, norm="layer"), ValueError, "AttentiveNorm: norm must be .* got 'layer'"),
            "head": (lambda: equinorm.AttentiveNorm(6, attention="relu"), ValueError, "attention must be one of sigmoid, .* got 'relu'"),
            "groups": (lambda: equinorm.AttentiveNorm(6, norm="group", num_groups=4), ValueError, "num_groups must divide .* got 4 groups"),
            "mixtures": (lambda: equinorm.AttentiveNorm(6, 0), ValueError, "AttentiveNorm: num_mixtures must be"),
            "process_group": (
                lambda: equinorm.AttentiveNorm(6, norm="group", num_groups=3, process_group="world"),
                ValueError,
                "process_group must be None",
            ),
        },
    ),
    Case(
        cls=equinorm.OnlineNorm,
        args=(6,),
        reference=online.online,
        options=(
            {},
            {"alpha_fwd": 0.9, "alpha_bkw": 0.8, "ecm": None},
            {"alpha_fwd": 0.9, "alpha_bkw": 0.8, "ecm": "ac", "clamp_val": 1.0},
            {"alpha_fwd": 0.5, "alpha_bkw": 0.5, "affine": False, "ls_eps": 0.1, "eps": 1e-3},
            {"alpha_fwd": 0.9, "alpha_bkw": 0.1, "ecm": None, "clip_control": True},
        ),
        derivative=False,
        steady=False,
        bad={
            "alpha_fwd": (lambda: equinorm.OnlineNorm(6, 1.5), ValueError, r"OnlineNorm: alpha_fwd must be a number in \[0, 1\], got 1.5"),
            "alpha_bkw": (lambda: equinorm.OnlineNorm(6, alpha_bkw=-1), ValueError, "OnlineNorm: alpha_bkw must be a number in"),
            "ecm": (lambda: equinorm.OnlineNorm(6, ecm="gs"), ValueError, "OnlineNorm: ecm must be .* got 'gs'"),
            "clamp_val": (lambda: equinorm.OnlineNorm(6, clamp_val=0.0), ValueError, "OnlineNorm: clamp_val must be positive, got 0"),
            "ls_eps": (lambda: equinorm.OnlineNorm(6, ls_eps=-1.0), ValueError, "OnlineNorm: ls_eps must be"),
        },
    ),
    Case(
        cls=equinorm.LayerScaling,
        args=(),
        reference=online.layer_scaling,
        options=({}, {"group_size": 2, "eps": 1e-3}),
        counted=False,
        bad={
            "group_size": (
                lambda: equinorm.LayerScaling(0),
                ValueError,
                "LayerScaling: group_size must be an integer of at least 1, got 0",
            ),
            "channels": (
                lambda: equinorm.LayerScaling(4)(torch.zeros(2, 6)),
                ValueError,
                "LayerScaling: group_size must divide the number of channels, got 4 for 6",
            ),
        },
    ),
    Case(
        cls=equinorm.ILMNorm,
        args=(6,),
        reference=learned.ilm,
        options=(
            {"num_groups": 3, "key_group_size": 2},
            {"norm": "instance", "key_group_size": 1, "reduction": 2},
            {"norm": "layer", "key_group_size": 3, "eps": 1e-3},
        ),
        bad={
            "norm": (lambda: equinorm.ILMNorm(32, norm="batch"), ValueError, "ILMNorm: norm must be .* got 'batch'"),
            "groups": (lambda: equinorm.ILMNorm(48), ValueError, "ILMNorm: num_groups must divide .* got 32 groups for 48 channels"),
            "keys": (lambda: equinorm.ILMNorm(24, num_groups=3), ValueError, "key_group_size must divide .* got 16 for 24 .* use one of"),
        },
    ),
    Case(
        cls=equinorm.SparseSwitchNorm,
        args=(6,),
        reference=learned.sparse_switch,
        options=(
            {},
            {"momentum": None, "affine": False},
            {"center": "support", "using": ("layer", "batch")},
            {"last_gamma": True, "track_running_stats": False},
            {"transform": "sparsemax", "using": ("batch", "instance")},
        ),
        spatial=(1, 2, 3),
        ready=lambda module, x: module.set_radius(0.4),
        bad={
            "using": (lambda: equinorm.SparseSwitchNorm(6, using=("layer",)), ValueError, "using must name two or three .* got"),
            "unknown": (lambda: equinorm.SparseSwitchNorm(6, using=("layer", "group")), ValueError, "using must name two or three"),
            "transform": (lambda: equinorm.SparseSwitchNorm(6, transform="softmax"), ValueError, "transform must be .* 'softmax'"),
            "center": (lambda: equinorm.SparseSwitchNorm(6, center="top"), ValueError, "center must be .* got 'top'"),
            "radius": (lambda: equinorm.SparseSwitchNorm(6).set_radius(-1.0), ValueError, "radius must be at least 0, got -1.0"),
        },
    ),
    Case(
        cls=equinorm.PowerNorm,
        args=(6,),
        reference=moving.power,
        options=(
            {"channel_dim": 1},
            {"channel_dim": 1, "num_groups": None, "warmup_iters": 1, "alpha_fwd": 0.5},
            {"channel_dim": 1, "num_groups": 3, "warmup_iters": 0, "alpha_bkw": 0.6, "affine": False},
            {"channel_dim": 1, "variant": "PN-V", "warmup_iters": 2, "eps": 1e-3},
        ),
        derivative=False,
        bad={
            "alpha_fwd": (lambda: equinorm.PowerNorm(6, alpha_fwd=2.0), ValueError, "PowerNorm: alpha_fwd must be a number in"),
            "alpha_bkw": (lambda: equinorm.PowerNorm(6, alpha_bkw=-1.0), ValueError, "PowerNorm: alpha_bkw must be a number in"),
            "groups": (lambda: equinorm.PowerNorm(6, num_groups=4), ValueError, "PowerNorm: num_groups must divide num_features, got 4"),
            "warmup": (
                lambda: equinorm.PowerNorm(6, warmup_iters=-1),
                ValueError,
                "PowerNorm: warmup_iters must be",
            ),
            "variant": (lambda: equinorm.PowerNorm(6, variant="PN-X"), ValueError, "PowerNorm: variant must be .* got 'PN-X'"),
            "dim": (lambda: equinorm.PowerNorm(6, channel_dim=2), ValueError, "PowerNorm: channel_dim must be 1 .* or -1 .*, got 2"),
        },
    ),
    Case(
        cls=equinorm.MovingAverageBatchNorm,
        args=(6,),
        reference=moving.moving_average_batch,
        options=(
            {},
            {"buffer_size": 2, "warmup_iters": 0, "alpha": 0.7, "eps": 1e-3},
            {"buffer_size": 3, "warmup_iters": 2, "affine": False},
        ),
        derivative=False,
        steady=False,
        bad={
            "buffer": (lambda: equinorm.MovingAverageBatchNorm(6, 0), ValueError, "MovingAverageBatchNorm: buffer_size must be an integer"),
            "alpha": (lambda: equinorm.MovingAverageBatchNorm(6, alpha=2), ValueError, "MovingAverageBatchNorm: alpha must be a number in"),
            "clip": (lambda: equinorm.MovingAverageBatchNorm(6, clip=0.5), ValueError, "MovingAverageBatchNorm: clip bounds .* got 0.5"),
            "warmup": (
                lambda: equinorm.MovingAverageBatchNorm(6, warmup_iters=1.5),
                ValueError,
                "MovingAverageBatchNorm: warmup_iters must be an integer of at least 0, got 1.5",
            ),
        },
    ),
    Case(
        cls=LayerNormLSTM,
        args=(4, 4),
        reference=recurrent.lstm,
        options=(
            {"batch_first": True},
            {"batch_first": True, "gate_norm": "per_gate", "forget_bias": 1.0, "bias": False},
            {"batch_first": True, "num_layers": 2, "eps": 1e-3},
        ),
        geometry="row",
        shape=(3, 2, 4),
        masked=False,
        wide_products=False,
        bad={
            "hidden": (lambda: equinorm.LayerNormLSTM(6, 1), ValueError, "LayerNormLSTM: hidden_size must be at least 2"),
            "layers": (lambda: equinorm.LayerNormLSTM(6, 6, 0), ValueError, "LayerNormLSTM: num_layers must be"),
            "gates": (lambda: equinorm.LayerNormLSTM(6, 6, gate_norm="none"), ValueError, "gate_norm must be .* got 'none'"),
            "dropout": (lambda: equinorm.LayerNormLSTM(6, 6, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        },
    ),
    Case(
        cls=LayerNormGRU,
        args=(4, 4),
        reference=recurrent.gru,
        options=(
            {"batch_first": True},
            {"batch_first": True, "gate_norm": "per_gate"},
            {"batch_first": True, "num_layers": 2, "eps": 1e-3},
        ),
        geometry="row",
        shape=(3, 2, 4),
        masked=False,
        wide_products=False,
        bad={"gates": (lambda: equinorm.LayerNormGRU(6, 6, gate_norm="none"), ValueError, "gate_norm must be .* got 'none'")},
    ),
)
