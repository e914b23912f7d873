"""equinorm: every published normalization method for PyTorch, exact and fast, and the instruments to choose among them."""

from __future__ import annotations

# Statistics over the batch
from equinorm.norms.batch import BatchNorm as BatchNorm
from equinorm.norms.batch_channel import BatchChannelNorm as BatchChannelNorm
from equinorm.norms.sync_batch import SyncBatchNorm as SyncBatchNorm
from equinorm.norms.sync_batch import convert_sync_batchnorm as convert_sync_batchnorm
from equinorm.norms.sync_batch import revert_sync_batchnorm as revert_sync_batchnorm

# Statistics within a sample
from equinorm.norms.global_response import GlobalResponseNorm as GlobalResponseNorm
from equinorm.norms.group import GroupNorm as GroupNorm
from equinorm.norms.instance import InstanceNorm as InstanceNorm
from equinorm.norms.layer import LayerNorm as LayerNorm
from equinorm.norms.rms import RMSNorm as RMSNorm

# Statistics in a neighbourhood
from equinorm.norms.local_response import LocalResponseNorm as LocalResponseNorm

# Learned mixtures
from equinorm.norms.mode import ModeNorm as ModeNorm
from equinorm.norms.mode_group import ModeGroupNorm as ModeGroupNorm
from equinorm.norms.switch import SwitchNorm as SwitchNorm

# An affine map from a condition
from equinorm.conditional.adaptive_instance import AdaptiveInstanceNorm as AdaptiveInstanceNorm
from equinorm.conditional.adaptive_instance import adaptive_instance_norm as adaptive_instance_norm
from equinorm.conditional.conditional_batch import ConditionalBatchNorm as ConditionalBatchNorm
from equinorm.conditional.conditional_instance import ConditionalInstanceNorm as ConditionalInstanceNorm

# Weights: parametrizations (functions that take a layer and return it) and layers that carry one
from equinorm.weight.cosine import CosineLinear as CosineLinear  # isort: split
from equinorm.weight.cosine import CosineConv1d as CosineConv1d
from equinorm.weight.cosine import CosineConv2d as CosineConv2d
from equinorm.weight.cosine import CosineConv3d as CosineConv3d
from equinorm.weight.data_dependent import data_dependent_init_ as data_dependent_init_
from equinorm.weight.norm import weight_norm as weight_norm
from equinorm.weight.spectral import spectral_norm as spectral_norm
from equinorm.weight.stable_rank import stable_rank as stable_rank
from equinorm.weight.stable_rank import stable_rank_norm as stable_rank_norm
from equinorm.weight.stable_rank import stable_rank_projection as stable_rank_projection
from equinorm.weight.standardization import WSConv1d as WSConv1d
from equinorm.weight.standardization import WSConv2d as WSConv2d
from equinorm.weight.standardization import WSConv3d as WSConv3d
from equinorm.weight.standardization import WSLinear as WSLinear
from equinorm.weight.standardization import weight_standardization as weight_standardization

# The catalogue and the choice of implementation
from equinorm.catalogue import create as create
from equinorm.catalogue import find as find
from equinorm.facts import Facts as Facts
from equinorm.facts import Paper as Paper
from equinorm.kernels import plain as plain

__version__ = "0.1.0"
