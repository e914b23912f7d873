"""Query-key norm: what it promises to attention, for queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import equinorm
from tests.helpers import assert_close, assert_grads_close
from tests.references.norms import layer, rms


def example(heads=4, key_heads=2, dim=8):
    return torch.randn(2, heads, 5, dim, dtype=torch.float64), torch.randn(2, key_heads, 7, dim, dtype=torch.float64)


def test_the_original_replaces_the_root_of_the_dimension():
    q, k = example(key_heads=4)
    v = torch.randn(2, 4, 7, 3, dtype=torch.float64)
    norm = equinorm.QKNorm(8, "l2", init_scale=5.0, dtype=torch.float64)
    cosines = F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    want = torch.softmax(5 * cosines, -1) @ v
    assert_close(F.scaled_dot_product_attention(*norm(q, k), v, scale=norm.attention_scale), want)


def test_logits_are_bounded_by_the_scale():
    norm = equinorm.QKNorm(8, "l2", init_scale=3.0, dtype=torch.float64)
    q, k = norm(*(1e3 * x for x in example(key_heads=4)))
    assert (q @ k.mT).abs().max() <= 3
    same, _ = norm(k, k)
    assert_close((same * k).sum(-1), torch.full((2, 4, 7), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [{"kind": "rms", "eps": 0.0}, {"kind": "layer", "eps": 0.0}, {"kind": "l2", "init_scale": 2.0}],
    ids=lambda o: o["kind"],
)
def test_scaling_queries_or_keys_changes_nothing(options):
    norm = equinorm.QKNorm(8, dtype=torch.float64, **options)
    q, k = example()
    for got, want in zip(norm(q * 1e3, k * 1e-3), norm(q, k), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_queries_and_keys_have_gains_of_their_own(kind):
    norm = equinorm.QKNorm(8, kind, key_dim=6, dtype=torch.float64)
    assert sorted(norm.state_dict()) == ["k_norm.weight", "q_norm.weight"]
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    q, k = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    reference = rms if kind == "rms" else layer
    for got, x, own in zip(norm(q, k), (q, k), (norm.q_norm, norm.k_norm), strict=True):
        assert_close(got, reference(x, {"weight": own.weight}, eps=1e-6)[0])
    assert norm.attention_scale is None


def test_the_gradients_of_the_original_equal_its_formula():
    norm = equinorm.QKNorm(8, "l2", init_scale=2.0, dtype=torch.float64)
    q, k = (x.requires_grad_() for x in example())
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    results = []
    for q_out, k_out in (norm(q, k), (norm.scale * F.normalize(q, dim=-1), F.normalize(k, dim=-1))):
        grads = torch.autograd.grad((q_out * dq).sum() + (k_out * dk).sum(), (q, k, norm.scale))
        results.append(dict(zip(("q", "k", "scale"), grads, strict=True)))
    assert_grads_close(*results)


def test_the_start_of_the_scale():
    assert equinorm.QKNorm.scale_for_length(100) == pytest.approx(13.27, abs=0.005)
    assert equinorm.QKNorm(8, "l2", init_scale=2).scale.dtype == torch.float32
    constant = equinorm.QKNorm(8, "l2", init_scale=2.0, learnable_scale=False)
    assert list(constant.parameters()) == []
    assert constant.state_dict()["scale"].item() == 2
    with pytest.raises(ValueError, match="length must be greater than 1, got 1"):
        equinorm.QKNorm.scale_for_length(1)


@pytest.mark.parametrize("options", [{"kind": "rms"}, {"kind": "l2", "init_scale": 2.0}], ids=lambda o: o["kind"])
def test_padding_of_zeros_gives_logits_of_zero(options):
    norm = equinorm.QKNorm(8, **options)
    q, k = torch.zeros(3, 8, requires_grad=True), torch.randn(4, 8)
    logits = (lambda q, k: q @ k.mT)(*norm(q, k))
    assert not logits.any()
    assert torch.autograd.grad(logits.sum(), q)[0].isfinite().all()


def test_without_gains_the_norm_commutes_with_rotations():
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    q, k = example()
    for options in ({"kind": "rms", "learnable_scale": False}, {"kind": "l2", "init_scale": 2.0}):
        norm = equinorm.QKNorm(8, dtype=torch.float64, **options)
        for after, before in zip(norm(q @ rotation, k @ rotation), norm(q, k), strict=True):
            assert_close(after, before @ rotation)


def test_options_reach_the_norms():
    gemma = equinorm.QKNorm(8, weight_offset=1.0)
    assert not gemma.q_norm.weight.any()
    assert equinorm.QKNorm(8, "layer", bias=True).k_norm.bias is not None


def test_wrong_keys_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"QKNorm: the input must have shape \(\.\.\., 8\) for keys, got \(3, 6\)"):
        equinorm.QKNorm(8)(torch.randn(3, 8), torch.randn(3, 6))
    with pytest.raises(TypeError, match="QKNorm: the input must be floating point"):
        equinorm.QKNorm(8)(torch.randn(3, 8), torch.ones(3, 8).long())
    with pytest.raises(ValueError, match=r"kind 'l2' needs init_scale, .* got init_scale=None"):
        equinorm.QKNorm(8, "l2")
    with pytest.raises(ValueError, match="kind 'rms' has no scale of its own to start, got init_scale=2"):
        equinorm.QKNorm(8, init_scale=2.0)
    with pytest.raises(ValueError, match='eps must be positive for kind "l2"'):
        equinorm.QKNorm(8, "l2", eps=0.0, init_scale=1.0)
    with pytest.raises(TypeError, match=r"kind \"l2\" has no options \['bias'\]"):
        equinorm.QKNorm(8, "l2", init_scale=1.0, bias=True)
    with pytest.raises(ValueError, match='kind must be "rms", "layer" or "l2", got \'batch\''):
        equinorm.QKNorm(8, "batch")
