"""Recalibration: exact statistics of any loader, over processes, and nothing else changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.surgery import freeze, recalibrate, swap
from tests.helpers import run_ranks
from tests.surgery import networks
from tests.surgery.networks import stir


def batches(count: int = 3, seed: int = 0, size: tuple[int, ...] = (3, 9, 9)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 + k, *size, generator=generator) * (1 + k) + k for k in range(count)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


FIRST = {
    "torch": lambda: nn.BatchNorm2d(3),
    "ours": lambda: equinorm.BatchNorm(3),
    "sync": lambda: equinorm.SyncBatchNorm(3),
    "ghost": lambda: equinorm.GhostBatchNorm(3, virtual_batch_size=1),
    "in place": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), equinorm.InPlaceABN(3)),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
}


@pytest.mark.parametrize("name", FIRST)
def test_population_is_that_of_one_batch_of_everything(name):
    norm = FIRST[name]()
    model = stir(nn.Sequential(norm, nn.ReLU()))
    layer = norm[1] if isinstance(norm, nn.Sequential) else norm
    data = batches()
    plan = recalibrate(model, data)
    inputs = data if layer is norm else [norm[0](x) for x in data]
    values = torch.cat([x.detach().double().movedim(1, 0).flatten(1) for x in inputs], 1)
    torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), values.var(1), rtol=1e-6, atol=0)
    assert layer.num_batches_tracked == 3
    assert plan.remarks == ["3 batches"]
    assert plan.applied


def test_average_is_what_momentum_none_gives():
    model = stir(networks.resnet())
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x in batches():
            reference.train()(x)
    recalibrate(model, batches(), mode="average")
    for (name, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_a_large_mean_loses_nothing():
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    data = [torch.randn(50, 2, dtype=torch.float64) + 1e6 + k for k in range(3)]
    recalibrate(model, data)
    torch.testing.assert_close(model[0].running_var, torch.cat(data).var(0), rtol=1e-9, atol=0)


def test_instance_norm_averages_over_samples():
    for norm in (nn.InstanceNorm2d(3, track_running_stats=True), equinorm.InstanceNorm(3, track_running_stats=True)):
        model = stir(nn.Sequential(norm))
        data = batches()
        recalibrate(model, data)
        x = torch.cat(data).flatten(2).double()
        torch.testing.assert_close(norm.running_mean.double(), x.mean(2).mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), x.var(2).mean(0), rtol=1e-6, atol=0)


def test_a_mask_keeps_padding_out():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = equinorm.BatchNorm(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(x, mask)

    x, mask = torch.randn(4, 3, 6), torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    model = Masked()
    recalibrate(model, [{"x": x[:2], "mask": mask[:2]}, {"x": x[2:], "mask": mask[2:]}])
    values = x.movedim(1, 0)[:, mask].double()
    torch.testing.assert_close(model.bn.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.bn.running_var.double(), values.var(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["batch_renorm", "iterative", "mixture", "switch", "moving_average_batch", "power", "mean_only_batch"])
def test_norms_with_another_state_run_their_own_training(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), equinorm.create(name, 4)).eval()
    before = state_of(model)
    settings = getattr(model[1], "momentum", None)
    plan = recalibrate(model, batches(size=(3, 4, 4)) * 4)
    assert "its own training forward" in plan.changes[0].what
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key, _ in model.named_parameters())
    assert any(not torch.equal(after[key], before[key]) for key, _ in model.named_buffers())
    assert getattr(model[1], "momentum", None) == settings
    assert not model[1].training


def test_loaders_and_signatures():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, image: Tensor, gain: float = 1.0) -> Tensor:
            return self.bn(image * gain)

    data = batches()
    expected = Two()
    recalibrate(expected, data)
    labelled = [(x, torch.zeros(len(x))) for x in data]
    for loader, options in (
        (labelled, {}),
        ([{"image": x} for x in data], {}),
        (iter(labelled), {}),
        (({"a": {"b": x}} for x in data), {"forward": lambda model, batch: model(batch["a"]["b"])}),
        (torch.utils.data.DataLoader(data, batch_size=None), {}),
        (data + batches(5, seed=9), {"batches": 3}),
    ):
        model = Two()
        recalibrate(model, loader, **options)
        assert same(model.state_dict(), expected.state_dict())
    model = Two()
    recalibrate(model, data, forward=lambda model, x: model(x, gain=2.0))
    torch.testing.assert_close(model.bn.running_mean, 2 * expected.bn.running_mean)


def test_everything_else_is_as_before():
    model = stir(nn.Sequential(*networks.resnet(), nn.Dropout(0.5)))
    model[1].train()
    model[1].bn1.momentum = 0.3
    modes = [module.training for module in model.modules()]
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    rng = torch.get_rng_state()
    seen = []
    model[-1].register_forward_hook(lambda module, args, y: seen.append((module.training, torch.equal(args[0], y))))
    recalibrate(model, (torch.rand(2, 3, 9, 9) for _ in range(2)))
    assert seen == [(False, True)] * 2  # dropout stays in evaluation
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert model[1].bn1.momentum == 0.3
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_fused_and_moved_norms():
    data = batches()
    model = stir(networks.efficientnet())
    plan = recalibrate(model, data)
    assert [change.where for change in plan.changes] == [("1",), ("3",), ("5",)]
    x = torch.cat([model[0](d) for d in data]).detach()
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    model = networks.Transformer()
    tokens = torch.arange(40).reshape(4, 10) % 11
    swap(model, "batch", calibrate={"tokens": tokens})
    recalibrate(model, [{"tokens": tokens}])
    torch.testing.assert_close(model.norms[0].norm.running_mean, model.embed(tokens).mean((0, 1)).detach(), rtol=1e-5, atol=1e-6)


def test_where_frozen_and_unreached():
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.frozen = (nn.BatchNorm2d(3) for _ in range(3))
            self.constant = networks.FrozenBatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.constant(self.frozen(self.used(x)))

    model = stir(Partly())
    freeze(model, "frozen")
    before = state_of(model)
    plan = recalibrate(model, batches())
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        f"used.{name}" for name, _ in model.used.named_buffers()
    }
    assert [(r.where[0], r.reason) for r in plan.refusals] == [
        ("frozen", "is frozen; unfreeze it first"),
        ("constant", "holds constants, which no training moves"),
    ]
    assert any("was not reached, and keeps its statistics" in text for text in plan.remarks)
    model = stir(networks.resnet())
    before = state_of(model)
    recalibrate(model, batches(), where="1.*")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if not name.startswith("1."))


def test_a_dry_run_runs_nothing():
    model = stir(networks.resnet())
    before = state_of(model)
    plan = recalibrate(model, [None], dry_run=True)
    assert len(plan.changes) == 7
    assert not plan.applied
    assert same(before, model.state_dict())


def failing() -> object:
    yield from batches(2)
    raise OSError("disk on fire")


BAD = {
    "empty loader": (lambda: {"loader": []}, ValueError, "recalibrate: the loader gave no batch; pass at least one"),
    "broken loader": (lambda: {"loader": failing()}, OSError, "disk on fire"),
    "another shape": (lambda: {"loader": [*batches(1), torch.randn(2, 4, 9, 9)]}, RuntimeError, "expected input"),
    "not finite": (lambda: {"loader": [*batches(1), torch.full((2, 3, 9, 9), torch.nan)]}, ValueError, "given values that are not finite"),
    "mode": (lambda: {"loader": [], "mode": "exact"}, ValueError, 'mode must be "population" or "average", got \'exact\''),
    "batches": (lambda: {"loader": [], "batches": 0}, ValueError, "batches must be an integer of at least 1, or None for all, got 0"),
    "where": (lambda: {"loader": [], "where": "x"}, ValueError, "recalibrate: no norm matches where='x'"),
    "empty tuple": (lambda: {"loader": [()]}, ValueError, "a batch is an empty tuple"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_all_statistics_alone(name):
    make, exception, message = BAD[name]
    model = stir(nn.Sequential(*networks.resnet()[:2], nn.Conv2d(8, 4, 1), equinorm.IterNorm(4)))
    before, modes = state_of(model), [module.training for module in model.modules()]
    options = make()
    with pytest.raises(exception, match=message):
        recalibrate(model, options.pop("loader"), **options)
    assert same(before, model.state_dict())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_models_without_running_statistics():
    with pytest.raises(ValueError, match="Sequential holds no norm with running statistics to measure"):
        recalibrate(networks.convnext(), batches())
    with pytest.raises(ValueError, match="the model holds no norm layer"):
        recalibrate(nn.Linear(3, 3), batches())
    model = nn.Sequential(nn.BatchNorm2d(3))
    freeze(model)
    with pytest.raises(ValueError, match="to measure; 0 is frozen; unfreeze it first"):
        recalibrate(model, batches())


def sync_model() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 4, 3), equinorm.SyncBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return stir(nn.Sequential(*layers, equinorm.InstanceNorm(4, track_running_stats=True)))


def on_rank(rank: int, mode: str) -> dict[str, Tensor]:
    model = sync_model()
    shares = [batches(3)[:2], [], batches(3)[2:]]
    recalibrate(model, shares[rank], mode=mode, process_group="world")
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["population", "average"])
def test_processes_with_unequal_shares_agree_with_one(mode):
    results = run_ranks(3, on_rank, mode)
    alone = sync_model()
    recalibrate(alone, batches(3), mode=mode)
    for state in results:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7, msg=name)


def nothing_anywhere(rank: int) -> str:
    try:
        recalibrate(sync_model(), [], process_group="world")
    except ValueError as error:
        return str(error)
    return "no error"


def test_no_batch_on_any_process():
    assert set(run_ranks(2, nothing_anywhere)) == {"recalibrate: the loader gave no batch on any process; pass at least one"}
