"""The EvoNorm family: the numbers of a small example, limits, and the forms without activation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import equinorm
from tests.helpers import assert_close

EXAMPLE = torch.tensor([-1.0, 0.0, 1.0, 4.0], dtype=torch.float64).reshape(1, 1, 4)


def small(variant, **options):
    series = {"B": equinorm.EvoNormB, "S": equinorm.EvoNormS}[variant[0]]
    more = {"groups": 1} if variant[0] == "S" else {}
    return series(1, variant=variant, eps=0.0, **more, **options).double()


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("S0", [-0.143755, 0, 0.390767, 2.099634]),
        ("S1", [-0.143755, 0, 0.390767, 2.099634]),
        ("S2", [-0.126780, 0, 0.344624, 1.851703]),
        ("B0", [-0.534522, 0, 0.348331, 0.681335]),
        ("B1", [-0.534522, 0, 0.235702, 0.377124]),
        ("B2", [-0.320377, 0, 0.534522, 2.138090]),
    ],
)
def test_the_numbers_of_a_small_example(variant, expected):
    assert (small(variant)(EXAMPLE).flatten() - torch.tensor(expected)).abs().max() < 5e-7


def test_s0_lies_between_half_a_norm_and_silu():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    norm = equinorm.EvoNormS(4, groups=2, eps=0.0).double()
    deviation = x.reshape(3, 2, -1).std(2, correction=0).repeat_interleave(2, 1).unsqueeze(2)
    assert_close(norm(x), F.silu(x) / deviation)
    torch.nn.init.zeros_(norm.v)
    assert_close(norm(x), x / (2 * deviation))


def test_b0_levels_off_at_one_over_v():
    norm = equinorm.EvoNormB(1).double()
    torch.nn.init.constant_(norm.v, 4.0)
    y = norm(torch.cat((torch.randn(63, 1), torch.full((1, 1), 1e6))).double())
    assert 0.23 < y.max() <= 0.25


@pytest.mark.parametrize("variant", ["B0", "B2"])
def test_two_of_the_batch_series_do_not_see_the_scale(variant):
    x = torch.randn(4, 1, 5, dtype=torch.float64)
    assert_close(small(variant)(x * 7), small(variant)(x))


@pytest.mark.parametrize("variant", ["B0", "B1", "B2", "S0", "S1", "S2"])
def test_without_activation_the_published_codes_have_no_norm(variant):
    norm = small(variant, apply_act=False)
    torch.nn.init.constant_(norm.weight, 3.0)
    torch.nn.init.constant_(norm.bias, 1.0)
    assert norm.v is None
    assert not list(norm.buffers())
    assert_close(norm(EXAMPLE), 3 * EXAMPLE + 1)
    kept = small(variant, apply_act=False, keep_norm=True)(EXAMPLE)
    divisor = EXAMPLE.square().mean().sqrt() if variant == "S2" else EXAMPLE.std(correction=0)
    assert_close(kept, EXAMPLE / divisor)


def test_group_size_and_groups_say_the_same():
    x = torch.randn(2, 6, 3)
    assert torch.equal(equinorm.EvoNormS(6, groups=3)(x), equinorm.EvoNormS(6, group_size=2)(x))
    assert equinorm.create("evonorm_s", 24).groups == 24


def test_the_running_variance_is_biased_and_replaces_the_batch_alone():
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    norm = equinorm.EvoNormB(2, momentum=1.0).double()
    y = norm(x)
    assert norm.running_var is not None
    assert_close(norm.running_var, x.var((0, 2), correction=0))
    assert_close(norm.eval()(x), y)


def test_a_bad_batch_and_a_frozen_module_leave_the_estimate():
    norm = equinorm.EvoNormB(2)
    assert norm.running_var is not None
    x = torch.randn(4, 2, 5)
    x[0, 0, 0] = torch.inf
    norm(x)
    assert norm.running_var[0] == 1
    assert norm.running_var[1] != 1
    before = norm.running_var.clone()
    norm.frozen = True
    assert torch.equal(norm(torch.ones(4, 2, 5)), norm.eval()(torch.ones(4, 2, 5)))
    assert torch.equal(norm.running_var, before)


def test_a_checkpoint_with_maps_of_one_position_loads():
    norm = equinorm.EvoNormB(3)
    state = {name: torch.rand(1, 3, 1, 1) for name in ("weight", "bias", "v", "running_var")}
    norm.load_state_dict(dict(state))
    assert torch.equal(norm.v, state["v"].flatten())


def test_one_value_per_channel_is_refused_before_anything_moves():
    norm = equinorm.EvoNormB(3)
    with pytest.raises(ValueError, match="EvoNormB: training needs more than one value per channel"):
        norm(torch.randn(1, 3))
    assert torch.equal(norm.running_var, torch.ones(3))
    assert equinorm.EvoNormS(3, 3, "S2")(torch.randn(2, 3)).isfinite().all()
