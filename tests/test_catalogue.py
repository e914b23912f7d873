"""What every activation norm of the catalogue must do, over the table in cases.py."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import equinorm
from equinorm.core.running import RunningMoments
from tests.cases import CASES, Case
from tests.helpers import assert_close, assert_grads_close, run_ranks

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_variant = pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(case, k, id=f"{case.name}-{k}") for case in CASES for k in range(len(case.options))],
)


def only(wanted):
    """Parametrize over the cases for which ``wanted(case)`` holds."""
    return pytest.mark.parametrize("case", [case for case in CASES if wanted(case)], ids=lambda case: case.name)


def claims(name):
    return only(lambda case: name in case.cls.facts.invariances)


def build(case: Case, variant: int = 0, dtype=torch.float64, **more):
    """The module with parameters away from their initial values, so that none of them drops out."""
    module = case.make(variant, **more).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if case.ready is not None:
        case.ready(module, data(case, dtype=dtype))
    return module


def data(case: Case, shape=None, dtype=torch.float64):
    return (torch.randn(shape or case.shape, dtype=torch.float64) * 2 + 1).to(dtype)


def extras(case: Case, x):
    return () if case.extra is None else case.extra(x, torch.Generator().manual_seed(5))


def state(module):
    """Parameters (as leaves) and buffers by name, copied."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()} | buffers(module)


def buffers(module):
    return {name: b.detach().clone() for name, b in module.named_buffers()}


def gradients(y, dy, tensors):
    """Gradients by name; zero where nothing flows."""
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    if not y.requires_grad:
        return {name: torch.zeros_like(t) for name, t in wanted.items()}
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), grads, strict=True)}


def step_matches_reference(case, module, variant, x, mask=None, poison=False):
    """One forward and backward equals the reference: output, gradients, buffers."""
    more = extras(case, x)
    p = state(module)
    x_ref = x.clone().requires_grad_()
    want, updates = case.reference(x_ref, p, *more, training=module.training, mask=mask, **case.options[variant])
    dy = torch.randn_like(want)
    expected = gradients(want, dy, {"x": x_ref, **{name: p[name] for name, _ in module.named_parameters()}})

    x_own = x.clone()
    if mask is not None and poison:
        spread = mask if case.geometry == "row" else mask.unsqueeze(1)
        x_own = torch.where(spread.expand_as(x), x, torch.nan)
    x_own.requires_grad_()
    got = module(x_own, *more) if mask is None else module(x_own, *more, mask=mask)
    actual = gradients(got, dy, {"x": x_own, **dict(module.named_parameters())})

    assert_close(got, want)
    assert_grads_close(actual, expected)
    after = buffers(module)
    for name, before in p.items():
        if name in after:
            wanted = updates.get(name, before)
            if after[name].is_floating_point():
                assert_close(after[name], wanted, label=name)
            else:
                assert torch.equal(after[name], wanted), f"{name}: {after[name]}, expected {wanted}"


@by_variant
def test_equals_its_reference_over_steps_and_in_evaluation(case, variant):
    module = build(case, variant)
    for _ in range(3):
        step_matches_reference(case, module, variant, data(case))
    step_matches_reference(case, module.eval(), variant, data(case))


@pytest.mark.parametrize(
    ("case", "spatial"), [pytest.param(c, s, id=f"{c.name}-{s}d") for c in CASES if c.geometry == "channel" for s in c.spatial]
)
def test_takes_any_number_of_positions(case, spatial):
    shape = (*case.shape[:2], *(4, 3, 2)[:spatial])
    module = build(case)
    step_matches_reference(case, module, 0, data(case, shape))
    step_matches_reference(case, module.eval(), 0, data(case, shape))


def masks(case):
    generator = torch.Generator().manual_seed(3)
    if case.geometry == "channel":
        mask = torch.rand(case.shape[0], *case.shape[2:], generator=generator) < 0.6
        mask[:, 0] = True  # every sample has some positions
        return [mask]
    rows = torch.rand(*case.shape[:-1], 1, generator=generator) < 0.6
    single = torch.rand(case.shape, generator=generator) < 0.6
    single[..., :2] = True
    return [rows, single]


@pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(case, k, id=f"{case.name}-{k}") for case in CASES if case.masked for k in range(len(case.options))],
)
def test_padding_enters_nothing(case, variant):
    for mask in masks(case):
        module = build(case, variant)
        step_matches_reference(case, module, variant, data(case), mask, poison=True)
        step_matches_reference(case, module.eval(), variant, data(case), mask, poison=True)


@only(lambda case: case.masked)
def test_a_mask_of_another_shape_or_type_is_refused(case):
    module, x = build(case), data(case)
    with pytest.raises(ValueError, match=r"mask must"):
        module(x, *extras(case, x), mask=torch.ones(7, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boolean"):
        module(x, *extras(case, x), mask=torch.ones(masks(case)[0].shape))


@only(lambda case: case.derivative)
def test_first_and_second_derivatives(case):
    shape = (3, *case.shape[1:2], 2, 2) if case.geometry == "channel" and case.spatial[-1] >= 2 else (3, 2, case.shape[-1])
    module, x = build(case), data(case, shape).requires_grad_()
    more = extras(case, x)
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        # Buffers that a step moves are part of the call, so that every evaluation of it starts from the same state.
        values = dict(zip(names, parameters, strict=True)) | buffers(module)
        return torch.func.functional_call(module, values, (x, *more))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    torch.autograd.gradcheck(run, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@only(lambda case: case.derivative)
def test_third_derivative_equals_the_reference(case):
    module, x = build(case), data(case)

    def third(y, x):
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        (g1,) = torch.autograd.grad((y.sin() * weights).sum(), x, create_graph=True)
        (g2,) = torch.autograd.grad((g1.sin() * x).sum(), x, create_graph=True)
        (g3,) = torch.autograd.grad((g2.cos() * x).sum(), x)
        return g3

    more, p = extras(case, x), state(module)
    x_ref, x_own = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, _ = case.reference(x_ref, p, *more, training=True, mask=None, **case.options[0])
    expected = third(want, x_ref)
    error = (third(module(x_own, *more), x_own) - expected).abs().max() / expected.abs().max()
    assert error < 1e-9, f"third derivative off by {error:.2g} of its largest value"


# What the facts claim


@claims("shift")
def test_claim_shift(case):
    module, x = build(case), data(case)
    assert_close(copy.deepcopy(module)(x + 7.0, *extras(case, x)), module(x, *extras(case, x)), dtype=torch.float32)


@claims("scale")
def test_claim_scale(case):
    small = {"eps": 1e-14} if "eps" in inspect.signature(case.cls).parameters else {}
    module, x = build(case, **small), data(case)
    assert_close(copy.deepcopy(module)(x * 3.0, *extras(case, x)), module(x, *extras(case, x)), dtype=torch.float32)


@by_case
def test_claim_per_sample(case):
    module, x = build(case), data(case)
    more = extras(case, x)
    y = copy.deepcopy(module)(x, *more)
    others = (0, torch.cat((x[:1], x[1:] * 3 + 1))), (-1, torch.cat((x[:-1] * 3 + 1, x[-1:])))  # those after, those before
    alone = all(torch.allclose(copy.deepcopy(module)(other, *more)[i], y[i], rtol=1e-12, atol=1e-12) for i, other in others)
    assert alone == ("per-sample" in case.cls.facts.invariances), (
        "the first or the last sample's output must change with the others, or not, as claimed"
    )


@only(lambda case: case.geometry == "channel")
def test_claim_per_channel(case):
    module, x = build(case), data(case)
    more = extras(case, x)
    other = torch.cat((x[:, :1], x[:, 1:] * 3 + 1), 1)
    alone = torch.allclose(copy.deepcopy(module)(x, *more)[:, 0], copy.deepcopy(module)(other, *more)[:, 0], rtol=1e-12, atol=1e-12)
    assert alone == ("per-channel" in case.cls.facts.invariances), (
        "the first channel's output must change with the others, or not, as claimed"
    )


@by_case
def test_claim_train_differs(case):
    module, x = build(case), data(case)
    more = extras(case, x)
    module(data(case), *more)
    trained = copy.deepcopy(module)(x, *more)
    differs = not torch.allclose(trained, module.eval()(x, *more), rtol=1e-9, atol=1e-9)
    assert differs == case.cls.facts.train_differs


@only(lambda case: case.geometry == "channel")
def test_claim_folds(case):
    module, x = build(case), data(case)
    more = extras(case, x)
    module(x, *more)
    module.eval()
    a, b = data(case), data(case)
    slope = ((module(a, *more) - module(b, *more)) / (a - b)).transpose(0, 1).flatten(1)  # (C, N*S)
    constant = bool(((slope - slope[:, :1]).abs() <= 1e-9 * slope.abs().max()).all())
    assert constant == case.cls.facts.folds, "evaluation must be one affine map per channel, or not, as claimed"


@by_case
def test_claim_batch_of_one(case):
    module, x = build(case), data(case)[:1]
    if case.cls.facts.batch_of_one.startswith("refused"):
        with pytest.raises(ValueError, match=case.cls.__name__):
            module(x, *extras(case, x))
    else:
        assert module(x, *extras(case, x)).isfinite().all()


@only(lambda case: case.geometry == "channel")
def test_claim_one_position(case):
    module, refused = build(case), case.cls.facts.one_position.startswith("refused")
    for shape in ((*case.shape[:2], 1, 1), case.shape[:2]):
        if len(shape) - 2 not in case.spatial and not refused:
            continue
        x = data(case, shape)
        if refused:
            with pytest.raises(ValueError, match=case.cls.__name__):
                module(x, *extras(case, x))
        else:
            assert module(x, *extras(case, x)).isfinite().all()


# Types, layouts, sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("wide_parameters", [True, False], ids=["float-parameters", "half-parameters"])
@by_case
def test_half_types_are_rounded_once(case, dtype, wide_parameters):
    module = build(case, dtype=torch.float32 if wide_parameters else dtype)
    exact = copy.deepcopy(module).double()
    for offset in (0.0, 300.0):
        x = (data(case) + offset).to(dtype)
        y = module(x, *[e.to(dtype) if torch.is_tensor(e) and e.is_floating_point() else e for e in extras(case, x.double())])
        want = exact(
            x.double(), *[e.to(dtype).double() if torch.is_tensor(e) and e.is_floating_point() else e for e in extras(case, x.double())]
        )
        assert y.dtype == dtype
        assert y.isfinite().all()
        if wide_parameters or case.wide_products:
            assert_close(y, want, label=f"output at mean {offset:g}")


@by_case
def test_float32_is_exact_far_from_zero(case):
    module = build(case, dtype=torch.float32)
    exact = copy.deepcopy(module).double()
    x = data(case, dtype=torch.float32) + 2e4
    x_own, x_ref = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = (
        module(x_own, *cast(extras(case, x.double()), torch.float32)),
        exact(x_ref, *cast(extras(case, x.double()), torch.float32, torch.float64)),
    )
    assert_close(y, want)
    dy = torch.randn_like(want).float()
    (dx,), (dx_want,) = torch.autograd.grad(y, x_own, dy), torch.autograd.grad(want, x_ref, dy.double())
    assert_grads_close({"x": dx}, {"x": dx_want})


def cast(values, *dtypes):
    """Floating tensors of ``values`` rounded to each of ``dtypes`` in turn."""
    for dtype in dtypes:
        values = [v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for v in values]
    return values


@only(lambda case: case.geometry == "channel" and 2 in case.spatial)
def test_channels_last_stays_channels_last(case):
    module = build(case, dtype=torch.float32)
    x = data(case, (*case.shape[:2], 5, 3), torch.float32)
    more = cast(extras(case, x.double()), torch.float32)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    straight = x.clone().requires_grad_()
    y, want = copy.deepcopy(module)(last, *more), module(straight, *more)
    assert y.is_contiguous(memory_format=torch.channels_last), f"strides {y.stride()}"
    assert_close(y, want.double())
    dy = torch.randn_like(want)
    (dx,), (dx_want,) = torch.autograd.grad(y, last, dy), torch.autograd.grad(want, straight, dy)
    assert_grads_close({"x": dx}, {"x": dx_want.double()})


@by_case
def test_any_strides_of_input_and_gradient(case):
    module, x = build(case), data(case)
    more = extras(case, x)
    dy = torch.randn_like(module(x, *more))[:1].expand(case.shape)
    want = copy.deepcopy(module)
    plain_x = x.clone().requires_grad_()
    expected = gradients(want(plain_x, *more), dy.contiguous(), {"x": plain_x})
    wide = torch.zeros(*case.shape[:-1], case.shape[-1] * 2, dtype=x.dtype)
    for strided in (wide[..., ::2].copy_(x), x.transpose(0, -1).contiguous().transpose(0, -1)):
        strided = strided.detach().requires_grad_()
        again = copy.deepcopy(module)
        assert_grads_close(gradients(again(strided, *more), dy, {"x": strided}), expected)


@by_case
def test_the_input_is_left_alone(case):
    module, x = build(case), data(case)
    version, before = x._version, x.clone()
    y = module(x, *extras(case, x))
    assert x._version == version
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()


@by_case
def test_an_empty_batch_changes_nothing(case):
    module = build(case)
    before, x = buffers(module), data(case, (0, *case.shape[1:])).requires_grad_()
    y = module(x, *extras(case, x))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


@by_case
def test_integers_and_wrong_channels_are_refused(case):
    module, x = build(case), data(case)
    with pytest.raises(TypeError, match=rf"{case.cls.__name__}: the input must be floating point, got torch.int64"):
        module(x.long(), *extras(case, x))
    wrong = torch.cat((x, x), 1 if case.geometry == "channel" else -1) if case.counted else x.flatten()
    with pytest.raises(ValueError, match=rf"{case.cls.__name__}: the input must have shape"):
        module(wrong, *extras(case, x))


@pytest.mark.parametrize(
    ("call", "error", "pattern"), [pytest.param(*bad, id=f"{c.name}-{name}") for c in CASES for name, bad in c.bad.items()]
)
def test_bad_arguments_are_refused(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


@only(lambda case: "eps" in inspect.signature(case.cls).parameters)
def test_a_negative_eps_is_refused(case):
    with pytest.raises(ValueError, match=rf"{case.cls.__name__}: eps must be .* got -1"):
        case.make(eps=-1.0)


@by_case
def test_unknown_options_are_refused(case):
    with pytest.raises(TypeError, match="no_such_option"):
        case.make(no_such_option=1)


# State


@by_variant
def test_state_survives_saving_copying_and_pickling(case, variant):
    module, x = build(case, variant), data(case)
    more = extras(case, x)
    module(x, *more)
    module.eval()
    want = module(x, *more)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = case.make(variant).double()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh.eval(), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, *more), want)
    twin = copy.deepcopy(module).train()
    twin(x, *more)
    assert torch.equal(module(x, *more), want), "a copy shares state with its original"


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, k, id=f"{case.name}-{k}")
        for case in CASES
        if "device" in inspect.signature(case.cls).parameters
        for k in range(len(case.options))
    ],
)
def test_built_on_meta_and_brought_to_life(case, variant):
    module = case.make(variant, device="meta")
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    module = module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    fresh = case.make(variant)
    assert module.state_dict().keys() == fresh.state_dict().keys()
    for name, value in fresh.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), f"{name} is not reset"


@by_variant
def test_repr_names_the_class(case, variant):
    assert repr(case.make(variant)).startswith(f"{case.cls.__name__}(")


@by_case
def test_buffers_hold_no_graph_and_rest_in_evaluation(case):
    module, x = build(case), data(case).requires_grad_()
    for _ in range(2):
        module(x, *extras(case, x)).sum().backward()
    assert not any(b.requires_grad for b in module.buffers())
    before = buffers(module.eval())
    module(data(case), *extras(case, x))
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())


running = only(lambda case: issubclass(case.cls, RunningMoments) and case.make().running_mean is not None)


@running
def test_half_modules_keep_wide_estimates(case):
    module = case.make().bfloat16()
    assert {b.dtype for b in module.buffers() if b.is_floating_point()} == {torch.float32}
    assert {b.dtype for b in case.make(dtype=torch.float16).buffers() if b.is_floating_point()} == {torch.float32}
    assert {b.dtype for b in module.double().buffers() if b.is_floating_point()} == {torch.float64}


@running
def test_frozen_estimates_survive_train(case):
    module, x = build(case), data(case)
    more = extras(case, x)
    module(x, *more)
    want, before = module.eval()(x, *more), buffers(module)
    module.frozen = True
    assert torch.equal(module.train()(x, *more), want)
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())


@running
def test_a_bad_batch_does_not_spoil_the_estimates(case):
    module, x = build(case), data(case)
    module(x, *extras(case, x))
    before = buffers(module)
    bad = x.clone()
    bad[0, 0] = torch.inf
    module(bad, *extras(case, x))
    after = buffers(module)
    for name in before.keys() & {"running_mean", "running_var"}:
        assert torch.equal(after[name].view(before[name].shape)[..., 0], before[name][..., 0]), f"{name} of the bad channel moved"
    assert all(b.isfinite().all() for b in after.values())


@only(lambda case: case.steady)
def test_two_forwards_before_one_backward(case):
    module, x, other = build(case), data(case).requires_grad_(), data(case)
    more = extras(case, x)
    alone = copy.deepcopy(module)
    (expected,) = torch.autograd.grad(alone(x, *more).square().sum(), x)
    first = module(x, *more)
    module(other, *more)
    (dx,) = torch.autograd.grad(first.square().sum(), x)
    assert_close(dx, expected, label="gradient of x")


# Who looks at the operations


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@by_case
def test_checkpointing_counts_a_batch_once(case, reentrant):
    module, x = build(case), data(case).requires_grad_()
    more = extras(case, x)
    straight = copy.deepcopy(module)
    expected = gradients(straight(x, *more), torch.ones(case.shape, dtype=x.dtype), {"x": x, **dict(straight.named_parameters())})
    y = checkpoint(module, x, *more, use_reentrant=reentrant)
    y.sum().backward()
    actual = {"x": x.grad} | {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    assert_grads_close(actual, expected)
    for name, buffer in straight.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer), f"{name} moved twice"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_case
def test_compiles_without_graph_breaks(case, training):
    module, x = build(case).train(training), data(case).requires_grad_()
    more = extras(case, x)
    straight = copy.deepcopy(module)
    want = straight(x, *more)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x, *more)
    assert_close(y, want)
    dy = torch.randn_like(want)
    names = dict(module.named_parameters())
    assert_grads_close(gradients(y, dy, {"x": x, **names}), gradients(want, dy, {"x": x, **dict(straight.named_parameters())}))
    for name, buffer in straight.named_buffers():
        assert_close(dict(module.named_buffers())[name].double(), buffer.double(), label=name)


@by_case
def test_exports(case):
    module, x = build(case).eval(), data(case)
    more = extras(case, x)
    program = torch.export.export(module, (x, *more))
    assert_close(program.module()(x, *more), module(x, *more))


@only(lambda case: "per-sample" in case.cls.facts.invariances and case.extra is None and case.derivative)
def test_per_sample_gradients(case):
    module, x = build(case), data(case)
    values = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values, sample):
        return torch.func.functional_call(module, values, (sample.unsqueeze(0),)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(values, x)
    one_by_one = torch.stack([torch.func.grad(loss, argnums=1)(values, sample) for sample in x])
    assert_close(together, one_by_one)


@by_case
def test_plain_and_fused_agree(case):
    module, x = build(case, dtype=torch.float32), data(case, dtype=torch.float32)
    more = cast(extras(case, x.double()), torch.float32)
    plain = copy.deepcopy(module)
    with equinorm.plain():
        want = plain(x, *more)
    assert_close(module(x, *more), want.double())


@by_case
def test_autocast_and_inference_keep_the_input_type(case):
    module, x = build(case, dtype=torch.float32), data(case, dtype=torch.float32)
    more = cast(extras(case, x.double()), torch.float32)
    want = copy.deepcopy(module)(x, *more)
    with torch.autocast("cpu", torch.bfloat16):
        y = copy.deepcopy(module)(x, *more)
    assert y.dtype == torch.float32
    if case.wide_products:
        assert_close(y, want.double())
    with torch.inference_mode():
        assert_close(copy.deepcopy(module)(x, *more), want.double())


# Across processes


SYNCHRONIZED = [case for case in CASES if "process_group" in inspect.signature(case.cls).parameters]
SIZES = (5, 0, 2)


def _shard(rank, names):
    """Forward, backward and buffers of each named case on this rank's share of the batch."""
    results = {}
    for case in (case for case in SYNCHRONIZED if case.name in names):
        torch.manual_seed(11)
        module = build(case, process_group="world")
        x = data(case, (sum(SIZES), *case.shape[1:]))
        weights = torch.randn_like(x)
        start = sum(SIZES[:rank])
        mine = slice(start, start + SIZES[rank])
        own = x[mine].clone().requires_grad_()
        y = module(own, *extras(case, own))
        (dx,) = torch.autograd.grad((y.sin() * weights[mine]).sum(), own, create_graph=case.derivative)
        second = torch.autograd.grad((dx.sin() * weights[mine]).sum(), own)[0] if case.derivative else dx
        results[case.name] = {"y": y.detach(), "dx": dx.detach(), "second": second.detach(), **buffers(module)}
    return results


@pytest.fixture(scope="module")
def shards():
    return run_ranks(len(SIZES), _shard, [case.name for case in SYNCHRONIZED])


@pytest.mark.parametrize("case", SYNCHRONIZED, ids=lambda case: case.name)
def test_ranks_together_are_the_big_batch(case, shards):
    assert case.cls.facts.synchronizes, "a class with process_group must state what it synchronizes"
    torch.manual_seed(11)
    module = build(case)
    x = data(case, (sum(SIZES), *case.shape[1:]))
    weights = torch.randn_like(x)
    x = x.requires_grad_()
    y = module(x, *extras(case, x))
    (dx,) = torch.autograd.grad((y.sin() * weights).sum(), x, create_graph=case.derivative)
    second = torch.autograd.grad((dx.sin() * weights).sum(), x)[0] if case.derivative else dx
    assert_close(torch.cat([s[case.name]["y"] for s in shards]), y)
    assert_close(torch.cat([s[case.name]["dx"] for s in shards]), dx, label="gradient of x")
    assert_close(torch.cat([s[case.name]["second"] for s in shards]), second, label="second derivative")
    for name, buffer in module.named_buffers():
        for rank, shard in enumerate(shards):
            assert_close(shard[case.name][name].double(), buffer.double(), label=f"{name} on rank {rank}")
