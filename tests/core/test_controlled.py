"""The primitive behind norms with a backward pass of their own: both paths against the formula."""

from __future__ import annotations

import pytest
import torch

from equinorm.core.controlled import controlled_norm
from tests.helpers import assert_close, assert_grads_close


def by_formula(x, center, scale, weight, bias, per, mask, dz, along, offset):
    """Output, gradients, and what the control process must be told."""
    mask = torch.ones(x.shape[0], 1, *x.shape[2:], dtype=torch.bool) if mask is None else mask
    small = [t.reshape(*t.shape, 1, 1) for t in (center, scale, along, offset)]
    center, scale, along, offset = (t.expand(x.shape[0], x.shape[1], 1, 1) for t in small)
    w = torch.ones(x.shape[1]).double() if weight is None else weight
    w = w.reshape(1, -1, 1, 1)
    y = (x - center) * scale
    z = y * w if bias is None else y * w + bias.reshape(1, -1, 1, 1)
    g, dz = torch.where(mask, dz * w, 0.0), torch.where(mask, dz, 0.0)
    dims = (0, 2, 3) if per == "batch" else (2, 3)
    count = mask.expand(x.shape).sum(dims).double()  # (C,) or (N, C)
    told = [(t.sum(dims) / count).reshape(-1, x.shape[1]) for t in (g, g * y)]
    dx = torch.where(mask, scale * (g + along * y) + offset, 0.0)
    return torch.where(mask, z, 0.0), {"x": dx, "weight": (dz * y).sum((0, 2, 3)), "bias": dz.sum((0, 2, 3))}, told


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "masked", "plain", "empty"])
@pytest.mark.parametrize(("per", "affine"), [("sample", True), ("batch", True), ("sample", False), ("batch", False)])
def test_both_paths_are_the_formula(dtype, form, per, affine):
    shape = (0 if form == "empty" else 4, 3, 5, 2)
    x = (torch.randn(shape).double() * 2 + 300).to(dtype)
    dz = torch.randn(shape).double().to(dtype)
    if form == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(shape[0], 1, *shape[2:]) < 0.6 if form == "masked" else None
    if mask is not None:
        mask[:, :, 0] = True
    rows = shape[0] if per == "sample" else 1
    center, scale, along, offset = (300 + torch.randn(rows, 3).double(), *torch.randn(3, rows, 3).double())
    weight, bias = torch.randn(2, 3).double().to(dtype) if affine else (None, None)
    told = []

    def control(mean_g, mean_gy, count):
        told.extend((mean_g, mean_gy))
        return along, offset

    leaves = {"x": x} if weight is None else {"x": x, "weight": weight, "bias": bias}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    poisoned = leaves["x"] if mask is None else torch.where(mask, leaves["x"], torch.nan)
    z = controlled_norm(
        poisoned,
        center,
        scale,
        leaves.get("weight"),
        leaves.get("bias"),
        control,
        per=per,
        mask=mask,
        impl="plain" if form == "plain" else "auto",
    )
    grads = torch.autograd.grad(z, list(leaves.values()), dz)
    exact = [None if t is None else t.double() for t in (weight, bias)]
    want, expected, averages = by_formula(x.double(), center, scale, *exact, per, mask, dz.double(), along, offset)
    assert z.dtype == dtype
    assert_close(z, want)
    assert_grads_close(dict(zip(leaves, grads, strict=True)), {name: expected[name] for name in leaves})
    if form != "empty":
        coarse = torch.float32 if dtype == torch.bfloat16 else dtype
        for actual, average in zip(told, averages, strict=True):
            assert_grads_close({"average": actual}, {"average": average}, dtype=coarse)


def test_the_control_process_runs_once_per_backward_and_whatever_needs_a_gradient():
    calls = []

    def control(mean_g, mean_gy, count):
        calls.append(count)
        return torch.zeros_like(mean_g), torch.zeros_like(mean_g)

    x, ones, weight = torch.randn(4, 3, 5), torch.ones(1, 3).double(), torch.ones(3, requires_grad=True)
    z = controlled_norm(x, ones * 0, ones, weight, None, control, per="batch")
    assert not calls
    z.sum().backward(retain_graph=True)
    z.sum().backward()
    assert calls == [20, 20]
