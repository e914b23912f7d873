"""equinorm: every published normalization method for PyTorch, exact and fast, and the instruments to choose among them."""

from __future__ import annotations

# Weights: parametrizations (functions that take a layer and return it) and layers that carry one
from equinorm.weight.standardization import WSConv1d as WSConv1d
from equinorm.weight.standardization import WSConv2d as WSConv2d
from equinorm.weight.standardization import WSConv3d as WSConv3d
from equinorm.weight.standardization import WSLinear as WSLinear
from equinorm.weight.standardization import weight_standardization as weight_standardization

__version__ = "0.1.0"
