"""Surgery on models that never heard of it: timm and transformers, with random weights and random statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.surgery import fold, freeze, recalibrate, swap, sync
from equinorm.surgery.calling import call_example, floating
from tests.surgery.families import COMPUTED, PARTLY, SAMPLE, WHOLE

BOUND = 1e-5


def trained(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its norms with values that no default gives away."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm) and module.weight is not None:
                module.weight.mul_(0.6 + 0.8 * torch.rand(module.weight.shape, generator=generator))
                module.bias.add_(0.2 * torch.randn(module.bias.shape, generator=generator))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return floating(call_example(model, example))


def worst(before: list[Tensor], after: list[Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(after, before, strict=True))


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", WHOLE)
def test_fold_takes_every_batch_norm_in(name):
    model, example = WHOLE[name]()
    trained(model)
    before = outputs(model, example)
    norms = batch_norms(model)
    plan = fold(model, example)
    assert norms
    assert batch_norms(model) == 0, str(plan)
    assert not plan.refusals
    assert worst(before, outputs(model, example)) < BOUND
    assert plan.error < BOUND


@pytest.mark.parametrize("name", ["timm mobilenetv2", "transformers MobileNetV2"])
def test_fold_is_as_exact_as_the_model_where_rounding_is_amplified(name):
    """Statistics measured on noise: depthwise channels of tiny variance make of one rounding error a hundred."""
    model, example = WHOLE[name]()
    trained(model)
    recalibrate(model, [example], forward=call_example)
    double = copy.deepcopy(model).double()
    exact = outputs(double, example.double() if isinstance(example, Tensor) else {key: x.double() for key, x in example.items()})
    unfolded = worst(exact, outputs(model, example))
    fold(model, example)
    assert worst(exact, outputs(model, example)) < 2 * unfolded


@pytest.mark.parametrize("name", PARTLY)
def test_fold_takes_in_what_it_can_and_says_why_not(name):
    model, example = PARTLY[name]()
    trained(model)
    before = outputs(model, example)
    plan = fold(model, example)
    assert plan.changes
    assert batch_norms(model) == len(plan.refusals)
    assert worst(before, outputs(model, example)) < BOUND


@pytest.mark.parametrize("name", COMPUTED)
def test_fold_bakes_standardized_weights_in(name):
    model, example = COMPUTED[name]()
    model.eval()
    before = outputs(model, example)
    plan = fold(model, example)
    assert all("computed weight baked in" in change.what for change in plan.changes)
    assert not any(type(module) is not nn.Conv2d and isinstance(module, nn.Conv2d) for module in model.modules())
    assert worst(before, outputs(model, example)) < BOUND


@pytest.mark.parametrize("name", ["timm resnet18", "timm mobilenetv2", "transformers ResNet, basic", "transformers MobileNetV2"])
def test_batch_to_group_and_back_is_exact(name):
    model, example = WHOLE[name]()
    trained(model)
    before = outputs(model, example)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    classes = {key: type(module) for key, module in model.named_modules()}
    swap(model, "group", calibrate=[example])
    assert batch_norms(model) == 0
    swap(model, nn.BatchNorm2d)
    after = outputs(model, example)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if "MobileNet" not in name and "mobilenet" not in name:  # fused forms come back as a norm and an activation
        assert {key: type(module) for key, module in model.named_modules()} == classes
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert sorted(v.double().sum().item() for v in model.state_dict().values()) == sorted(v.double().sum().item() for v in values.values())


@pytest.mark.parametrize("name", SAMPLE)
def test_norms_within_the_sample_swap_with_ours_exactly(name):
    model, example = SAMPLE[name]()
    model.eval()
    before = outputs(model, example)
    keys = set(model.state_dict())
    rms = "Llama" in name or "Gemma" in name
    plan = swap(model, "rms" if rms else "layer", calibrate=[example])
    assert plan.changes
    assert worst(before, outputs(model, example)) < BOUND
    if "onv" not in name:
        assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["timm vit", "transformers Bert", "transformers GPT2"])
def test_layer_norm_to_rms_norm_is_nearer_with_data(name):
    errors = []
    for calibrate in (True, False):
        model, example = SAMPLE[name]()
        trained(model)
        before = outputs(model, example)[0]
        swap(model, "rms", calibrate=[example] if calibrate else None)
        errors.append(((before - outputs(model, example)[0]).square().mean() / before.square().mean()).sqrt().item())
    assert errors[0] < errors[1], errors


@pytest.mark.parametrize("name", ["timm mobilenetv3", "transformers RegNet"])
def test_recalibrate_freeze_and_sync(name):
    model, example = WHOLE[name]()
    trained(model)
    reference = copy.deepcopy(model)
    for module in reference.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training:
            module.momentum = 1.0
    outputs(reference, example)
    recalibrate(model, [example], forward=call_example)
    for (key, value), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(value, expected if "num_batches" not in key else torch.ones_like(value), rtol=1e-4, atol=1e-5)
    before = outputs(model, example)
    freeze(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert worst(before, outputs(model, example)) == 0
    # Estimates measured on noise magnify a model's own rounding, so ours is compared with that, not with its result.
    wide = example.double() if isinstance(example, Tensor) else {key: value.double() for key, value in example.items()}
    exact = outputs(copy.deepcopy(model).double(), wide)
    sync(model)
    assert any(isinstance(module, equinorm.SyncBatchNorm) and module.frozen for module in model.modules())
    assert worst(exact, outputs(model.eval(), example)) < max(BOUND, 2 * worst(exact, before))
