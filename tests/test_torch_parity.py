"""Where torch has the layer, ours takes its place: constructor, defaults, names, values, checkpoints both ways."""

from __future__ import annotations

import copy
import inspect
import io
from functools import partial

import pytest
import torch
from torch import nn

import equinorm
from tests.helpers import assert_close, assert_grads_close

PAIRS = {
    "batch1d": (equinorm.BatchNorm, nn.BatchNorm1d, (6,), (5, 6)),
    "batch1d-sequence": (equinorm.BatchNorm, nn.BatchNorm1d, (6,), (5, 6, 7)),
    "batch2d": (equinorm.BatchNorm, nn.BatchNorm2d, (6,), (5, 6, 4, 3)),
    "batch3d": (equinorm.BatchNorm, nn.BatchNorm3d, (6,), (5, 6, 4, 3, 2)),
    "instance1d": (equinorm.InstanceNorm, nn.InstanceNorm1d, (6,), (5, 6, 7)),
    "instance2d": (equinorm.InstanceNorm, nn.InstanceNorm2d, (6,), (5, 6, 4, 3)),
    "instance3d": (equinorm.InstanceNorm, nn.InstanceNorm3d, (6,), (5, 6, 4, 3, 2)),
    "group": (equinorm.GroupNorm, nn.GroupNorm, (3, 6), (5, 6, 4, 3)),
    "layer": (equinorm.LayerNorm, nn.LayerNorm, (6,), (5, 4, 6)),
    "layer-two-dims": (equinorm.LayerNorm, nn.LayerNorm, ([4, 6],), (5, 4, 6)),
    "rms": (equinorm.RMSNorm, nn.RMSNorm, (6,), (5, 4, 6)),
}
OPTIONS = {
    "batch": [{}, {"eps": 1e-3}, {"momentum": None}, {"momentum": 0.3}, {"affine": False}, {"track_running_stats": False}],
    "instance": [{}, {"affine": True}, {"track_running_stats": True, "affine": True}],
    "group": [{}, {"affine": False}, {"eps": 1e-3}],
    "layer": [{}, {"elementwise_affine": False}, {"bias": False}],
    "rms": [{}, {"eps": 1e-3}, {"elementwise_affine": False}],
}
by_pair = pytest.mark.parametrize("pair", PAIRS)
by_option = pytest.mark.parametrize(
    ("pair", "options"),
    [pytest.param(p, o, id=f"{p}-{k}") for p in PAIRS for k, o in enumerate(next(v for n, v in OPTIONS.items() if p.startswith(n)))],
)


@by_option
def test_same_values_over_steps_checkpoints_both_ways(pair, options):
    ours, theirs, args, shape = PAIRS[pair]
    own, other = ours(*args, **options, dtype=torch.float64), theirs(*args, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    own.load_state_dict(other.state_dict())
    for training in (True, True, False):
        own.train(training)
        other.train(training)
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).requires_grad_()
        dy = torch.randn(shape, dtype=torch.float64)
        y, want = own(x), other(x)
        assert_close(y, want)
        names = ["x", *dict(own.named_parameters())]
        got = torch.autograd.grad(y, [x, *own.parameters()], dy)
        expected = torch.autograd.grad(want, [x, *other.parameters()], dy)
        assert_grads_close(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)))
    if "instance" not in pair:  # torch's instance norm does not count its batches
        assert own.state_dict().keys() == other.state_dict().keys()
        for name, value in other.state_dict().items():
            assert_close(own.state_dict()[name].double(), value.double(), label=name)
    other.load_state_dict(own.state_dict())


@by_pair
def test_same_constructor_names_and_defaults(pair):
    ours, theirs, args, _ = PAIRS[pair]
    mine, torchs = inspect.signature(ours.__init__).parameters, inspect.signature(theirs.__init__).parameters
    shared = [name for name in torchs if name in mine]
    assert list(torchs) == shared, f"missing {set(torchs) - set(mine)}"
    positional = [name for name, p in torchs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(mine)[: len(positional)] == positional, "positional arguments must stand in torch's order"
    for name, parameter in torchs.items():
        assert mine[name].default == parameter.default or name == "bias", name
    own, other = ours(*args), theirs(*args)
    assert own.state_dict().keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(own.state_dict()[name], value)
        assert own.state_dict()[name].dtype == value.dtype
    for name in ("eps", "momentum", "affine", "track_running_stats", "num_features", "num_groups", "num_channels", "normalized_shape"):
        assert getattr(own, name, None) == getattr(other, name, None), name


@by_pair
def test_tools_recognise_it(pair):
    ours, theirs, args, _ = PAIRS[pair]
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, theirs)
    assert isinstance(ours(*args), next(kind for kind in kinds if issubclass(theirs, kind)))


def test_update_bn_finds_batch_norms():
    model = nn.Sequential(nn.Linear(4, 6), equinorm.BatchNorm(6))
    loader = [torch.randn(16, 4) for _ in range(4)]
    reference = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm1d(6))
    torch.optim.swa_utils.update_bn(loader, model)
    torch.optim.swa_utils.update_bn(loader, reference)
    assert_close(model[1].running_mean, reference[1].running_mean.double())
    assert_close(model[1].running_var, reference[1].running_var.double())
    assert model[1].momentum == 0.1


def test_checkpoints_without_a_batch_counter_load():
    """torch's version 1: no num_batches_tracked."""
    old = nn.BatchNorm2d(6).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    norm = equinorm.BatchNorm(6)
    norm.load_state_dict(old)
    assert norm.num_batches_tracked == 0


def test_bias_can_be_left_out():
    for norm in (equinorm.BatchNorm(6, bias=False), equinorm.GroupNorm(3, 6, bias=False), equinorm.LayerNorm(6, bias=False)):
        assert norm.bias is None
        assert "bias" not in norm.state_dict()


def test_norm_layer_callables_work():
    for factory in (equinorm.BatchNorm, partial(equinorm.GroupNorm, 2), partial(equinorm.create, "switch")):
        assert factory(6)(torch.randn(3, 6, 4, 4)).shape == (3, 6, 4, 4)


def test_convert_sync_batchnorm_takes_ours_along():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(equinorm.BatchNorm(6)))
    assert isinstance(converted[0], nn.SyncBatchNorm)


def test_a_module_saved_whole_comes_back():
    file = io.BytesIO()
    torch.save(nn.Sequential(*[ours(*args) for ours, _, args, _ in PAIRS.values()]), file)
    file.seek(0)
    assert len(torch.load(file, weights_only=False)) == len(PAIRS)


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: equinorm.BatchNorm(0), ValueError, "num_features must be an integer of at least 1, got 0"),
        (lambda: equinorm.BatchNorm(4.0), ValueError, "num_features must be an integer"),
        (lambda: equinorm.BatchNorm(4, momentum=1.5), ValueError, r"momentum .* in \[0, 1\].* got 1.5"),
        (
            lambda: equinorm.GroupNorm(4, 6),
            ValueError,
            r"num_groups must divide num_channels, got 4 groups for 6 channels; use one of \[1, 2, 3, 6\]",
        ),
        (lambda: equinorm.GroupNorm(6, 6)(torch.ones(2, 6, 1, 1)), ValueError, "a group needs more than one value"),
        (lambda: equinorm.BatchNorm(6)(torch.ones(1, 6)), ValueError, "more than one value per channel"),
        (lambda: equinorm.BatchNorm(6)(torch.ones(6)), ValueError, r"must have shape \(N, 6, \*spatial\), got \(6,\)"),
        (lambda: equinorm.InstanceNorm(6)(torch.ones(2, 6)), ValueError, "at least one spatial dimension"),
        (lambda: equinorm.InstanceNorm(6)(torch.ones(2, 6, 1)), ValueError, "more than one position"),
        (lambda: equinorm.LayerNorm(6)(torch.ones(2, 5)), ValueError, r"must have shape \(..., 6\), got \(2, 5\)"),
        (lambda: equinorm.RMSNorm(6, partial=0.0), ValueError, r"partial must be a share in \(0, 1\]"),
        (lambda: equinorm.SwitchNorm(6, using=("batch", "lair")), ValueError, "using must name different candidates"),
        (lambda: equinorm.SwitchNorm(6, using=("instance",))(torch.ones(2, 6)), ValueError, "input with positions"),
        (lambda: equinorm.BatchChannelNorm(6, 4), ValueError, "num_groups must divide num_features"),
        (lambda: equinorm.BatchChannelNorm(6, 3, variance="sum"), ValueError, 'variance must be "drift" or "batch"'),
        (lambda: equinorm.create("bach", 4), ValueError, "did you mean 'batch'"),
        (lambda: equinorm.create("weight_standardization", 4), ValueError, "acts on a layer's weight"),
        (lambda: equinorm.find(family="batches"), ValueError, "family must be one of"),
        (lambda: equinorm.find(colour="red"), ValueError, "unknown properties"),
        (lambda: equinorm.find(invariances="time"), ValueError, "unknown invariances"),
    ],
)
def test_errors_say_what_must_hold_and_what_came(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


def test_validation_comes_before_mutation():
    norm = equinorm.BatchNorm(6)
    with pytest.raises(ValueError, match="more than one value"):
        norm(torch.ones(1, 6))
    assert norm.num_batches_tracked == 0


def test_layer_norm_over_one_value_warns():
    with pytest.warns(UserWarning, match="every output will be the bias"):
        equinorm.LayerNorm(1)
