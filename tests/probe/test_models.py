"""Models of every make: what they take and return, how they are wrapped, and what they write in their forward."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import equinorm
from equinorm.probe import run
from tests.helpers import run_ranks
from tests.probe import networks as net


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Pair(NamedTuple):
    image: torch.Tensor
    mask: torch.Tensor


class Flexible(nn.Module):
    """Returns what it is told to."""

    def __init__(self, result):
        super().__init__()
        self.fc, self.result = nn.Linear(8, 4), result

    def forward(self, x, mask=None):
        y = self.fc(x)
        return self.result(y if mask is None else y * mask)


@pytest.mark.parametrize(
    ("result", "loss"),
    [
        (lambda y: y, "stand-in"),
        (lambda y: (y, None, [y.sum(1)]), "stand-in"),
        (lambda y: {"logits": y, "ids": y.argmax(1)}, "stand-in"),
        (lambda y: OrderedDict(loss=y.mean(), logits=y), "the model's own loss"),
        (lambda y: Output(y, y.mean()), "the model's own loss"),
        (lambda y: Output(y), "stand-in"),
        (lambda y: y.square().mean(), "the output"),
    ],
)
def test_outputs_of_every_kind(result, loss):
    report = equinorm.probe(Flexible(result), torch.randn(5, 8))
    assert report.loss == loss
    assert report.call("fc").gradient is not None
    assert report.call("").forward is not None


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(5, 8),
        (torch.randn(5, 8),),
        [torch.randn(5, 8), torch.ones(5, 1)],
        {"x": torch.randn(5, 8), "mask": torch.ones(5, 1)},
        Pair(torch.randn(5, 8), torch.ones(5, 1)),
    ],
)
def test_batches_of_every_kind(batch):
    report = equinorm.probe(Flexible(lambda y: y), batch)
    assert report.failure is None
    assert report.call("fc").gradient is not None


def test_a_batch_with_its_target():
    seen = []

    def loss(output, target):
        seen.append(target)
        return F.cross_entropy(output, target)

    target = torch.tensor([0, 1, 2, 3, 0])
    report = equinorm.probe(Flexible(lambda y: y), (torch.randn(5, 8), target), loss)
    assert report.loss == "loss_fn"
    assert report.loss_value > 0
    assert torch.equal(seen[0], target)
    model = nn.Linear(8, 4)
    report = equinorm.probe(model, (torch.randn(5, 8), target))
    assert "taken for targets" in " ".join(report.notes)


def test_a_mapping_as_the_only_argument_and_a_call_of_ones_own():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, batch):
            return self.fc(batch["image"])

    assert equinorm.probe(Takes(), {"image": torch.randn(5, 8)}).failure is None
    report = equinorm.probe(Takes(), Pair(torch.randn(5, 8), torch.ones(1)), forward=lambda model, b: model({"image": b.image}))
    assert report.failure is None
    assert report.input.keys() == {"0", "1"}


def test_packed_sequences():
    rnn = nn.LSTM(8, 16, batch_first=True)
    batch = pack_padded_sequence(torch.randn(3, 5, 8), torch.tensor([5, 3, 2]), batch_first=True)
    report = equinorm.probe(rnn, batch)
    assert report.failure is None
    assert report.calls[0].shape == (10, 16)
    assert report.calls[0].gradient is not None


def test_a_module_called_several_times_has_as_many_records():
    fc = nn.Linear(8, 8)
    model = nn.Sequential(fc, nn.ReLU(inplace=True), fc, fc)
    report = equinorm.probe(model, torch.randn(5, 8))
    assert [(call.name, call.number) for call in report.calls if call.role == "linear"] == [("0", 0), ("0", 1), ("0", 2)]
    assert all(call.gradient is not None for call in report.calls)
    assert report.parameters[0].aliases == ("2.weight", "3.weight")


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_activations_are_measured_before_they_overwrite(inplace):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(8, 16), nn.ReLU(inplace=inplace), nn.Linear(16, 4)

        def forward(self, x):
            y = self.act(self.fc(x))
            return self.out(y + 1)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 8)
    pre = model.fc(x)
    pre.retain_grad()
    post = F.relu(pre)
    post.retain_grad()
    y = model.out(post + 1)
    report = equinorm.probe(model, x, lambda out: out.square().mean())
    y.square().mean().backward()
    for name, tensor in (("fc", pre), ("act", post)):
        call = report.call(name)
        assert call.forward.mean == pytest.approx(tensor.mean().item(), abs=1e-6)
        assert call.gradient.rms == pytest.approx(tensor.grad.square().mean().sqrt().item(), rel=1e-5)
    assert report.call("act").saturation == pytest.approx((pre < 0).float().mean().item(), abs=0.01)


def test_functions_are_recorded_as_activations_and_sums():
    report = equinorm.probe(net.ResNet(net.PreActBlock, blocks=(1, 1)), torch.randn(4, 3, 16, 16))
    sums = [call for call in report.calls if call.role == "residual"]
    assert [call.name for call in sums] == ["blocks.0:add", "blocks.1:add"]
    assert [call.residual.module for call in sums] == ["blocks.0", "blocks.1"]
    first = sums[0].residual
    assert first.skip == pytest.approx(report.calls[first.skip_from].forward.rms)
    assert first.branch == pytest.approx(report.calls[first.branch_from].forward.rms)
    assert report.calls[first.branch_from].name == "blocks.0.conv2"
    assert report.call("blocks.0:relu#2").saturation == pytest.approx(0.5, abs=0.1)


# torch itself warns when its compiler is first imported.
COMPILER = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


@COMPILER
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrapped_models_are_probed_as_they_were_written(wrap):
    torch.manual_seed(0)
    model, x = net.mlp(2), torch.randn(4, 64)
    expected = equinorm.probe(model, x)
    wrapped = wrap(model)
    report = equinorm.probe(wrapped, x)
    assert [call.name for call in report.calls] == [call.name for call in expected.calls]
    assert report.calls[0].gradient == expected.calls[0].gradient


@COMPILER
def test_a_compiled_part_of_a_model_is_seen_into():
    model = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU())))
    report = equinorm.probe(model, torch.randn(4, 8))
    assert [call.name for call in report.leaves()] == ["0", "1.0", "1.1"]


def ddp_rank(rank):
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(net.mlp(2))
    report = equinorm.probe(model, torch.randn(4, 64))
    assert report.failure is None
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(4, 64)).sum().backward()  # and training goes on
    return [call.name for call in report.calls], report.call("0").gradient.rms > 0


def test_a_distributed_model():
    assert run_ranks(2, ddp_rank) == [(["0", "1", "2", "3", "4", ""], True)] * 2


def test_autocast_is_that_of_the_caller():
    model, x = net.mlp(2), torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = equinorm.probe(model, x)
    assert report.call("0").dtype == "bfloat16"
    assert report.environment["autocast"] == ["cpu bfloat16"]


def test_a_library_norm_and_its_running_estimates():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), equinorm.BatchNorm(8), equinorm.GroupNorm(2, 8))
    report = equinorm.probe(model, torch.randn(8, 3, 8, 8) * 3 + 1)
    batch, group = report.norms
    assert (batch.pools, batch.values, batch.tracks, batch.removes_mean) == ("NS", 8 * 36, True, "channel")
    assert (group.pools, group.values, group.tracks) == ("GS", 4 * 36, False)
    y = model[0](torch.randn(8, 3, 8, 8) * 3 + 1)
    assert batch.log_variance_drift == pytest.approx(y.var((0, 2, 3)).log().mean().item(), abs=0.3)


class NormAct(nn.BatchNorm2d):
    """A norm that holds its activation, as some libraries write it."""

    def __init__(self, c):
        super().__init__(c)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1))


def test_a_norm_with_an_activation_inside_is_both():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8))
    model[1].bias.data.fill_(-9)
    report = equinorm.probe(model, torch.randn(8, 3, 8, 8))
    assert [call.name for call in report.leaves()] == ["0", "1:batch_norm", "1.act"]
    (norm,) = report.norms
    assert (norm.name, report.calls[norm.call].name) == ("1", "1:batch_norm")
    kinds = {finding.kind: finding.layers[0] for finding in report.findings}
    assert kinds["bias_before_norm"] == "0"
    assert kinds["dead_channels"] == "1.act"


def test_drift_is_measured_in_units_of_the_running_deviation():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(4000, 3)
    x = (x - x.mean(0)) / x.std(0)
    norm.running_mean.copy_(torch.tensor([0.0, 6.0, 0.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 100.0]))
    record = equinorm.probe(norm, x).norms[0]
    assert record.mean_drift_max == pytest.approx(3.0, abs=1e-3)
    assert record.mean_drift_channel == 1
    assert record.mean_drift == pytest.approx((9 / 3) ** 0.5, abs=1e-3)
    assert record.log_variance_drift_channel == 2
    assert record.log_variance_drift_max == pytest.approx(-4.605, abs=1e-3)


def test_time_steps_of_a_recurrent_layer():
    model = net.LastStep(nn.RNN(64, 64, batch_first=True))
    x = torch.randn(4, 12, 64)
    steps = equinorm.probe(model, x, lambda y: y.sum()).call("rnn").steps
    y = model.rnn(x.requires_grad_())[0]
    model.head(y[:, -1]).sum().backward()
    assert steps.length == 12
    torch.testing.assert_close(torch.tensor(steps.forward), y.detach().square().mean((0, 2)).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(steps.gradient), x.grad.square().mean((0, 2)).sqrt(), rtol=1e-4, atol=0)


def test_weights_have_their_spectrum():
    model = nn.Sequential(nn.Linear(300, 400, bias=False), nn.Linear(400, 5), nn.ConvTranspose2d(5, 7, 3))
    report = equinorm.probe(model[:2], torch.randn(4, 300), weights=True)
    for record, layer in zip([report.parameters[0], report.parameters[1]], model, strict=False):
        values = torch.linalg.svdvals(layer.weight.detach().double())
        assert record.spectral_norm == pytest.approx(values[0].item(), rel=1e-2)
        assert record.stable_rank == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=2e-2)
    report = equinorm.probe(model[2], torch.randn(1, 5, 4, 4), weights=True)
    matrix = model[2].weight.detach().transpose(0, 1).flatten(1)
    assert report.parameters[0].spectral_norm == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-4)


def test_gap_is_the_difference_of_the_two_modes_without_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4))
    x = torch.randn(32, 8)
    gap = equinorm.probe(model, x).gap
    model[1].eval()
    train = model(x)
    model[2].reset_running_stats()
    model.eval()
    evaluated = model(x)
    assert gap.difference == pytest.approx(((train - evaluated).square().mean() / train.square().mean()).sqrt().item(), rel=1e-4)
    assert gap.layer == "2"
    assert equinorm.probe(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), x).gap.difference == 0


def test_the_package_and_the_function_are_one():
    from equinorm.probe import Report, probe

    assert equinorm.probe.Report is Report
    assert probe is run.probe
    assert isinstance(equinorm.probe(nn.Linear(2, 2), torch.randn(3, 2)), Report)
    with pytest.raises(AttributeError, match="no attribute 'prob'"):
        equinorm.prob  # noqa: B018
