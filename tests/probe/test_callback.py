"""The callback: what it sees is what a probe sees, it costs no pass, leaves nothing between samples, and fits the usual frameworks."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import equinorm
from equinorm.probe import JsonLines, ProbeCallback, TensorBoard, Tracker


class Kept:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.lines, self.found, self.closed = [], [], False

    def scalars(self, step, values):
        self.lines.append((step, dict(values)))

    def finding(self, step, finding):
        self.found.append((step, finding))

    def close(self):
        self.closed = True


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def images(n=16):
    return torch.randn(n, 3, 8, 8)


def train(model, optimizer, steps, x):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_it_sees_what_a_probe_sees():
    model, x = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = equinorm.probe(model, x, lambda y: y.square().mean(), optimizer=optimizer, gap=False)
    with ProbeCallback(model, optimizer) as callback:
        train(model, optimizer, 1, x)
    assert callback.report is not None
    assert callback.report.calls == expected.calls
    assert callback.report.norms == expected.norms
    assert callback.report.parameters == expected.parameters
    assert [f.kind for f in callback.report.findings] == [f.kind for f in expected.findings]


def test_training_is_the_same_with_it_and_no_pass_is_added():
    results, calls = [], []
    for watched in (False, True):
        model, x = network(), images()
        count = []
        model[0].register_forward_hook(lambda *_, count=count: count.append(1))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if watched:
            with ProbeCallback(model, optimizer, every=2):
                train(model, optimizer, 5, x)
        else:
            train(model, optimizer, 5, x)
        results.append(model.state_dict())
        calls.append(len(count))
    assert calls == [5, 5]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_there_are_no_hooks_between_samples():
    model, x = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    log = Kept()
    with ProbeCallback(model, optimizer, every=3, loggers=[log]) as callback:
        seen = []
        for _ in range(7):
            train(model, optimizer, 1, x)
            seen.append(hooks(model))
        assert seen == [0, 0, 1, 0, 0, 1, 0]  # one hook waits on the model in the step before a sample
        assert callback.count == 7
    assert hooks(model) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert log.closed
    assert [step for step, _ in log.lines] == [0, 3, 6]


def test_what_is_logged():
    model, x = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = Kept()
    with ProbeCallback(model, optimizer, loggers=[log]) as callback:
        train(model, optimizer, 1, x)
    step, values = log.lines[0]
    report = callback.report
    assert step == 0
    assert values["signal/0"] == report.call("0").forward.rms
    assert values["gradient/4"] == report.call("4").gradient.rms
    assert values["dead/2"] == 0
    assert values["parameter gradient/4.weight"] > 0
    weight = next(p for p in report.parameters if p.name == "4.weight")
    assert values["step size/4.weight"] == weight.update == pytest.approx(0.1 * weight.gradient.rms / weight.rms, rel=1e-4)
    assert values["drift of running mean/1"] > 0
    assert values["findings/severe"] == len(report.severe)


def test_a_finding_is_told_once_and_again_when_it_comes_back():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    log = Kept()
    good = [p.detach().clone() for p in model.parameters()]

    def set_bias(value):
        with torch.no_grad():
            for p, g in zip(model.parameters(), good, strict=True):
                p.copy_(g)
            if value:
                model[2].bias.fill_(value)

    with ProbeCallback(model, optimizer, every=1, loggers=[log]):
        for value in (-100, -100, 0, -100):
            set_bias(value)
            train(model, optimizer, 1, torch.randn(64, 16))
    assert [step for step, finding in log.found if finding.kind == "dead_channels"] == [0, 3]


def test_without_an_optimizer_the_loop_says_when_a_step_is_done():
    model, x = network(), images()
    callback = ProbeCallback(model, every=2)
    seen = []
    for _ in range(4):
        model.zero_grad()
        model(x).square().mean().backward()
        callback.step()
        seen.append(callback.report)
    assert seen[0] is seen[1] is not seen[2]
    assert callback.report.parameters[0].gradient.rms > 0
    assert callback.report.parameters[0].update is None
    callback.close()


def test_the_first_of_several_forward_passes_is_observed_and_validation_is_not():
    model, x = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ProbeCallback(model, optimizer) as callback:
        model.eval()
        model(images(3))
        model.train()
        with torch.no_grad():
            model(images(5))
        for part in x.split(8):
            model(part).square().mean().backward()
        optimizer.step()
    assert callback.report.call("0").shape == (8, 8, 6, 6)
    assert len(callback.report.calls) == 6
    assert callback.report.call("0").gradient is not None


def test_a_model_that_raises_leaves_no_mode_behind():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            raise RuntimeError("stop") if x is None else ValueError("no")

    model = Raises()
    with ProbeCallback(model) as callback:
        with pytest.raises(RuntimeError, match="stop"):
            model(None)
        assert torch.overrides._get_current_function_mode() is None
        assert callback.report is None
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_have_gradients(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.last = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(checkpoint(self.body, self.first(x), use_reentrant=reentrant))

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ProbeCallback(model, optimizer) as callback:
        for _ in range(2):  # two forward passes in the step
            model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    assert [c.name for c in callback.report.leaves()] == ["first", "body.0", "body.1", "last"]
    assert all(c.gradient is not None for c in callback.report.leaves())


def test_a_compiled_model_runs_as_written_in_the_observed_step():
    model, x = network(), images()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ProbeCallback(compiled, optimizer) as callback:
        train(compiled, optimizer, 1, x)
        assert not graphs
        assert [c.name for c in callback.report.leaves()] == ["0", "1", "2", "3", "4"]
        train(compiled, optimizer, 1, x)
        assert len(graphs) == 1


def test_closures():
    """Optimizers that run forward and backward themselves: the look comes after the step."""
    model, x = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with ProbeCallback(model, optimizer, every=2) as callback:
        for _ in range(3):
            optimizer.step(closure)
    assert callback.count == 3
    assert callback.report.call("0").gradient is not None
    assert callback.report.parameters[0].update is None


def test_only_the_first_process_observes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ProbeCallback(model, optimizer) as callback:
        train(model, optimizer, 1, images())
        assert callback.report is None
        assert hooks(model) == 0


def test_errors():
    with pytest.raises(TypeError, match=r"ProbeCallback: model must be a torch\.nn\.Module, got function"):
        ProbeCallback(network)
    with pytest.raises(ValueError, match=r"ProbeCallback: every must be at least 1, got 0"):
        ProbeCallback(network(), every=0)
    with pytest.raises(ValueError, match=r"no threshold is called 'growth'"):
        ProbeCallback(network(), thresholds={"growth": 1})


# -------------------------------------------------------------------------------------------------------------------------------- loggers


def test_json_lines(tmp_path):
    model, x = network(), images() * 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with ProbeCallback(model, optimizer, every=1, loggers=[JsonLines(tmp_path / "run.jsonl")]):
        train(model, optimizer, 2, x)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "scalars" in line] == [0, 1]
    findings = [line["finding"] for line in lines if "finding" in line]
    assert findings[0]["kind"] == "unnormalized_input"
    log = JsonLines(tmp_path / "run.jsonl")
    log.scalars(2, {"x": float("nan")})
    log.close()
    assert (tmp_path / "run.jsonl").read_text().splitlines()[-1] == '{"step": 2, "scalars": {"x": null}}'


def test_tensorboard_through_a_writer():
    class Writer:
        def __init__(self):
            self.scalars, self.texts, self.state = {}, [], "open"

        def add_scalar(self, name, value, step):
            self.scalars[name, step] = value

        def add_text(self, name, text, step):
            self.texts.append((name, text, step))

        def flush(self):
            self.state = "flushed"

        def close(self):
            self.state = "closed"

    writer = Writer()
    log = TensorBoard(writer)
    log.scalars(5, {"a": 1.0, "b": float("inf")})
    report = equinorm.probe(network(), images() * 1000)
    log.finding(5, report.findings[0])
    log.close()
    assert writer.scalars == {("a", 5): 1.0}
    assert writer.texts[0][0] == "findings/unnormalized_input"
    assert writer.texts[0][1].startswith("**")
    assert writer.state == "flushed"  # it was handed over, and may be in use elsewhere


@pytest.mark.filterwarnings("ignore")  # of the framework itself
def test_tensorboard_in_a_folder(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("google.protobuf")
    log = TensorBoard(tmp_path)
    log.scalars(5, {"a": 1.0})
    log.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.filterwarnings("ignore")  # of the framework itself
def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    log = Kept()
    with ProbeCallback(model, optimizer, every=2, loggers=[log, Tracker(accelerator)]) as callback:
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(model(images()).square().mean())
            optimizer.step()
    assert [step for step, _ in log.lines] == [0, 2]
    assert callback.report.parameters[0].update > 0


def test_a_tracker_hands_numbers_on():
    class Accelerator:
        def __init__(self):
            self.logged, self.printed = [], []

        def log(self, values, step):
            self.logged.append((step, values))

        def print(self, text):
            self.printed.append(text)

    accelerator = Accelerator()
    log = Tracker(accelerator)
    log.scalars(3, {"a": 1.0})
    log.finding(3, equinorm.probe(network(), images() * 1000).findings[0])
    log.close()
    assert accelerator.logged == [(3, {"a": 1.0})]
    assert accelerator.printed[0].startswith("step 3: ")


def test_optimizers_wrapped_by_others_are_unwrapped():
    class Wrapped(torch.optim.Optimizer):
        """As accelerate's: a class of its own that holds the optimizer."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ProbeCallback(model, Wrapped(Wrapped(optimizer))) as callback:
        train(model, optimizer, 1, images())
        assert callback.optimizer is optimizer
        assert callback.count == 1


# ----------------------------------------------------------------------------------------------------------------------------- frameworks


def test_lightning_by_its_protocol(monkeypatch):
    """The order of Lightning's hooks, played by hand; the module's own forward is never called, its layers are."""
    package, pytorch = types.ModuleType("lightning"), types.ModuleType("lightning.pytorch")
    pytorch.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", pytorch)
    log = Kept()
    callback = ProbeCallback.lightning(every=2, loggers=[log])
    assert isinstance(callback, pytorch.Callback)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback.on_train_start(None, model)
    for index in range(3):
        x = images()
        callback.on_train_batch_start(None, model, x, index)

        def closure(x=x):
            loss = model[4](model[3](model[2](model[1](model[0](x))))).square().mean()
            optimizer.zero_grad()
            callback.on_before_backward(None, model, loss)
            loss.backward()
            callback.on_before_optimizer_step(None, model, optimizer)
            return loss

        optimizer.step(closure)
        callback.on_train_batch_end(None, model, None, x, index)
    assert [step for step, _ in log.lines] == [0, 2]
    report = callback.probe.report
    assert [c.name for c in report.leaves()] == ["0", "1", "2", "3", "4"]
    assert report.parameters[0].update > 0
    callback.on_train_end(None, model)
    assert log.closed
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore")  # of the framework itself
def test_lightning():
    pytest.importorskip("lightning_utilities")
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    log = Kept()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(24)), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[ProbeCallback.lightning(every=2, loggers=[log])],
    )  # fmt: skip
    trainer.fit(Module(), data)
    assert [step for step, _ in log.lines] == [0, 2]
    assert log.lines[0][1]["gradient/net.0"] > 0
    assert log.lines[0][1]["step size/net.0.weight"] > 0


def test_transformers_by_its_protocol(monkeypatch):
    package = types.ModuleType("transformers")
    package.TrainerCallback = type("TrainerCallback", (), {})
    monkeypatch.setitem(sys.modules, "transformers", package)
    log = Kept()
    callback = ProbeCallback.transformers(every=2, loggers=[log])
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer, lr_scheduler=None)
    train(model, optimizer, 3, images())
    callback.on_train_end(None, None, None, model=model)
    assert [step for step, _ in log.lines] == [0, 2]
    assert log.closed


@pytest.mark.filterwarnings("ignore")  # of the framework itself
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels=None):
            y = self.net(x)
            return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}

    log = Kept()
    data = [{"x": torch.randn(3, 8, 8), "labels": torch.tensor(1)} for _ in range(24)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(Model(), arguments, train_dataset=data, callbacks=[ProbeCallback.transformers(every=2, loggers=[log])])
    trainer.train()
    assert [step for step, _ in log.lines] == [0, 2]
    assert log.lines[0][1]["gradient/net.0"] > 0
    assert log.lines[0][1]["step size/net.0.weight"] > 0
