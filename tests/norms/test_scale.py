"""Scale norm: its relatives, the inside of its clamp, its parameter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import equinorm
from tests.helpers import assert_close


def test_at_the_start_it_is_rms_norm_without_weight():
    x = torch.randn(5, 3, 64, dtype=torch.float64)
    norm = equinorm.ScaleNorm(64, dtype=torch.float64)
    assert norm.scale.shape == ()
    assert_close(norm(x), equinorm.RMSNorm(64, eps=0.0, elementwise_affine=False)(x))


def test_an_integer_scale_is_a_floating_parameter():
    assert equinorm.ScaleNorm(4, init_scale=2).scale.dtype == torch.float32
    assert equinorm.ScaleNorm(4, init_scale=2).scale.item() == 2


@pytest.mark.parametrize("impl", ["auto", "plain"])
def test_rows_shorter_than_eps_are_scaled_by_a_constant(impl):
    norm = equinorm.ScaleNorm(3, eps=0.5, init_scale=2.0, dtype=torch.float64)
    x = torch.tensor([[0.1, 0.2, 0.1], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    y = norm(x, impl=impl)
    assert_close(y, x * torch.tensor([[4.0], [4.0], [0.4]], dtype=torch.float64))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert_close(dx[:2], torch.full((2, 3), 4.0, dtype=torch.float64))
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert second.isfinite().all()
    assert not second[:2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_square_beyond_their_range(dtype):
    x = torch.full((2, 4, 512), 300.0).to(dtype)
    y = equinorm.ScaleNorm(512, dtype=dtype)(x)
    assert_close(y, torch.ones(2, 4, 512, dtype=torch.float64) * equinorm.ScaleNorm(512, dtype=dtype).scale.double().item() / 512**0.5)


def test_with_fixed_embeddings_the_logits_are_scaled_cosines():
    words = equinorm.fix_norm(torch.nn.Linear(16, 50, bias=False))
    norm = equinorm.ScaleNorm(16, init_scale=3.0)
    x = torch.randn(7, 16)
    cosines = F.cosine_similarity(x[:, None], words.parametrizations.weight.original[None], dim=2)
    assert_close(words(norm(x)).double(), 3 * cosines.double(), dtype=torch.float32)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"ScaleNorm: eps must be finite and positive, .* got 0"):
        equinorm.ScaleNorm(4, eps=0.0)
    with pytest.raises(ValueError, match="ScaleNorm: num_features must be an integer of at least 1, got 0"):
        equinorm.ScaleNorm(0)
