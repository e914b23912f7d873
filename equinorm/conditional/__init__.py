"""Norms whose affine map is computed from a second input."""
