"""Attentive norm: what the mixture of affine maps is, and what attention reads."""

from __future__ import annotations

import copy

import pytest
import torch

import equinorm
from equinorm.norms.attention import HEADS
from tests.helpers import assert_close, run_ranks


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("training", [True, False])
def test_one_pair_with_full_attention_is_the_norm(training):
    x = data(4, 6, 5, 3)
    for options, plain in (
        ({"norm": "batch", "attention": "norm_softmax"}, equinorm.BatchNorm(6)),
        ({"norm": "group", "num_groups": 3, "attention": "norm_softmax"}, equinorm.GroupNorm(3, 6)),
        ({"norm": "batch", "attention": "sigmoid", "normalize_attention": True}, equinorm.BatchNorm(6)),
    ):
        norm = equinorm.AttentiveNorm(6, 1, **options).double().train(training)
        plain = plain.double().train(training)
        plain.load_state_dict({"weight": norm.weight[0], "bias": norm.bias[0]}, strict=False)
        assert_close(norm(x), plain(x))


def test_softmax_over_identical_pairs_is_a_plain_affine_map():
    norm, plain, x = equinorm.AttentiveNorm(6, 4, attention="norm_softmax").double(), equinorm.BatchNorm(6).double(), data(4, 6, 5, 3)
    with torch.no_grad():
        for table, vector in ((norm.weight, plain.weight), (norm.bias, plain.bias)):
            vector.copy_(torch.randn(6))
            table.copy_(vector.expand(4, 6))
    assert_close(norm(x), plain(x))


@pytest.mark.parametrize(("attention", "gain"), [("norm_hsigmoid", 5.0), ("hsigmoid", 5.0), ("norm_softmax", 1.0)])
def test_the_scale_at_first_is_half_the_number_of_pairs(attention, gain):
    x = torch.randn(16, 64, 8, 8)
    std = equinorm.AttentiveNorm(64, 10, attention=attention)(x).std().item()
    assert abs(std / gain - 1) < 0.1
    std = equinorm.AttentiveNorm(64, 10, attention=attention, normalize_attention=True)(x).std().item()
    assert abs(std - 1) < 0.1


def test_attention_reads_the_sample_in_evaluation_too():
    norm = equinorm.AttentiveNorm(6, 4, attention="sigmoid").double().eval()
    x = data(2, 6, 5, 3)
    louder = x.clone()
    louder[0, 1] += 10.0
    changed = (norm(louder) - norm(x)).abs().amax((2, 3))
    assert changed[0].gt(0).all(), "every channel of the changed sample follows"
    assert not changed[1].any()


def test_group_form_does_not_see_the_batch():
    for attention in HEADS:
        norm, x = equinorm.AttentiveNorm(6, 4, norm="group", num_groups=3, attention=attention).double(), data(4, 6, 5, 3)
        assert_close(norm(x)[:1], norm(x[:1]))
        assert norm.running_mean is None


def test_frozen_estimates_hold_the_head_too():
    norm = equinorm.AttentiveNorm(6, 4).double()
    norm(data(4, 6, 5, 3))
    norm.frozen = True
    before, x = copy.deepcopy(norm.state_dict()), data(1, 6, 5, 3)
    assert torch.equal(norm(x), copy.deepcopy(norm).eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_sample_without_data_does_not_count():
    norm, x = equinorm.AttentiveNorm(6, 4).double(), data(4, 6, 5, 3)
    other = copy.deepcopy(norm)
    mask = torch.ones(4, 5, 3, dtype=torch.bool)
    mask[2] = False
    assert_close(norm(x, mask)[[0, 1, 3]], other(x[[0, 1, 3]]))
    for name, value in other.state_dict().items():
        if "running" in name:
            assert_close(norm.state_dict()[name].double(), value.double(), label=name)


def _rank(rank):
    torch.manual_seed(0)
    norm, x = equinorm.AttentiveNorm(6, 4, attention="hidden_norm_hsigmoid", process_group="world").double(), data(5, 6, 4)
    return norm(x[:1] if rank == 0 else x[1:]).detach(), norm.state_dict()


def test_one_sample_per_process_is_enough_together():
    shards = run_ranks(2, _rank)
    torch.manual_seed(0)
    norm, x = equinorm.AttentiveNorm(6, 4, attention="hidden_norm_hsigmoid").double(), data(5, 6, 4)
    assert_close(torch.cat([y for y, _ in shards]), norm(x))
    for _, state in shards:
        for name, value in norm.state_dict().items():
            assert_close(state[name].double(), value.double(), label=name)


@pytest.mark.parametrize("attention", ["norm_hsigmoid", "hidden_norm_hsigmoid", "norm_sigmoid", "norm_softmax"])
def test_one_sample_is_refused_where_the_head_has_batch_norm(attention):
    norm = equinorm.AttentiveNorm(6, 4, attention=attention)
    with pytest.raises(ValueError, match=r"AttentiveNorm: the head's batch norm needs more than one sample.* got shape \(1, 6, 5, 3\)"):
        norm(torch.randn(1, 6, 5, 3))
    assert norm.eval()(torch.randn(1, 6, 5, 3)).isfinite().all()


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"AttentiveNorm: .* at least one spatial dimension"):
        equinorm.AttentiveNorm(6)(torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"AttentiveNorm: a group needs more than one value.* in 6 groups"):
        equinorm.AttentiveNorm(6, norm="group", num_groups=6)(torch.randn(4, 6, 1, 1))
    with pytest.raises(ValueError, match="AttentiveNorm: training needs more than one value per channel"):
        equinorm.AttentiveNorm(6, attention="sigmoid")(torch.randn(1, 6, 1))


def test_the_catalogue_finds_a_divisor():
    assert equinorm.create("attentive", 24, norm="group").num_groups == 24
    assert equinorm.create("attentive", 48, norm="group").num_groups == 24
