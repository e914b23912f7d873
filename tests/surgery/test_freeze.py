"""Freezing: statistics that no train() moves, in copies and files too; and back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import equinorm
from equinorm.surgery import freeze, unfreeze
from tests.surgery import networks
from tests.surgery.networks import stir

IMAGE = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"itself": lambda m: m, "copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "file": saved}

NORMS = {
    "torch": lambda: nn.BatchNorm2d(3),
    "torch, instance": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "fused": lambda: networks.BatchNormAct2d(3),
    "ours": lambda: equinorm.BatchNorm(3),
    "in place": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), equinorm.InPlaceABN(3)),
    "whitening": lambda: equinorm.IterNorm(3),
    "moving average": lambda: equinorm.MovingAverageBatchNorm(3),
    "renorm": lambda: equinorm.BatchRenorm(3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NORMS)
def test_nothing_moves_and_training_computes_what_evaluation_does(name, way):
    model = stir(nn.Sequential(NORMS[name](), nn.Sequential(nn.Dropout(0.5))))
    with torch.no_grad():
        expected = model(IMAGE)
    keys = list(model.state_dict())
    plan = freeze(model)
    assert plan.applied
    assert list(model.state_dict()) == keys
    model = WAYS[way](model)
    before = copy.deepcopy(model.state_dict())
    model.train()
    assert model[1][0].training
    model[1][0].eval()
    torch.testing.assert_close(model(IMAGE), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    unfreeze(model)
    model.train()(IMAGE.clone())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_copy_is_independent():
    model = nn.Sequential(nn.BatchNorm2d(3))
    freeze(model)
    other = copy.deepcopy(model)
    unfreeze(other)
    model.train()
    other.train()
    assert (model[0].training, other[0].training) == (False, True)


def test_gradients_reach_the_affine_unless_it_is_frozen_too():
    model = stir(networks.resnet())
    freeze(model)
    model.train()(IMAGE).sum().backward()
    assert model[0][1].weight.grad is not None
    freeze(model, affine=True)
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert model[0][0].weight.requires_grad
    unfreeze(model, affine=True)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_where_and_what_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), equinorm.BatchNorm(3))
    plan = freeze(model, (nn.BatchNorm2d, nn.GroupNorm))
    assert [change.where for change in plan.changes] == [("0",)]
    assert [(r.where, r.reason) for r in plan.refusals] == [(("1",), "keeps no running statistics")]
    assert not model[2].frozen
    plan = freeze(model)
    assert [(r.where, r.reason) for r in plan.refusals] == [(("0",), "is frozen already")]
    assert [change.where for change in plan.changes] == [("2",)]
    assert [r.reason for r in unfreeze(nn.Sequential(nn.BatchNorm2d(3))).refusals] == ["is not frozen"]


def test_a_dry_run_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), equinorm.BatchNorm(3))
    assert not freeze(model, dry_run=True).applied
    assert not model[1].frozen
    model.train()
    assert model[0].training
    freeze(model)
    unfreeze(model, dry_run=True)
    model.train()
    assert not model[0].training


def test_models_without_running_statistics():
    with pytest.raises(
        ValueError, match=r"freeze: none of the norms in question \(LayerNorm2d\) keeps running statistics that training moves"
    ):
        freeze(networks.convnext())
    with pytest.raises(ValueError, match="unfreeze: the model holds no norm layer"):
        unfreeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"freeze: none of the norms in question \(FrozenBatchNorm2d\) keeps"):
        freeze(nn.Sequential(networks.FrozenBatchNorm2d(3)))
