"""Synchronised batch norm: every split of the batch gives what one process gives; faults are errors on every process, soon."""

from __future__ import annotations

import copy
import time
import warnings

import pytest
import torch
from torch import nn

import equinorm
from tests.helpers import assert_close, assert_grads_close, run_ranks

CHANNELS = 6
SPLITS = {"unequal": (5, 0, 2), "reordered": (0, 2, 5), "even": (2, 3, 2)}
TOTAL = 7


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOTAL, CHANNELS, 3, 2, generator=generator, dtype=torch.float64) * 2 + 1
    return x.to(dtype), torch.randn(x.shape, generator=generator, dtype=torch.float64)


def share(tensor, sizes, rank):
    """The rows of one rank: consecutive shares of the given sizes."""
    return tensor.split(sizes)[rank]


def make(**options):
    norm = equinorm.SyncBatchNorm(CHANNELS, **options).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(1, 3, CHANNELS))
    return norm


def two_steps(norm, x, dy):
    """Output and gradients of the second of two steps, and the state after both."""
    norm(x * 3)
    x = x.clone().requires_grad_()
    y = norm(x)
    (y.double() * dy).sum().backward()
    return {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, **dict(norm.named_buffers())}


def refused(call):
    """The message of the error that ``call`` raises, and the seconds until then."""
    start = time.monotonic()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    return type(caught.value).__name__, str(caught.value), time.monotonic() - start


def _scenarios(rank):
    results = {}
    x, dy = example()
    for name, sizes in SPLITS.items():
        results[name] = two_steps(make(), share(x, sizes, rank), share(dy, sizes, rank))
    half, _ = example(torch.float16)
    results["half"] = make().float()(share(half, (5, 0, 2), rank))
    tiny = share(x * 1e-6, (5, 0, 2), rank)
    results["tiny"] = make(eps=1e-5)(tiny)
    results["nobody has data"] = two_steps(make(), x[:0], dy[:0])
    if rank == 0:  # evaluation asks nobody
        results["evaluation"] = make().eval()(x)
    pooled = equinorm.BatchNorm(CHANNELS, process_group="world").double()
    lone = x[:1, :, :1, :1] if rank == 1 else x[:0, :, :1, :1]
    faults = {
        "one value": lambda: make()(lone),
        "channels": lambda: equinorm.SyncBatchNorm((4, 6, 6)[rank])(torch.randn(2, (4, 6, 6)[rank], 3)),
        "bad input": lambda: make()(torch.randn(2, (CHANNELS, CHANNELS, 9)[rank], 3).double()),
        "gradient": lambda: make()(x.clone().requires_grad_(rank == 0)),
        "one value, batch norm": lambda: pooled(lone),
        "bad input, batch norm": lambda: pooled(torch.randn(2, (CHANNELS, CHANNELS, 9)[rank], 3).double()),
    }
    results["faults"] = {name: refused(fault) for name, fault in faults.items()}
    group = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2])][rank // 2]
    results["subgroup"] = make(process_group=group)(share(x, (4, 3, 0), rank) if rank < 2 else x)
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(3, _scenarios)


@pytest.mark.parametrize("name", SPLITS)
def test_any_split_is_the_big_batch(ranks, name):
    x, dy = example()
    expected = two_steps(make(), x, dy)
    parts = [rank[name] for rank in ranks]
    assert_close(torch.cat([part["y"] for part in parts]), expected["y"])
    actual = {"x": torch.cat([part["x"] for part in parts])}
    # Each process has the parameter gradients of its own samples.
    actual |= {parameter: sum(part[parameter] for part in parts) for parameter in ("weight", "bias")}
    assert_grads_close(actual, {key: expected[key] for key in actual})
    for part in parts:
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            assert_close(part[buffer].double(), expected[buffer].double(), label=buffer)


def test_two_ranks_are_the_big_batch():
    x, dy = example()
    expected = two_steps(make(), x, dy)
    parts = run_ranks(2, _two, (6, 1))
    assert_close(torch.cat([part["y"] for part in parts]), expected["y"])
    assert_grads_close({"x": torch.cat([part["x"] for part in parts])}, {"x": expected["x"]})
    assert all(torch.equal(parts[0]["running_var"], part["running_var"]) for part in parts)


def _two(rank, sizes):
    x, dy = example()
    return two_steps(make(), share(x, sizes, rank), share(dy, sizes, rank))


def test_half_inputs_with_an_empty_rank_are_rounded_once(ranks):
    half, _ = example(torch.float16)
    y = torch.cat([rank["half"] for rank in ranks])
    assert y.dtype == torch.float16
    assert_close(y, make()(half.double()))


def test_a_variance_far_below_eps_keeps_its_digits(ranks):
    assert_close(torch.cat([rank["tiny"] for rank in ranks]), make()(example()[0] * 1e-6))


def test_nobody_has_data(ranks):
    for rank in ranks:
        result = rank["nobody has data"]
        assert result["running_mean"].eq(0).all()
        assert result["running_var"].eq(1).all()
        assert result["num_batches_tracked"] == 0
        assert result["weight"].eq(0).all()
        assert result["bias"].eq(0).all()
        assert result["x"].shape == (0, CHANNELS, 3, 2)


def test_evaluation_asks_nobody(ranks):
    assert_close(ranks[0]["evaluation"], make().eval()(example()[0]))


def test_a_process_group_pools_within_itself(ranks):
    x = example()[0]
    assert_close(torch.cat([rank["subgroup"] for rank in ranks[:2]]), make()(x))
    assert_close(ranks[2]["subgroup"], make()(x))


def test_faults_are_errors_on_every_rank_soon(ranks):
    for rank in ranks:
        for name, (_, message, seconds) in rank["faults"].items():
            assert seconds < 5, f"{name} took {seconds:.1f} s: {message}"
    said = [{name: fault[:2] for name, fault in rank["faults"].items()} for rank in ranks]
    for rank in said:
        for case in ("one value", "one value, batch norm"):
            kind, message = rank[case]
            assert kind == "ValueError"
            assert "more than one value per channel over all processes" in message
        assert "channels [4, 6, 6]" in rank["channels"][1]
        assert "gradient [1, 0, 0]" in rank["gradient"][1]
    for case in ("bad input", "bad input, batch norm"):
        assert "got (2, 9, 3)" in said[2][case][1]
        assert all("refused inputs [0, 0, 1]" in rank[case][1] for rank in said[:2])


def test_one_process_is_batch_norm():
    x, dy = example()
    local = equinorm.BatchNorm(CHANNELS).double()
    local.load_state_dict(make().state_dict())
    for name, value in two_steps(local, x, dy).items():
        assert torch.equal(two_steps(make(), x, dy)[name], value), name


def model():
    torch.manual_seed(1)
    shared = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=None), shared, nn.Sequential(shared, nn.ReLU()))
    for _ in range(2):
        net(torch.randn(5, 3, 6, 6))
    return net


@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_the_function_and_the_tensors(training):
    net, x = model().train(training), torch.randn(5, 3, 6, 6)
    before, want = dict(net.named_parameters()), copy.deepcopy(net)(x)
    converted = equinorm.convert_sync_batchnorm(net)
    assert converted is net
    assert [type(m) for m in net] == [nn.Conv2d, equinorm.SyncBatchNorm, equinorm.SyncBatchNorm, nn.Sequential]
    assert net[2] is net[3][0], "a shared norm stays shared"
    assert (net[1].eps, net[1].momentum, net[1].training) == (1e-3, None, training)
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert_close(copy.deepcopy(net)(x), want.double())
    back = equinorm.revert_sync_batchnorm(net)
    assert [type(m) for m in back][1:3] == [equinorm.BatchNorm] * 2
    assert all(parameter is before[name] for name, parameter in back.named_parameters())
    assert_close(back(x), want.double())


def test_conversion_knows_what_it_converts():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class Named(nn.BatchNorm2d):
        pass

    group = object()
    kinds = nn.Sequential(Activated(4), Named(4), nn.SyncBatchNorm(4), equinorm.BatchNorm(4, bias=False), nn.InstanceNorm2d(4))
    kinds[3].frozen = True
    equinorm.SyncBatchNorm.convert_sync_batchnorm(kinds, group)
    assert [type(m) for m in kinds] == [Activated, *[equinorm.SyncBatchNorm] * 3, nn.InstanceNorm2d]
    assert all(kinds[k].process_group is group for k in (1, 2, 3))
    assert kinds[3].bias is None
    assert kinds[3].frozen
    assert isinstance(equinorm.convert_sync_batchnorm(nn.BatchNorm1d(3, affine=False, track_running_stats=False)), equinorm.SyncBatchNorm)
    assert type(equinorm.revert_sync_batchnorm(nn.SyncBatchNorm(3))) is equinorm.BatchNorm


def test_conversion_keeps_estimates_of_half_models_wide():
    norm = equinorm.convert_sync_batchnorm(nn.BatchNorm2d(4).half())
    assert norm.weight.dtype == torch.float16
    assert norm.running_var.dtype == torch.float32


def test_a_lazy_norm_cannot_be_converted_yet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy modules experimental
        lazy = nn.LazyBatchNorm2d()
    with pytest.raises(ValueError, match="LazyBatchNorm2d does not know its channels yet; run the model once"):
        equinorm.convert_sync_batchnorm(lazy)
