"""What every weight parametrization must do, over the table of all of them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import equinorm
from tests.helpers import assert_close
from tests.references import weight as reference


@dataclass(frozen=True)
class Case:
    """One parametrization with one set of options."""

    id: str
    apply: Callable[[nn.Module], nn.Module]
    layers: tuple[str, ...] = ("linear", "conv1d", "conv2d", "conv3d", "transposed", "transposed-grouped")


CONVS = ("conv1d", "conv2d", "conv3d", "transposed", "transposed-grouped")

CASES = [
    Case("weight_standardization", equinorm.weight_standardization),
    Case("weight_standardization-outside", lambda m: equinorm.weight_standardization(m, eps=1e-5, unbiased=True, eps_mode="outside")),
    Case("weight_standardization-clamp", lambda m: equinorm.weight_standardization(m, eps_mode="clamp")),
    Case("weight_standardization-relative", lambda m: equinorm.weight_standardization(m, eps_mode="relative")),
    Case("weight_norm", equinorm.weight_norm),
    Case("weight_norm-whole", lambda m: equinorm.weight_norm(m, dim=None)),
    Case("spectral_norm", equinorm.spectral_norm),
    Case("spectral_norm-coefficient", lambda m: equinorm.spectral_norm(m, coeff=0.5)),
    Case("spectral_norm-per_group", lambda m: equinorm.spectral_norm(m, per_group=True), CONVS),
    Case("spectral_norm-conv", lambda m: equinorm.spectral_norm(m, method="conv", input_shape=(5,) * (m.weight.ndim - 2)), CONVS),
    Case("scaled_weight_standardization", equinorm.scaled_weight_standardization),
    Case("scaled_weight_standardization-inside", lambda m: equinorm.scaled_weight_standardization(m, eps_mode="inside", gamma=1.7)),
    Case("weight_centering", equinorm.weight_centering),
    Case("centered_weight_norm", equinorm.centered_weight_norm),
    Case("centered_weight_norm-learned", lambda m: equinorm.centered_weight_norm(m, learnable_scale=True, eps=0.1)),
    Case("bjorck_orthonormal", lambda m: equinorm.bjorck_orthonormal(m, n_iter=3)),
    Case("bjorck_orthonormal-order_3", lambda m: equinorm.bjorck_orthonormal(m, n_iter=2, order=3)),
    Case("fix_norm", equinorm.fix_norm),
    Case("equalized_lr", lambda m: equinorm.equalized_lr(m, lr_multiplier=0.1, gain=1.4)),
    Case("forced_weight_norm", lambda m: equinorm.forced_weight_norm(m, gain=0.5, eps=0.01)),
    Case("stable_rank_norm", lambda m: equinorm.stable_rank_norm(m, ratio=0.4)),
    Case("stable_rank_norm-unscaled", lambda m: equinorm.stable_rank_norm(m, rank=1.2, preserve=0, spectral=False)),
]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, padding=1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 3, 3)),
    "transposed-grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
every_pair = pytest.mark.parametrize(
    ("case", "layer"), [pytest.param(case, layer, id=f"{case.id}-{layer}") for case in CASES for layer in case.layers]
)


def build(case: Case, layer: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[layer]
    module = case.apply(make().to(dtype))
    return module, torch.randn(shape, dtype=dtype)


def originals(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parametrizations.weight.parameters())


@every_pair
def test_the_weight_keeps_shape_and_dtype_and_differs(case, layer):
    make, _ = LAYERS[layer]
    plain = make()
    before = plain.weight.detach().clone()
    module = case.apply(plain)
    assert module is plain
    assert module.weight.shape == before.shape
    assert module.weight.dtype == before.dtype
    assert module.weight.requires_grad


@every_pair
def test_first_derivatives(case, layer):
    module, x = build(case, layer)
    module.eval()
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters.values()))


@every_case
def test_second_derivatives(case):
    module, x = build(case, "conv1d")
    module.eval()
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(run, (x.requires_grad_(), *parameters.values()))


@every_case
def test_two_forwards_before_one_backward(case):
    module, x = build(case, "conv2d")
    (module(x) - module(2 * x)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in originals(module))


@every_pair
def test_removing_it_bakes_the_weight(case, layer):
    module, x = build(case, layer)
    module.eval()
    expected = module(x)
    for name in list(module.parametrizations):
        parametrize.remove_parametrizations(module, name)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert_close(module(x), expected.detach())


@every_case
def test_deepcopy_is_equal_and_independent(case):
    module, x = build(case, "conv2d")
    module.eval()
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    before = module(x).detach()
    with torch.no_grad():
        for p in originals(twin):
            p.normal_()
    assert torch.equal(module(x), before)
    assert not torch.equal(twin(x), before)


@every_case
def test_state_dict_round_trip(case):
    module, x = build(case, "conv2d")
    other, _ = build(case, "conv2d")
    module(x)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(x), module.eval()(x))


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_computed_in_float32(case, dtype):
    torch.manual_seed(0)
    module, _ = build(case, "conv2d", dtype)
    torch.manual_seed(0)
    exact, _ = build(case, "conv2d", torch.float64)
    exact.load_state_dict(module.eval().state_dict())
    assert module.weight.dtype == dtype
    assert_close(module.weight, exact.eval().weight)


@every_case
def test_autocast_does_not_reach_the_norm(case):
    module, _ = build(case, "conv2d", torch.float32)
    module.eval()
    expected = module.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.weight, expected)


@every_case
def test_zero_weights_give_finite_weights_and_gradients(case):
    for layer in case.layers:
        module, x = build(case, layer, torch.float32)
        with torch.no_grad():
            for p in originals(module):
                p.zero_()
        module(x).square().sum().backward()
        assert module.weight.isfinite().all()
        assert all(p.grad.isfinite().all() for p in originals(module)), layer


@every_case
def test_compiles_whole(case):
    module, x = build(case, "conv2d", torch.float32)
    module.eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), module(x).detach())
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in originals(module)]
    module.zero_grad()
    module(x).square().sum().backward()
    for a, p in zip(got, originals(module), strict=True):
        assert_close(a, p.grad, label="gradient")


@every_case
def test_compiles_whole_in_training(case):
    module, x = build(case, "conv2d", torch.float32)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_close(compiled(x), twin(x).detach())
    for name, buffer in twin.named_buffers():
        assert_close(dict(module.named_buffers())[name], buffer, label=name)


@every_case
def test_checkpointing_repeats_the_forward_without_moving_the_state(case):
    module, x = build(case, "conv2d")
    twin = copy.deepcopy(module)
    module(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(originals(module), originals(twin), strict=True):
        assert_close(b.grad, a.grad, label="gradient")


@every_case
def test_half_modules_keep_wide_state(case):
    module, _ = build(case, "conv2d", torch.float32)
    module.to(torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in module.buffers())
    assert module.weight.dtype == torch.bfloat16
    module.double()
    assert module.weight.dtype == torch.float64
    assert all(buffer.dtype == torch.float64 for buffer in module.buffers())


@every_case
def test_meta_device(case):
    make, shape = LAYERS["conv2d"]
    with torch.device("meta"):
        module = case.apply(make())
        assert module(torch.empty(shape)).device.type == "meta"


def method(case: Case) -> Callable:
    return getattr(equinorm, case.id.split("-")[0])


def test_every_weight_parametrization_is_in_the_table():
    public = {
        name
        for name, value in vars(equinorm).items()
        if inspect.isfunction(value) and next(iter(inspect.signature(value).parameters), "") == "module" and hasattr(value, "facts")
    }
    assert public == {case.id.split("-")[0] for case in CASES}


@pytest.mark.parametrize(
    "case",  # one length of the whole tensor does not undo factors per unit
    [c for c in CASES if "weight-scale" in method(c).facts.invariances and c.id != "weight_norm-whole"],
    ids=lambda c: c.id,
)
@pytest.mark.parametrize("layer", ["linear", "conv2d", "transposed-grouped"])
def test_claim_weight_scale(case, layer):
    """Each unit's raw weights times its own factor change nothing; the weights are large, so that no eps shows."""
    module, _ = build(case, layer)
    raw = originals(module)[-1] if case.id.startswith("weight_norm") else module.parametrizations.weight.original
    with torch.no_grad():
        raw.mul_(1e13)
        before = module.weight.clone()
        for unit, factor in zip(
            reference.units_of(raw.shape, layer == "transposed-grouped", 2), torch.linspace(0.5, 9, 6).tolist(), strict=False
        ):
            where = tuple(torch.tensor(column) for column in zip(*unit, strict=True))
            raw[where] *= factor
    assert_close(module.weight, before)


@every_case
def test_claim_per_sample(case):
    module, x = build(case, "conv2d")
    module.eval()
    assert "per-sample" in method(case).facts.invariances
    assert_close(module(x)[:1], module(x[:1]).detach())


@every_case
def test_facts_and_docstring(case):
    facts = method(case).facts
    assert facts.family == "weight"
    assert str(facts.paper.year) in str(facts.paper)
    for section in ("Formula", "Use it when", "Not when", "Known trouble", "Args", "Returns", "Raises", "Example", "Source"):
        assert re.search(rf"^    {section}:", method(case).__doc__, re.MULTILINE), section


@every_case
def test_registering_twice_is_refused(case):
    module, _ = build(case, "conv2d")
    with pytest.raises(ValueError, match=r"already has it; remove it with"):
        case.apply(module)
