from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from equinorm import NormalizedResidual, ScaledParameter, normalize_after_step, normalize_weights_
from tests.helpers import assert_close


def reference(h, branch, alpha):
    """One vector at a time."""
    rows = []
    for a, b in zip(h.reshape(-1, h.shape[-1]), branch.reshape(-1, h.shape[-1]), strict=True):
        a, b = a / (a**2).sum() ** 0.5, b / (b**2).sum() ** 0.5
        mixed = a + alpha.abs() * (b - a)
        rows.append(mixed / (mixed**2).sum() ** 0.5)
    return torch.stack(rows).view(h.shape)


def test_equals_the_reference_with_unit_length():
    layer = NormalizedResidual(5).double()
    nn.init.normal_(layer.alpha.stored)
    h, branch = torch.randn(2, 3, 4, 5).double()
    assert_close(layer(h, branch), reference(h, branch, layer.alpha()).detach())
    assert_close(layer(h, branch).norm(dim=-1), torch.ones(3, 4).double())
    assert_close(layer(7 * h, 0.1 * branch), layer(h, branch).detach())


def test_alpha_zero_keeps_the_state_and_alpha_one_takes_the_branch():
    h, branch = nn.functional.normalize(torch.randn(2, 3, 5).double(), dim=-1)
    assert_close(NormalizedResidual(5, alpha_init=0.0).double()(h, 9 * branch), h)
    one = NormalizedResidual(5).double()
    one.alpha = ScaledParameter(5, 1.0, 0.5).double()
    assert_close(one(h, 9 * branch), branch)


def test_stored_scale_sets_adams_pace():
    slow, fast = ScaledParameter(3, 0.05, 1.0), ScaledParameter(3, 0.05, 0.1)
    for s in (slow, fast):
        assert_close(s(), torch.full((3,), 0.05))
        optimizer = torch.optim.Adam(s.parameters(), lr=0.01)
        s().sum().backward()
        optimizer.step()
    assert (0.05 - slow()).mean().item() == pytest.approx(0.01 * 0.05, rel=1e-3)
    assert (0.05 - fast()).mean().item() == pytest.approx(0.01 * 0.5, rel=1e-3)
    assert NormalizedResidual(16).alpha.stored[0].item() == 0.25
    assert "init=0.05, scale=0.25" in repr(NormalizedResidual(16))


def test_derivatives_zeros_half_copy_compile():
    layer = NormalizedResidual(4).double()
    h, branch = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer, (h, branch))
    assert torch.autograd.gradgradcheck(layer, (h, branch))
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(h, branch), layer(h, branch).detach())
    assert torch.equal(copy.deepcopy(layer)(h, branch), layer(h, branch))
    zeros = torch.zeros(2, 4, requires_grad=True)
    y = layer.float()(zeros, torch.zeros(2, 4))
    y.sum().backward()
    assert not y.any()
    assert zeros.grad.isfinite().all()
    x = (300 * torch.randn(2, 4)).half()
    y = layer(x, -x.flip(0))
    assert y.dtype == torch.float16
    assert_close(y, reference(x.double(), -x.flip(0).double(), layer.alpha().double()).detach())


def test_a_stack_stays_on_the_sphere_while_training():
    model = nn.ModuleDict({"up": nn.Linear(8, 16, bias=False), "down": nn.Linear(16, 8, bias=False), "add": NormalizedResidual(8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = normalize_after_step(model, optimizer, {"up.weight": 1, "down.weight": 0})
    h = nn.functional.normalize(torch.randn(4, 8), dim=-1)
    for _ in range(3):
        y = model["add"](h, model["down"](model["up"](h).relu()))
        assert_close(y.norm(dim=-1), torch.ones(4))
        optimizer.zero_grad()
        y[:, 0].sum().backward()
        optimizer.step()
        assert_close(model["up"].weight.norm(dim=1), torch.ones(16))
        assert_close(model["down"].weight.norm(dim=0), torch.ones(16))
    handle.remove()
    optimizer.step()
    assert (model["up"].weight.norm(dim=1) - 1).abs().max() > 1e-6


def test_plans():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).to(torch.bfloat16)
    before = model[0].bias.detach().clone()
    assert normalize_weights_(model, {"1.weight": 0, "*.weight": 1}) == ["0.weight", "1.weight"]
    assert torch.equal(model[0].bias, before)
    assert model[1].weight.dtype == torch.bfloat16
    kept = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"every pattern must match a parameter of the model; \*\.wieght matches none"):
        normalize_weights_(model, {"0.weight": 0, "*.wieght": 1})
    with pytest.raises(ValueError, match=r"0\.bias of shape \(6,\) must have dimension 1"):
        normalize_weights_(model, {"0.*": 1})
    assert torch.equal(model[0].weight, kept)


def test_errors():
    with pytest.raises(ValueError, match=r"one shape \(\.\.\., 4\), got \(2, 3\) and \(2, 3\)"):
        NormalizedResidual(4)(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(3, 4\)"):
        NormalizedResidual(4)(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"NormalizedResidual: eps must be positive, got 0"):
        NormalizedResidual(4, eps=0)
    with pytest.raises(ValueError, match=r"dim must be an integer of at least 1, got 0"):
        NormalizedResidual(0)
    with pytest.raises(ValueError, match=r"ScaledParameter: scale must differ from 0"):
        ScaledParameter(3, 1.0, 0.0)
