from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equinorm import DeepNorm, deepnorm_constants, deepnorm_init_
from tests.helpers import assert_close


def test_constants_of_the_specification():
    decoder = deepnorm_constants(decoder_layers=12)
    assert (decoder.encoder_alpha, decoder.encoder_beta) == (None, None)
    assert decoder.decoder_alpha == pytest.approx(2.213364, abs=1e-6)
    assert decoder.decoder_beta == pytest.approx(0.319472, abs=1e-6)
    encoder = deepnorm_constants(encoder_layers=12)
    assert encoder[:2] == decoder[2:]
    assert deepnorm_constants(6, 6) == pytest.approx((1.4179, 0.4970, 2.0598, 0.3433), abs=5e-5)


def test_alpha_one_is_post_norm_and_the_skip_is_what_is_boosted():
    x, g = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    assert_close(DeepNorm(6, 1.0)(x, g), F.layer_norm(x + g, (6,)))
    assert_close(DeepNorm(6, 3.0)(x, g), F.layer_norm(3 * x + g, (6,)))
    assert_close(DeepNorm((3, 6), 3.0)(x, g), F.layer_norm(3 * x + g, (3, 6)))


def test_initialisation_of_torchs_layers():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(64, 4, 256)
    found = deepnorm_init_(layer, 0.25)
    assert len(found) == 6
    glorot = (2 / 128) ** 0.5
    for attention in (layer.self_attn, layer.multihead_attn):
        q, k, v = attention.in_proj_weight.chunk(3)
        assert q.std().item() == pytest.approx(glorot, rel=0.05)
        assert k.std().item() == pytest.approx(glorot, rel=0.05)
        assert v.std().item() == pytest.approx(0.25 * glorot, rel=0.05)
        assert attention.out_proj.weight.std().item() == pytest.approx(0.25 * glorot, rel=0.05)
        assert not attention.in_proj_bias.any()
    for linear in (layer.linear1, layer.linear2):
        assert linear.weight.std().item() == pytest.approx(0.25 * (2 / 320) ** 0.5, rel=0.05)
        assert not linear.bias.any()


def test_initialisation_of_separate_projections_and_own_names():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, kdim=32, vdim=48)
    assert deepnorm_init_(attention, 0.5) == ["v_proj_weight", "out_proj.weight"]
    assert attention.v_proj_weight.std().item() == pytest.approx(0.5 * (2 / 112) ** 0.5, rel=0.05)
    assert attention.k_proj_weight.std().item() == pytest.approx((2 / 96) ** 0.5, rel=0.05)
    model = nn.ModuleDict({"query": nn.Linear(64, 64), "mix": nn.Linear(64, 64, bias=False)})
    assert deepnorm_init_(model, 0.5, scaled=lambda name: name == "mix") == ["mix.weight"]
    assert model["mix"].weight.std().item() == pytest.approx(0.5 * (2 / 128) ** 0.5, rel=0.05)
    assert model["query"].weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)


class Block(nn.Module):
    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = DeepNorm(width, alpha)

    def forward(self, x):
        return self.norm(x, self.fc2(self.fc1(x).relu()))


def test_why_alpha_and_beta_are_there():
    """One step of SGD on a deep stack moves its output far less with the constants than as plain post-norm."""

    def movement(alpha: float, beta: float) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(*[Block(32, alpha) for _ in range(60)])
        deepnorm_init_(model, beta)
        x, target = torch.randn(64, 32), torch.randn(64, 32)
        before = model(x)
        (before - target).square().mean().mul(32).backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
        return (model(x) - before).norm().item() / before.norm().item()

    constants = deepnorm_constants(encoder_layers=60)
    assert movement(constants.encoder_alpha, constants.encoder_beta) < 0.2 * movement(1.0, 1.0)


def test_errors():
    with pytest.raises(ValueError, match=r"must be at least 0 and not both 0, got 0 and 0"):
        deepnorm_constants()
    with pytest.raises(ValueError, match=r"got -1 and 2"):
        deepnorm_constants(-1, 2)
    with pytest.raises(ValueError, match=r"beta must be positive, got 0"):
        deepnorm_init_(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match=r"at least one linear layer of Linear must get beta, found none; pass scaled=.*fc1, fc2"):
        deepnorm_init_(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 4\) and \(2, 3\)"):
        DeepNorm(4, 1.0)(torch.randn(2, 4), torch.randn(2, 3))
