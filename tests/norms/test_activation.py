"""ActNorm: the first batch, once and over all processes; its inverse, its log-determinant and its checkpoints."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

import equinorm
from tests.helpers import assert_close, run_ranks


def example(n=5):
    return torch.randn(n, 3, 4, 2, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])[:, None, None].double() + 7


def make(**options):
    return equinorm.ActNorm(3, **options).double()


@pytest.mark.parametrize("options", [{}, {"scale": 2.0}, {"logscale_factor": 3.0, "eps": 1e-3}])
def test_the_first_batch_comes_out_standardized(options):
    norm, x = make(**options), example()
    y = norm(x)
    std = x.std((0, 2, 3), correction=0)
    assert_close(y.mean((0, 2, 3)), torch.zeros(3), dtype=torch.float32)
    assert_close(y.std((0, 2, 3), correction=0), options.get("scale", 1.0) * std / (std + options.get("eps", 1e-6)))


def test_one_deviation_for_all_channels():
    norm, x = make(batch_variance=True), example()
    y = norm(x)
    assert norm.log_scale.unique().numel() == 1
    assert_close(y.square().mean(), torch.tensor(1.0), dtype=torch.float32)
    assert_close(y.mean((0, 2, 3)), torch.zeros(3), dtype=torch.float32)


def test_the_first_batch_is_first_once_and_its_gradient_is_ordinary():
    norm, x = make(), example()
    before = norm.bias, norm.log_scale
    norm(x).square().sum().backward()
    assert norm.bias is before[0]
    assert norm.log_scale is before[1], "an optimizer built before the first batch keeps its references"
    # y = (x + b) e^s, so dL/ds = sum 2 y^2 and dL/db = sum 2 y e^s.
    y = norm(x).detach()
    assert_close(norm.log_scale.grad, 2 * y.square().sum((0, 2, 3)))
    assert_close(norm.bias.grad, 2 * (y.sum((0, 2, 3)) * norm.log_scale.exp()).detach(), dtype=torch.float32)
    parameters = [p.detach().clone() for p in norm.parameters()]
    norm(example() * 100)
    norm.eval()(example() * 100)
    assert all(torch.equal(p, q) for p, q in zip(parameters, norm.parameters(), strict=True))


def test_the_inverse_and_the_log_determinant():
    norm, x = make(logscale_factor=3.0), example(2)
    y, logdet = norm(x, logdet=torch.tensor([10.0, 20.0], dtype=torch.float64))
    jacobian = torch.autograd.functional.jacobian(norm, x[:1]).reshape(24, 24)
    own = torch.linalg.slogdet(jacobian).logabsdet
    assert_close(logdet, torch.stack((10 + own, 20 + own)))
    back, nothing = norm.inverse(y, logdet=logdet)
    assert_close(back, x)
    assert_close(nothing, torch.tensor([10.0, 20.0]))
    assert torch.equal(norm(y, reverse=True), back)


def test_positions_without_data_have_no_determinant_and_no_say():
    x, mask = example(2), torch.ones(2, 4, 2, dtype=torch.bool)
    mask[1, 1:] = False
    norm, alone = make(), make()
    y, logdet = norm(torch.where(mask.unsqueeze(1), x, torch.nan), 0.0, mask=mask)
    seen = torch.cat((x[0].flatten(1), x[1, :, 0]), 1).T
    assert_close(alone(seen), torch.cat((y[0].flatten(1), y[1, :, 0]), 1).T)
    assert_close(logdet, norm.log_scale.detach().sum() * torch.tensor([8, 2]))


def test_nothing_is_defined_before_the_first_batch():
    x = example()
    with pytest.raises(RuntimeError, match="ActNorm: evaluation is not defined before the first training batch"):
        make().eval()(x)
    with pytest.raises(RuntimeError, match="ActNorm: the inverse is not defined before the first training batch"):
        make().inverse(x)
    norm = make()
    norm.initialize(x)
    assert_close(norm.eval()(x).mean((0, 2, 3)), torch.zeros(3), dtype=torch.float32)


def test_initialization_survives_loading_copying_and_a_new_start():
    norm, x = make(), example()
    norm(x)
    fresh = make()
    fresh.load_state_dict(norm.state_dict())
    for other in (fresh, pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x * 9), norm(x * 9)), "a loaded norm must not take its next batch for the first"
    norm.load_state_dict(make().state_dict())
    assert_close(norm(x * 9).mean((0, 2, 3)), torch.zeros(3), dtype=torch.float32)
    norm.reset_parameters()
    with pytest.raises(RuntimeError, match="before the first training batch"):
        norm.eval()(x)


def test_published_checkpoints_load():
    norm = make()
    values = {"bias": torch.rand(1, 3, 1, 1).double(), "logs": torch.rand(1, 3, 1, 1).double(), "is_initialized": torch.ones(1)}
    norm.load_state_dict(values)
    x = example()
    assert_close(norm.eval()(x), (x + values["bias"]) * values["logs"].exp())


def test_an_empty_first_batch_is_not_the_first():
    norm, x = make(), example()
    assert norm(x[:0]).shape == (0, 3, 4, 2)
    assert not norm.initialized
    norm(x)
    assert norm.initialized


def test_a_constant_channel_is_warned_of_and_bounded():
    x = torch.cat((example()[:, :1], torch.full((5, 1, 4, 2), 4.0).double(), example()[:, :1]), 1)
    norm, bounded = make(), make(max_log_scale=2.0)
    with pytest.warns(RuntimeWarning, match=r"ActNorm: channels \[1\] are constant .* scale of 1e\+06"):
        norm.initialize(x)
    assert_close(norm.log_scale[1], torch.tensor(math.log(1e6)), dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"channels \[0, 1, 2\] are constant"):
        bounded.initialize(x[:1, :, :1, :1])
    assert bounded.log_scale.tolist() == [2.0] * 3


def test_a_first_batch_must_be_finite():
    norm, x = make(), example()
    with pytest.raises(ValueError, match="ActNorm: the batch that initializes must be finite"):
        norm(x / 0)
    assert not norm.initialized
    assert not norm.bias.any()


def test_half_inputs_far_from_zero_come_out_standardized():
    x = (torch.randn(64, 3, 4, 2) + 300).half()
    y = equinorm.ActNorm(3)(x)
    assert y.dtype == torch.float16
    assert_close(y, make()(x.double()))


def _first_batch(rank, sizes):
    x = torch.randn(7, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    norm = make()
    nobody = norm(x[:0]).shape == (0, 3, 4) and not norm.initialized
    y = norm(x.split(sizes)[rank])
    lonely = make(process_group=None)
    if rank != 1:
        lonely(x.split(sizes)[rank])
    return nobody, y.detach(), norm.state_dict(), lonely.state_dict()


def test_all_processes_initialize_together():
    ranks = run_ranks(3, _first_batch, (5, 0, 2))
    x = torch.randn(7, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected = make()
    want = expected(x)
    assert_close(torch.cat([y for _, y, _, _ in ranks]), want)
    for nobody, _, state, _ in ranks:
        assert nobody
        for name, value in expected.state_dict().items():
            assert_close(state[name].double(), value.double(), label=name)
    assert [bool(lonely["initialized"]) for *_, lonely in ranks] == [True, False, True]
    assert not torch.equal(ranks[0][3]["bias"], ranks[2][3]["bias"])


def test_trains_in_a_flow():
    flow, x = nn.ModuleList(make() for _ in range(2)), example(8)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-4)
    losses = []
    for _ in range(5):
        y, logdet = x, torch.zeros(8, dtype=torch.float64)
        for norm in flow:
            y, logdet = norm(y, logdet)
        loss = (0.25 * y.pow(4).flatten(1).sum(1) - logdet).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
