"""The built-in tasks: fair to every norm, and CIFAR-10 read from its published files."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from equinorm.compare.norms import NormSpec
from equinorm.compare.task import BUILT_IN, Task
from equinorm.compare.tasks import cifar10_files
from equinorm.compare.tasks.cifar10 import cifar10, shift_and_mirror
from equinorm.compare.tasks.classifier import Samples, Splits, evaluate, generator, train
from equinorm.compare.tasks.digits import digits, digits_mlp
from equinorm.compare.tasks.models import deep_mlp, plain_weights, vgg


class Drawing(nn.Module):
    """A norm that draws random numbers while it is made and in every call."""

    def __init__(self, channels):
        super().__init__()
        self.shift = torch.rand(channels)

    def forward(self, x):
        return x + torch.rand(())


def first_inputs(task, norm_layer, seed, **options):
    """What the first norm of the model is given in every training step, at a learning rate that moves no weight."""
    seen = []

    def spy(channels):
        norm = norm_layer(channels)
        if not seen:
            seen.append(None)  # the first norm made is the first one run
            norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()) if module.training else None)
        return norm

    for _ in task(spy, 256, seed, lr=1e-30, epochs=2, **options):
        pass
    return torch.stack(seen[1:])


@pytest.mark.parametrize("task", [digits_mlp, digits])
def test_weights_and_order_of_the_data_are_the_same_for_every_norm(task):
    torch.manual_seed(0)
    reference = first_inputs(task, lambda channels: nn.Identity(), seed=0)
    assert len(reference) == 2 * 1024 // 256
    for name in ("batch", "group", "switch", "batch_channel"):
        torch.testing.assert_close(first_inputs(task, NormSpec.parse(name).norm_layer, seed=0), reference, rtol=0, atol=0)
    torch.manual_seed(1)  # nor does the state of the global generator matter
    torch.testing.assert_close(first_inputs(task, Drawing, seed=0), reference, rtol=0, atol=0)
    another = first_inputs(task, lambda channels: nn.Identity(), seed=1)
    assert not torch.equal(another[0], reference[0])
    first, second = reference.chunk(2)
    assert not torch.equal(first, second)  # a new order in the second epoch ...
    assert torch.equal(
        first.flatten(0, 1).double().sum(0).round(decimals=3), second.flatten(0, 1).double().sum(0).round(decimals=3)
    )  # ... of all


@pytest.mark.parametrize(("task", "weight"), [(digits_mlp, ""), (digits_mlp, "+ws"), (digits, ""), (digits, "+ws")])
def test_digits_are_learned(task, weight):
    spec = NormSpec.parse(f"batch{weight}")
    options = {"weight_layer": spec.weight_layer} if weight else {}
    *_, last = task(spec.norm_layer, 32, 0, epochs=2, **options)
    assert last["test_accuracy"] > 0.8
    assert last["validation_accuracy"] > 0.8
    assert last["seconds_per_step"] > 0


def test_a_seed_repeats_bit_for_bit():
    first, again, another = (
        [{name: value for name, value in metrics.items() if name != "seconds_per_step"} for metrics in digits_mlp(norm, 64, seed, epochs=2)]
        for norm, seed in [(NormSpec.parse("batch").norm_layer, seed) for seed in (0, 0, 1)]
    )
    assert first == again
    assert first != another


def test_weight_method_is_on_every_layer_that_a_norm_follows():
    standardized = NormSpec.parse("batch+ws")
    for model in (
        deep_mlp(64, 16, 3, 10, standardized.norm_layer, standardized.weight_layer, generator(0)),
        vgg([[8, 8], [16]], 10, standardized.norm_layer, standardized.weight_layer, generator(0), channels=1),
    ):
        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        assert [nn.utils.parametrize.is_parametrized(layer) for layer in layers] == [True] * 3 + [False]


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 50), (4, 12), (25, 2)])
def test_every_batch_size_sees_the_same_number_of_samples_at_a_proportional_rate(batch_size, steps):
    samples = Samples(torch.arange(50.0)[:, None] / 50, torch.arange(50) % 2)
    model = nn.Linear(1, 2)
    bias = model.bias.detach().clone()
    batches, weights = [], []

    def watch(module, inputs):
        if module.training:
            batches.append(inputs[0])
            weights.append(module.weight.detach().clone().requires_grad_())

    model.register_forward_pre_hook(watch)
    (metrics,) = train(model, Splits(samples, samples, samples), batch_size=batch_size, epochs=1, lr=0.64, order=generator(0))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    assert len(torch.cat(batches).unique()) == batch_size * steps  # no sample twice
    assert metrics["seconds_per_step"] > 0
    classes = (batches[0].flatten() * 50).round().long() % 2
    nn.functional.cross_entropy(nn.functional.linear(batches[0], weights[0], bias), classes).backward()
    torch.testing.assert_close(weights[0] - weights[1], 0.01 * batch_size * weights[0].grad, rtol=1e-3, atol=1e-6)


def test_evaluation_counts_every_sample_once_in_evaluation_mode():
    x = torch.randn(1203, 4)
    y = torch.randint(3, (1203,))
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3))
    loss, accuracy = evaluate(model, Samples(x, y), torch.Tensor.float)
    scores = model[1](x)
    assert loss == pytest.approx(nn.functional.cross_entropy(scores, y).item(), rel=1e-5)
    assert accuracy == pytest.approx((scores.argmax(1) == y).double().mean().item())


def test_built_in_tasks_describe_themselves():
    for name in BUILT_IN:
        task = Task(name)
        assert task.stated("metric") == "accuracy"
        defaults = {name: parameter.default for name, parameter in task.signature.parameters.items()}
        described = " ".join(task.description.split())
        assert f"default learning rate is {defaults['lr']} at batch size 64" in described
        assert f"By default {defaults['epochs']} passes over the training data" in described
        if "depth" in defaults:
            assert f"by default {defaults['depth']} of {defaults['width']} features" in described


# CIFAR-10 in small: real layout, few records.


def images(count, seed):
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), numbers.integers(0, 10, count, dtype=np.uint8)


def write_binary(folder, per_file=4):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*cifar10_files.TRAINING_FILES, *cifar10_files.TEST_FILES]):
        x, y = images(per_file, number)
        np.concatenate([y[:, None], x.reshape(per_file, -1)], axis=1).tofile(folder / name)


def write_parquet(folder, per_file=4):
    pa = pytest.importorskip("pyarrow")
    from PIL import Image
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    parts = [images(per_file, number) for number in range(6)]
    for name, chosen in (("train-00000-of-00001", parts[:5]), ("test-00000-of-00001", parts[5:])):
        files = []
        for x in np.concatenate([x for x, _ in chosen]):
            png = io.BytesIO()
            Image.fromarray(x.transpose(1, 2, 0)).save(png, "PNG")
            files.append({"bytes": png.getvalue(), "path": None})
        labels = np.concatenate([y for _, y in chosen]).astype(np.int64)
        parquet.write_table(pa.table({"img": files, "label": labels}), folder / f"{name}.parquet")


@pytest.mark.parametrize(
    ("write", "place"), [(write_binary, ""), (write_binary, "cifar-10-batches-bin"), (write_parquet, ""), (write_parquet, "plain_text")]
)
def test_cifar10_is_read_from_either_published_form(tmp_path, write, place):
    write(tmp_path / place)
    training, test = cifar10_files.load(str(tmp_path))
    x, y = zip(*(images(4, number) for number in range(6)), strict=True)
    assert torch.equal(training.x, torch.from_numpy(np.concatenate(x[:5])))
    assert torch.equal(training.y, torch.from_numpy(np.concatenate(y[:5])).long())
    assert torch.equal(test.x, torch.from_numpy(x[5]))
    assert torch.equal(test.y, torch.from_numpy(y[5]).long())
    assert cifar10_files.sizes(str(tmp_path)) == (20, 4)


def test_cifar10_trains_with_weight_standardization_and_batch_channel_norm(tmp_path):
    write_binary(tmp_path)
    spec = NormSpec.parse("batch_channel+ws")
    (metrics,) = cifar10(spec.norm_layer, 9, 0, data=str(tmp_path), epochs=1, weight_layer=spec.weight_layer)
    assert math.isfinite(metrics["train_loss"])
    assert metrics["test_accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def _cut(folder):
    file = folder / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])


def _wrong_class(folder):
    file = folder / "test_batch.bin"
    file.write_bytes(bytes([11]) + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("write", "damage", "message"),
    [
        (write_binary, lambda folder: (folder / "data_batch_3.bin").unlink(), r"lacks data_batch_3\.bin\. Get cifar-10"),
        (write_binary, _cut, r"data_batch_2\.bin is damaged: expected records of 3073 bytes, got a file of 12291 bytes"),
        (write_binary, _wrong_class, r"test_batch\.bin is damaged: expected classes from 0 to 9, got 11"),
        (write_binary, lambda folder: [file.unlink() for file in folder.iterdir()], "holds neither data_batch_1"),
        (write_parquet, lambda folder: next(folder.glob("test-*")).unlink(), r"lacks test-\*\.parquet"),
        (write_parquet, lambda folder: next(folder.glob("train-*")).write_bytes(b"PAR1"), "train-00000-of-00001.parquet is damaged"),
        (write_parquet, lambda folder: _rename(next(folder.glob("train-*"))), "columns img and label, got 20 rows with picture, label"),
    ],
)
def test_damaged_or_missing_cifar10_is_named_before_anything_runs(tmp_path, write, damage, message):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}.*--data"):
        Task("cifar10").stated("check")(batch_sizes=[2], data=str(tmp_path))


def _rename(file):
    from pyarrow import parquet

    parquet.write_table(parquet.read_table(file).rename_columns(["picture", "label"]), file)


def test_image_that_is_none_is_named(tmp_path):
    write_parquet(tmp_path)
    from pyarrow import parquet

    file = next(tmp_path.glob("test-*"))
    table = parquet.read_table(file).to_pydict()
    table["img"][2]["bytes"] = b"no image"
    import pyarrow as pa

    parquet.write_table(pa.table(table), file)
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet is damaged: row 2 is not an image"):
        cifar10_files.load(str(tmp_path))


def test_parquet_without_its_reader_names_the_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'pip install "equinorm\[parquet\]"'):
        cifar10_files.sizes(str(tmp_path))


def test_batch_size_larger_than_the_data_is_refused(tmp_path):
    write_binary(tmp_path)
    with pytest.raises(ValueError, match="got batch size 19 for 18 images"):
        Task("cifar10").stated("check")(batch_sizes=[2, 19], data=str(tmp_path))


def test_shifts_and_mirroring_move_pixels_and_nothing_else():
    x = torch.arange(1.0, 1 + 40 * 2 * 6 * 5).view(40, 2, 6, 5)
    moved = shift_and_mirror(x, generator(3), reach=2)
    assert moved.shape == x.shape
    found = set()
    for before, after in zip(x, moved, strict=True):
        padded = nn.functional.pad(before, (2, 2, 2, 2))
        candidates = {
            (down, right, mirrored): (window.flip(2) if mirrored else window)
            for down in range(5)
            for right in range(5)
            for mirrored in (False, True)
            for window in [padded[:, down : down + 6, right : right + 5]]
        }
        (match,) = [key for key, window in candidates.items() if torch.equal(window, after)]
        found.add(match)
    assert len(found) > 20  # of 50
    assert {mirrored for _, _, mirrored in found} == {False, True}
    assert torch.equal(shift_and_mirror(x, generator(3), reach=2), moved)


def test_plain_weights_leave_the_layer_alone():
    layer = nn.Linear(2, 2)
    assert plain_weights(layer) is layer
