"""To synchronised statistics and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.surgery import freeze, sync, unsync
from tests.helpers import run_ranks
from tests.surgery import networks
from tests.surgery.networks import stir

IMAGE = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_torch_there_and_back_with_the_same_objects():
    model = stir(networks.resnet())
    objects, keys = {name: id(p) for name, p in model.named_parameters()}, list(model.state_dict())
    before = model(IMAGE)
    plan = sync(model)
    assert len(plan.changes) == 7
    assert sum(isinstance(m, equinorm.SyncBatchNorm) for m in model.modules()) == 7
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(IMAGE), before)
    assert all("pools over all processes already" in r.reason for r in sync(model).refusals)
    unsync(model)
    assert sum(isinstance(m, equinorm.BatchNorm) for m in model.modules()) == 7
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    torch.testing.assert_close(model(IMAGE), before)


@pytest.mark.parametrize("name", ["batch", "batch_renorm", "ghost_batch", "in_place_batch", "switch", "iterative", "moving_average_batch"])
def test_ours_get_a_process_group_and_lose_it(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), equinorm.create(name, 4))
    norm = model[1]
    if not hasattr(norm, "process_group"):
        assert "has no form that pools" in sync(model).refusals[0].reason
        return
    assert norm.process_group is None
    sync(model)
    assert norm is model[1]
    assert norm.process_group == "world"
    unsync(model)
    assert norm.process_group is None


def test_fused_forms_and_shared_norms():
    model = stir(networks.efficientnet())
    before, weight = model(IMAGE), model[1].weight
    sync(model)
    assert type(model[1][0]) is equinorm.SyncBatchNorm
    assert isinstance(model[1][1], nn.SiLU)
    assert model[1][0].weight is weight
    torch.testing.assert_close(model(IMAGE), before)
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.Sequential(shared))
    assert sync(model).changes[0].where == ("0", "1.0")
    assert model[0] is model[1][0]


def test_where_frozen_refused_and_dry():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    freeze(model, "0")
    plan = sync(model, dry_run=True)
    assert not plan.applied
    assert type(model[0]) is nn.BatchNorm2d
    assert [(r.where, r.reason) for r in plan.refusals] == [(("2",), "has no form that pools over processes")]
    sync(model, where="0")
    assert type(model[1]) is nn.BatchNorm2d
    assert model[0].frozen
    unsync(model)
    assert model[0].frozen


class Odd(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input) + 1


def test_bad_input():
    with pytest.raises(ValueError, match="sync: the model is itself a norm, BatchNorm2d"):
        sync(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="unsync: no norm of Sequential is synchronised"):
        unsync(networks.resnet())
    with pytest.raises(ValueError, match="sync: no norm matches"):
        sync(networks.resnet(), where="nowhere")
    model = nn.Sequential(Odd(3))
    assert "has no form" in sync(model).refusals[0].reason
    assert type(model[0]) is Odd


def test_a_parametrized_norm_is_refused():
    for norm in (nn.BatchNorm2d(3), nn.SyncBatchNorm(3)):
        model = nn.Sequential(norm)
        nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
        plan = (unsync if isinstance(norm, nn.SyncBatchNorm) else sync)(model)
        assert "has a parametrization, which the norm in its place would lose" in plan.refusals[0].reason
        assert model[0] is norm


def trained(rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = stir(networks.resnet())
    sync(model)
    model.train()(IMAGE[2 * rank : 2 * rank + 2])
    return [buffer.clone() for buffer in model.buffers()]


def test_two_processes_have_the_statistics_of_one():
    torch.manual_seed(0)
    model = stir(networks.resnet())
    copy.deepcopy(model)
    model.train()(IMAGE)
    for buffers in run_ranks(2, trained):
        for a, b in zip(buffers, model.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
