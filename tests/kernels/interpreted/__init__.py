"""Tests of the Triton kernels, run by tests/kernels/test_triton.py in processes of their own."""

from __future__ import annotations
