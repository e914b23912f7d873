"""equinorm: every published normalization method for PyTorch, exact and fast, and the instruments to choose among them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Statistics over the batch
from equinorm.norms.moving_average_batch import MovingAverageBatchNorm as MovingAverageBatchNorm
from equinorm.norms.power import PowerNorm as PowerNorm
from equinorm.norms.online import OnlineNorm as OnlineNorm
from equinorm.norms.activation import ActNorm as ActNorm
from equinorm.norms.evonorm_b import EvoNormB as EvoNormB
from equinorm.norms.batch import BatchNorm as BatchNorm
from equinorm.norms.batch_channel import BatchChannelNorm as BatchChannelNorm
from equinorm.norms.batch_renorm import BatchRenorm as BatchRenorm
from equinorm.norms.ghost_batch import GhostBatchNorm as GhostBatchNorm
from equinorm.norms.in_place_batch import InPlaceABN as InPlaceABN
from equinorm.norms.mean_only_batch import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from equinorm.norms.sync_batch import SyncBatchNorm as SyncBatchNorm
from equinorm.norms.sync_batch import convert_sync_batchnorm as convert_sync_batchnorm
from equinorm.norms.sync_batch import revert_sync_batchnorm as revert_sync_batchnorm
from equinorm.norms.virtual_batch import VirtualBatchNorm as VirtualBatchNorm
from equinorm.norms.virtual_batch import virtual_batch as virtual_batch

# Statistics within a sample
from equinorm.norms.layer_scaling import LayerScaling as LayerScaling
from equinorm.norms.evonorm_s import EvoNormS as EvoNormS
from equinorm.norms.filter_response import FilterResponseNorm as FilterResponseNorm
from equinorm.norms.filter_response_tlu import FilterResponseNormTLU as FilterResponseNormTLU
from equinorm.norms.global_response import GlobalResponseNorm as GlobalResponseNorm
from equinorm.norms.group import GroupNorm as GroupNorm
from equinorm.norms.instance import InstanceNorm as InstanceNorm
from equinorm.norms.layer import LayerNorm as LayerNorm
from equinorm.norms.layer_gru import LayerNormGRU as LayerNormGRU
from equinorm.norms.layer_gru import LayerNormGRUCell as LayerNormGRUCell
from equinorm.norms.layer_lstm import LayerNormLSTM as LayerNormLSTM
from equinorm.norms.layer_lstm import LayerNormLSTMCell as LayerNormLSTMCell
from equinorm.norms.pixel import PixelNorm as PixelNorm
from equinorm.norms.positional import DynamicMomentShortcut as DynamicMomentShortcut
from equinorm.norms.positional import MomentShortcut as MomentShortcut
from equinorm.norms.positional import PositionalNorm as PositionalNorm
from equinorm.norms.query_key import QKNorm as QKNorm
from equinorm.norms.rms import RMSNorm as RMSNorm
from equinorm.norms.scale import ScaleNorm as ScaleNorm
from equinorm.norms.thresholded_linear import TLU as TLU

# Statistics in a neighbourhood
from equinorm.norms.generalized_divisive import GeneralizedDivisiveNorm as GeneralizedDivisiveNorm
from equinorm.norms.local_contrast import DivisiveNorm as DivisiveNorm
from equinorm.norms.local_contrast import LocalContrastNorm as LocalContrastNorm
from equinorm.norms.local_contrast import SubtractiveNorm as SubtractiveNorm
from equinorm.norms.local_response import LocalResponseNorm as LocalResponseNorm

# Correlation between channels removed
from equinorm.norms.decorrelated_batch import DecorrelatedBatchNorm as DecorrelatedBatchNorm
from equinorm.norms.iterative import IterNorm as IterNorm

# Learned mixtures
from equinorm.norms.attentive import AttentiveNorm as AttentiveNorm
from equinorm.norms.ilm import ILMNorm as ILMNorm
from equinorm.norms.selection import SparsestMaxScheduler as SparsestMaxScheduler
from equinorm.norms.selection import ssn_to_fixed as ssn_to_fixed
from equinorm.norms.sparse_switch import SparseSwitchNorm as SparseSwitchNorm
from equinorm.norms.sparsestmax import sparsemax as sparsemax
from equinorm.norms.sparsestmax import sparsestmax as sparsestmax
from equinorm.norms.mixture import MixtureNorm as MixtureNorm
from equinorm.norms.mode import ModeNorm as ModeNorm
from equinorm.norms.mode_group import ModeGroupNorm as ModeGroupNorm
from equinorm.norms.switch import SwitchNorm as SwitchNorm

# An affine map from a condition
from equinorm.conditional.ada_layer import AdaLayerNorm as AdaLayerNorm
from equinorm.conditional.ada_layer_zero import AdaLayerNormZero as AdaLayerNormZero
from equinorm.conditional.adaptive_instance import AdaptiveInstanceNorm as AdaptiveInstanceNorm
from equinorm.conditional.adaptive_instance import adaptive_instance_norm as adaptive_instance_norm
from equinorm.conditional.conditional_batch import ConditionalBatchNorm as ConditionalBatchNorm
from equinorm.conditional.conditional_instance import ConditionalInstanceNorm as ConditionalInstanceNorm
from equinorm.conditional.film import FiLM as FiLM
from equinorm.conditional.sequential import ConditionalSequential as ConditionalSequential
from equinorm.conditional.spade import SPADE as SPADE

# Weights: parametrizations (functions that take a layer and return it) and layers that carry one
from equinorm.weight.centered import centered_weight_norm as centered_weight_norm
from equinorm.weight.centering import CenConv1d as CenConv1d
from equinorm.weight.centering import CenConv2d as CenConv2d
from equinorm.weight.centering import CenConv3d as CenConv3d
from equinorm.weight.centering import weight_centering as weight_centering
from equinorm.weight.cosine import CosineLinear as CosineLinear  # isort: split
from equinorm.weight.cosine import CosineConv1d as CosineConv1d
from equinorm.weight.cosine import CosineConv2d as CosineConv2d
from equinorm.weight.cosine import CosineConv3d as CosineConv3d
from equinorm.weight.data_dependent import data_dependent_init_ as data_dependent_init_
from equinorm.weight.equalized import EqualizedConv1d as EqualizedConv1d
from equinorm.weight.equalized import EqualizedConv2d as EqualizedConv2d
from equinorm.weight.equalized import EqualizedConv3d as EqualizedConv3d
from equinorm.weight.equalized import EqualizedLinear as EqualizedLinear
from equinorm.weight.equalized import equalized_lr as equalized_lr
from equinorm.weight.fix import fix_norm as fix_norm
from equinorm.weight.forced import MPConv1d as MPConv1d
from equinorm.weight.forced import MPConv2d as MPConv2d
from equinorm.weight.forced import MPConv3d as MPConv3d
from equinorm.weight.forced import MPLinear as MPLinear
from equinorm.weight.forced import forced_weight_norm as forced_weight_norm
from equinorm.weight.forced import project_after_step as project_after_step
from equinorm.weight.forced import project_weights_ as project_weights_
from equinorm.weight.gains import ScaledActivation as ScaledActivation
from equinorm.weight.gains import variance_gain as variance_gain
from equinorm.weight.modulated import ModulatedConv2d as ModulatedConv2d
from equinorm.weight.modulated import modulated_conv2d as modulated_conv2d
from equinorm.weight.norm import weight_norm as weight_norm
from equinorm.weight.orthonormal import bjorck_orthonormal as bjorck_orthonormal
from equinorm.weight.scaled_standardization import ScaledWSConv1d as ScaledWSConv1d
from equinorm.weight.scaled_standardization import ScaledWSConv2d as ScaledWSConv2d
from equinorm.weight.scaled_standardization import ScaledWSConv3d as ScaledWSConv3d
from equinorm.weight.scaled_standardization import ScaledWSLinear as ScaledWSLinear
from equinorm.weight.scaled_standardization import scaled_weight_standardization as scaled_weight_standardization
from equinorm.weight.spectral import spectral_norm as spectral_norm
from equinorm.weight.stable_rank import stable_rank as stable_rank
from equinorm.weight.stable_rank import stable_rank_norm as stable_rank_norm
from equinorm.weight.stable_rank import stable_rank_projection as stable_rank_projection
from equinorm.weight.standardization import WSConv1d as WSConv1d
from equinorm.weight.standardization import WSConv2d as WSConv2d
from equinorm.weight.standardization import WSConv3d as WSConv3d
from equinorm.weight.standardization import WSLinear as WSLinear
from equinorm.weight.standardization import weight_standardization as weight_standardization

# Residual branches, bounded functions and gradients: signal preservation without statistics
from equinorm.residual.deep_norm import DeepNorm as DeepNorm
from equinorm.residual.deep_norm import deepnorm_constants as deepnorm_constants
from equinorm.residual.deep_norm import deepnorm_init_ as deepnorm_init_
from equinorm.residual.dynamic_erf import DynamicErf as DynamicErf
from equinorm.residual.dynamic_tanh import DynamicTanh as DynamicTanh
from equinorm.residual.fixup import FixupBlock as FixupBlock
from equinorm.residual.fixup import fixup_init_ as fixup_init_
from equinorm.residual.fixup import fixup_parameter_groups as fixup_parameter_groups
from equinorm.residual.gradient_clip import AdaptiveGradientClip as AdaptiveGradientClip
from equinorm.residual.gradient_clip import adaptive_clip_grad_ as adaptive_clip_grad_
from equinorm.residual.layer_scale import LayerScale as LayerScale
from equinorm.residual.magnitude import MPFourier as MPFourier
from equinorm.residual.magnitude import mp_cat as mp_cat
from equinorm.residual.magnitude import mp_silu as mp_silu
from equinorm.residual.magnitude import mp_sum as mp_sum
from equinorm.residual.normalized import NormalizedResidual as NormalizedResidual
from equinorm.residual.normalized import ScaledParameter as ScaledParameter
from equinorm.residual.normalized import normalize_after_step as normalize_after_step
from equinorm.residual.normalized import normalize_weights_ as normalize_weights_
from equinorm.residual.rezero import ReZero as ReZero
from equinorm.residual.scaling import ScaledResidual as ScaledResidual
from equinorm.residual.scaling import variance_preserving_sum as variance_preserving_sum
from equinorm.residual.skip_init import SkipInit as SkipInit

# Adversarial training: what keeps its scales in hand
from equinorm.gan.discriminator_block import DiscriminatorBlock as DiscriminatorBlock
from equinorm.gan.gradient_penalty import r1_penalty as r1_penalty
from equinorm.gan.lazy import LazyRegularizer as LazyRegularizer
from equinorm.gan.lazy import lazy_adam_hparams as lazy_adam_hparams
from equinorm.gan.minibatch_std import MinibatchStdDev as MinibatchStdDev
from equinorm.gan.path_length import PathLengthPenalty as PathLengthPenalty

# How weights begin
from equinorm import init as init

# The catalogue and the choice of implementation
from equinorm.catalogue import create as create
from equinorm.catalogue import find as find
from equinorm.facts import Facts as Facts
from equinorm.facts import Paper as Paper
from equinorm.kernels import plain as plain
from equinorm.kernels.pages import reuse_pages as reuse_pages

# Instruments, loaded when first used
if TYPE_CHECKING:
    from equinorm import surgery as surgery
    from equinorm.probe.run import probe as probe
else:

    def __getattr__(name: str) -> Any:
        if name in ("probe", "surgery"):
            return importlib.import_module(f"equinorm.{name}")
        raise AttributeError(f"module 'equinorm' has no attribute {name!r}")


__version__ = "0.1.0"
