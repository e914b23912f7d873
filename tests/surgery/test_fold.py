"""Folding: equal outputs on every family and layer, and a reason wherever it cannot be."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import equinorm
from equinorm.kernels import activations
from equinorm.surgery import fold
from tests.surgery import networks
from tests.surgery.networks import stir

IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
BOUND = 1e-5  # relative, in float32: an affine map is rounded once more per layer


def norms_left(model: nn.Module) -> int:
    return sum("norm" in type(module).__name__.lower() and not isinstance(module, nn.LayerNorm) for module in model.modules())


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def worst(before: Tensor, after: Tensor) -> float:
    return ((before - after).abs().max() / before.abs().max()).item()


def refused(plan: object, name: str) -> str:
    (reason,) = [refusal.reason for refusal in plan.refusals if name in refusal.where]  # type: ignore[attr-defined]
    return reason


@pytest.mark.parametrize("example", [IMAGE, None], ids=["run", "traced"])
@pytest.mark.parametrize("family", ["resnet", "mobilenet", "efficientnet", "dcgan"])
def test_families_fold_wholly_and_equal(family, example):
    model = stir(getattr(networks, family)())
    before = outputs(model, IMAGE)
    plan = fold(model, example)
    assert plan.applied
    assert not plan.refusals
    assert norms_left(model) == 0
    assert worst(before, outputs(model, IMAGE)) < BOUND
    assert plan.error is None if example is None else plan.error < BOUND


CONVS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d, (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding="same"), nn.BatchNorm3d, (2, 4, 5, 4, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding_mode="circular", padding=1), nn.BatchNorm2d, (2, 4, 7, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm1d, (2, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d, (2, 4, 7, 6)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 5, 4, 6)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), nn.BatchNorm2d, (2, 4, 7, 6)),
    "linear": (lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (5, 4)),
}


@pytest.mark.parametrize("case", CONVS)
def test_a_norm_after_any_layer(case):
    layer, norm, shape = CONVS[case]
    model = stir(nn.Sequential(layer(), norm(6), nn.Tanh()))
    x = torch.randn(shape)
    before = outputs(model, x)
    plan = fold(model, x)
    assert isinstance(model[1], nn.Identity)
    assert worst(before, outputs(model, x)) < BOUND
    assert plan.error < BOUND


BEFORE = {
    "conv": (nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    "grouped": (nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 7, 6)),
    "reflected": (nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
    "linear": (nn.BatchNorm1d(4), lambda: nn.Linear(4, 6), (5, 4)),
    "layer scale": (equinorm.LayerScale(4, init=0.3), lambda: nn.Linear(4, 6), (5, 3, 4)),
    "padded, without a shift": (equinorm.LayerScale(4, init=0.3, channel_dim=1), lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 6)),
    "transposed, without a shift": (equinorm.LayerScale(4, 0.3, 1), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_norm_before_a_layer(case):
    norm, layer, shape = BEFORE[case]
    model = stir(nn.Sequential(nn.Tanh(), copy.deepcopy(norm), layer()))
    x = torch.randn(shape)
    before = outputs(model, x)
    assert fold(model, x).error < BOUND
    assert isinstance(model[1], nn.Identity)
    assert worst(before, outputs(model, x)) < BOUND


FOLDING = {
    method.__name__: method
    for method in equinorm.catalogue.methods().values()
    if isinstance(method, type) and method.facts.folds and method is not equinorm.LayerScale
}


@pytest.mark.parametrize("name", FOLDING)
def test_every_norm_of_ours_that_says_so(name):
    norm = FOLDING[name](6)
    if isinstance(norm, equinorm.ActNorm):
        norm.initialize(torch.randn(8, 6, 3, 3) * 3 + 1)
    model = stir(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Tanh()))
    before = outputs(model, IMAGE)
    assert fold(model, IMAGE).error < BOUND
    assert isinstance(model[1], nn.Identity)
    assert worst(before, outputs(model, IMAGE)) < BOUND


OTHERS = {
    "frozen batch norm": lambda: networks.FrozenBatchNorm2d(6),
    "sync batch norm": lambda: nn.SyncBatchNorm(6),
    "instance norm that tracks": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "ours with one bias": lambda: equinorm.BatchNorm(6, bias=False),
    "without affine": lambda: nn.BatchNorm2d(6, affine=False),
    "ours that tracks the variance": lambda: equinorm.BatchRenorm(6, track="var"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_norms_with_estimates(name):
    model = stir(nn.Sequential(nn.Conv2d(3, 6, 3), OTHERS[name](), nn.Tanh()))
    before = outputs(model, IMAGE)
    assert fold(model, IMAGE).error < BOUND
    assert isinstance(model[1], nn.Identity)
    assert worst(before, outputs(model, IMAGE)) < BOUND


@pytest.mark.parametrize("activation", [name for name in activations.TABLE if name != "rrelu"])
def test_an_activation_that_follows_the_norm_stays(activation):
    parameter = 0.3 if activation in activations.PARAMETRIC else None
    norm = equinorm.BatchNorm(6, activation=activation, activation_param=parameter)
    model = stir(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 2, 1)))
    before = outputs(model, IMAGE)
    assert fold(model, IMAGE).error < BOUND
    assert norms_left(model) == 0
    assert worst(before, outputs(model, IMAGE)) < BOUND


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "identity"])
def test_an_activation_stays(activation):
    norm = equinorm.InPlaceABN(6, activation=activation, activation_param=0.3)
    model = stir(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 2, 1)))
    before = outputs(model, IMAGE)
    assert fold(model, IMAGE).error < BOUND
    assert type(model[1]) is {"leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "identity": nn.Identity}[activation]
    assert worst(before, outputs(model, IMAGE)) < BOUND


COMPUTED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(3, 6, 3, bias=False)),
    "ours, spectral": lambda: equinorm.spectral_norm(nn.Conv2d(3, 6, 3)),
    "ours, standardized": lambda: equinorm.weight_standardization(nn.Conv2d(3, 6, 3)),
    "WSConv2d": lambda: equinorm.WSConv2d(3, 6, 3),
    "ScaledWSConv2d": lambda: equinorm.ScaledWSConv2d(3, 6, 3),
    "EqualizedConv2d": lambda: equinorm.EqualizedConv2d(3, 6, 3, padding=1),
    "MPConv2d": lambda: equinorm.MPConv2d(3, 6, 3),
    "CenConv2d": lambda: equinorm.CenConv2d(3, 6, 3),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "alone"])
def test_computed_weights_are_baked_in(name, normed):
    model = stir(nn.Sequential(COMPUTED[name](), nn.BatchNorm2d(6) if normed else nn.ReLU()))
    before = outputs(model, IMAGE)
    plan = fold(model, IMAGE)
    assert type(model[0]) is nn.Conv2d
    assert plan.changes[0].lost
    assert worst(before, outputs(model, IMAGE)) < BOUND
    assert {name for name, _ in model[0].named_parameters()} <= {"weight", "bias"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_hooks_of_torch_that_make_a_weight_are_baked_in(name):
    layer = getattr(nn.utils, name)(nn.Linear(4, 6))
    model = stir(nn.Sequential(layer, nn.BatchNorm1d(6)))
    x = torch.randn(5, 4)
    before = outputs(model, x)
    assert fold(model, x).error < BOUND
    assert not model[0]._forward_pre_hooks
    assert worst(before, outputs(model, x)) < BOUND


def test_hooks_of_users_see_no_run_of_ours_and_are_reported():
    model = stir(nn.Sequential(equinorm.WSConv2d(3, 6, 3), nn.BatchNorm2d(6)))
    seen = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    plan = fold(model, IMAGE, dry_run=True)
    assert seen == [(2, 6, 10, 10)]  # the example, once
    assert "1 forward hooks, which stay with the old module" in plan.changes[0].lost


def test_a_norm_on_both_sides_and_norm_after_norm():
    model = stir(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), equinorm.LayerScale(6, 0.2, 1)))
    before = outputs(model, IMAGE)
    plan = fold(model, IMAGE)
    assert len(plan.changes) == 1
    assert worst(before, outputs(model, IMAGE)) < BOUND
    assert [type(module) for module in model] == [nn.Identity, nn.Conv2d, nn.Identity, nn.Identity]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_written_back_in_the_dtype_of_the_weight(dtype):
    model = stir(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).to(dtype)
    reference = copy.deepcopy(model).double()
    plan = fold(model, IMAGE.to(dtype))
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    scale = reference[1].weight / (reference[1].running_var + reference[1].eps).sqrt()
    expected = (reference[0].weight * scale[:, None, None, None]).detach()
    exact = 1e-15 if dtype is torch.float64 else 0.0  # a half type is rounded once, from float64
    assert ((model[0].weight - expected.to(dtype)).abs() <= exact * expected.abs()).all()
    assert plan.error < 8 * torch.finfo(dtype).eps


def test_under_autocast():
    model = stir(networks.resnet())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = fold(model, IMAGE)
    assert plan.applied
    assert model[0][0].weight.dtype == torch.float32


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, networks.BatchNormAct2d, equinorm.BatchNorm])
def test_a_parametrized_norm(norm):
    model = stir(nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.Tanh()))
    parametrize.register_parametrization(model[1], "weight", Doubled())
    before = outputs(model, IMAGE)
    assert fold(model, IMAGE).error < BOUND
    assert worst(before, outputs(model, IMAGE)) < BOUND


class Tapped(nn.Module):
    """Reads the output of its convolution twice."""

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.conv, self.bn, self.tap = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), tap

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        if self.tap == "added":
            return self.bn(y) + y
        if self.tap == "activated":
            return self.bn(y.relu_())
        if self.tap == "returned":
            return {"y": self.bn(y), "raw": [y]}
        if self.tap == "called twice":
            return self.bn(y) + self.conv(x * 2)
        if self.tap == "weight used":
            return self.bn(y) + self.conv.weight.sum()
        if self.tap == "norm called twice":
            return self.bn(self.bn(y))
        if self.tap == "not called":
            return y
        raise AssertionError(self.tap)


@pytest.mark.parametrize("example", [IMAGE, None], ids=["run", "traced"])
@pytest.mark.parametrize(
    ("tap", "reason"),
    [
        ("added", "the output of conv is also read by "),
        ("activated", "no linear layer stands right before it|the output of conv is also read by"),
        ("returned", "the output of conv is also read by output of the model"),
        ("called twice", "conv is called 2 times"),
        ("weight used", "a parameter of conv is also read by "),
        ("norm called twice", "is called 2 times"),
        ("not called", "was not reached"),
    ],
)
def test_what_cannot_be_folded_says_why(tap, reason, example):
    model = stir(Tapped(tap))
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    plan = fold(model, example)
    assert not plan.changes
    assert re.search(reason, refused(plan, "bn")), str(plan)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_other_reasons():
    x = torch.randn(2, 4, 7, 7)
    model = stir(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4)))
    model = nn.Sequential(*model, nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    plan = fold(model, x)
    assert "pads with zeros, which the norm's shift would have to reach" in refused(plan, "1")
    assert "sums fewer taps at the borders" in refused(plan, "4")
    assert "keeps no running estimates" in refused(plan, "6")
    model = stir(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model[1].train()
    assert "is in training mode" in refused(fold(model, x), "1")
    model = stir(nn.Sequential(nn.Conv2d(4, 4, 3), equinorm.BatchNorm(4)))
    model[1].train().frozen = True
    assert fold(model, x).changes
    shared = nn.Conv2d(4, 4, 3)
    model = stir(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4)))
    model[0].weight = shared.weight
    assert "0 shares a parameter with another layer" in refused(fold(model, x), "1")


def test_a_linear_layer_on_tokens_has_its_features_last():
    model = stir(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    plan = fold(model, torch.randn(2, 6, 4))  # (N, T, C) with T = C: the batch norm sees tokens as channels
    assert "normalizes another dimension than the channels of 0" in refused(plan, "1")
    model = stir(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 4)))
    assert "pass example_input" in refused(fold(model), "1")


def test_a_mask_is_no_map_of_channels():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 6, 1), equinorm.BatchNorm(6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(self.conv(x), mask)

    plan = fold(stir(Masked()), (torch.randn(2, 3, 5), torch.ones(2, 5, dtype=torch.bool)))
    assert "is given more than one tensor" in refused(plan, "bn")


def test_conditions_that_no_trace_can_follow():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) if x.sum() > -1e9 else x

    model = stir(Branching())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Branching cannot be traced symbolically .*; pass example_input, and it is run instead"):
        fold(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert fold(model, IMAGE).error < BOUND


def test_a_mapping_as_example_and_defaults_in_a_trace():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

        def forward(self, pixels: Tensor, extra: Tensor | None = None) -> Tensor:
            y = self.conv(pixels)
            return self.bn(y) if extra is None else self.bn(y) + y

    for example in ({"pixels": IMAGE}, (IMAGE,), None):
        model = stir(Keywords())
        assert fold(model, example).changes
    plan = fold(stir(Keywords()), {"pixels": IMAGE, "extra": IMAGE})
    assert not plan.changes


def test_shared_modules_are_replaced_everywhere():
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model = stir(nn.ModuleDict({"a": block, "b": nn.Sequential(block[0], nn.ReLU())}))
    model.forward = lambda x: model["a"](x)  # type: ignore[method-assign]
    plan = fold(model, IMAGE)
    assert plan.changes[0].where == ("a.0", "b.0")
    assert model["a"][0] is model["b"][0]


def test_a_dry_run_changes_nothing_and_plans_the_same():
    model = stir(networks.resnet())
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    plan = fold(model, IMAGE, dry_run=True)
    assert not plan.applied
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(rng, torch.get_rng_state())
    done = fold(model, IMAGE)
    assert [change.what for change in done.changes] == [change.what for change in plan.changes]
    assert str(done).startswith("fold (done): 7 changes, 0 refusals")


def test_a_model_that_answers_differently_is_left_alone():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.calls = networks.resnet(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layers(x) * self.calls

    model = stir(Counting())
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"outputs before and after differ by .* the model is left as it was"):
        fold(model, IMAGE)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_bad_input():
    model = stir(networks.resnet())
    with pytest.raises(ValueError, match=r"fold: the model is in training mode, .* call model.eval\(\) first"):
        fold(model.train(), IMAGE)
    with pytest.raises(ValueError, match="Sequential holds nothing to fold or to bake"):
        fold(stir(networks.convnext()), IMAGE)
    modules = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="expected input"):
        fold(model.eval(), torch.randn(2, 5, 12, 12))
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_optimizer_follows():
    model = stir(networks.resnet())
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.1, momentum=0.9)
    fold(model, IMAGE, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
