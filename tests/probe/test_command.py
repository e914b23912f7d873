"""``equinorm probe``: what it takes, prints, writes and returns."""

from __future__ import annotations

import json

import pytest

from equinorm.cli import main

MODELS = """
import torch
from torch import nn


def healthy():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    return model


def exploding():
    model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.ReLU())])
    for layer in model[::2]:
        nn.init.normal_(layer.weight, 0, 1)
    return model


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, ids, mask=None):
        assert ids.max() < 50
        h = self.embed(ids)
        return self.head(h if mask is None else h * mask.unsqueeze(-1))


def text():
    return Text()


def images():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def wants(width):
    return nn.Linear(width, width)


def number():
    return 3


def raising():
    raise RuntimeError("no such weights")


def batches():
    for _ in range(2):
        yield torch.randn(16, 32), torch.randint(0, 10, (16,))


def tensor():
    return torch.randn(16, 32)


def none():
    return []


def loss(output, target):
    return nn.functional.cross_entropy(output, target)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_healthy_model(capsys):
    assert main(["probe", "nets.py:healthy", "--input", "64x32"]) == 0
    out = capsys.readouterr().out
    assert "No findings." in out
    assert "The input is random" in " ".join(out.split())


def test_a_broken_model_fails_and_says_why(capsys, folder):
    assert main(["probe", "nets.py:exploding", "--input", "64x32", "--html", "out.html"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "severe: activations explode" in out
    assert "The page: out.html" in out
    assert "<svg" in (folder / "out.html").read_text()


@pytest.mark.parametrize(("fail_on", "code"), [("never", 0), ("severe", 1), ("note", 1)])
def test_the_severity_that_fails_can_be_chosen(fail_on, code):
    assert main(["probe", "nets.py:exploding", "--input", "64x32", "--fail-on", fail_on]) == code


def test_thresholds_can_be_moved(capsys):
    high = ["--threshold", "growth_severe=1e30", "--threshold", "growth_warning=1e30", "--threshold", "jump_severe=1e30"]
    assert main(["probe", "nets.py:exploding", "--input", "64x32", *high[:4]]) == 0
    assert "activations explode" not in capsys.readouterr().out


def test_json_with_prescriptions(capsys):
    assert main(["probe", "nets.py:exploding", "--input", "64x32", "--json", "--prescribe", "--weights"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == 1
    assert data["findings"][0]["kind"] == "exploding_forward"
    assert data["parameters"][0]["spectral_norm"] > 1
    assert "exploding_forward" in data["prescriptions"][0]["resolved"]
    assert data["notes"][0].startswith("The input is random")


def test_data_from_a_loader_and_a_loss(capsys):
    assert main(["probe", "nets.py:healthy", "--loader", "nets.py:batches", "--loss", "nets.py:loss", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["loss"] == "loss_fn"
    assert not any("random" in note for note in data["notes"])
    assert main(["probe", "nets.py:healthy", "--loader", "nets.py:tensor", "--eval", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["calls"][0]["shape"] == [16, 64]
    assert data["environment"]["training"] is False


def test_integer_inputs_and_names(capsys):
    assert main(["probe", "nets.py:text", "--input", "8x12:int64:0-50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"][0]["shape"] == [8, 12, 16]
    assert main(["probe", "nets.py:text", "--input", "mask=8x12", "--input", "ids=8x12:int64:0-50"]) == 0
    assert main(["probe", "nets.py:text", "--input", "8x12:int64:0-50", "--input", "8x12"]) == 0


def test_the_same_seed_gives_the_same_report(capsys):
    outs = []
    for seed in ("1", "1", "2"):
        main(["probe", "nets.py:images", "--input", "4x3x8x8", "--seed", seed, "--json"])
        outs.append(json.loads(capsys.readouterr().out)["calls"][0]["forward"]["rms"])
    assert outs[0] == outs[1] != outs[2]


def test_a_model_that_refuses_the_input_is_a_failure_with_the_layer(capsys):
    assert main(["probe", "nets.py:images", "--input", "4x1x8x8"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "layer '0' (Conv2d) refused in the forward pass" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nets.py:healthy"], "give the shape of an input, as in --input 8x3x224x224, or --loader file.py:function"),
        (["nets.py:healthy", "--input", "8x32", "--loader", "nets.py:tensor"], "give --input or --loader, not both"),
        (["nets.py:helthy", "--input", "8x32"], "model 'nets.py:helthy': nets has no function 'helthy'; did you mean healthy?"),
        (["missing.py:f", "--input", "8x32"], "model 'missing.py:f': there is no file missing.py"),
        (["nets.py", "--input", "8x32"], "model 'nets.py': name a function as file.py:function or module:function"),
        (["nets.py:wants", "--input", "8x32"], "must be callable without arguments, but it takes width; wrap it in a function"),
        (["nets.py:number", "--input", "8x32"], "model 'nets.py:number' must return a torch.nn.Module, got int"),
        (["nets.py:raising", "--input", "8x32"], "model 'nets.py:raising' raised RuntimeError: no such weights"),
        (["nets.py:healthy", "--input", "8,32"], "--input '8,32' must be a shape as 8x3x224x224"),
        (["nets.py:healthy", "--input", "0x32"], "the batch must hold samples"),
        (["nets.py:text", "--input", "8x12:int64"], "say which integers, as 8x12:int64:0-1000"),
        (["nets.py:text", "--input", "8x12:int64:9-9"], "say which integers"),
        (["nets.py:text", "--input", "8x12:float32:0-9"], "a range is for integers"),
        (["nets.py:text", "--input", "8x12:float12"], "the type must be one of float32"),
        (["nets.py:text", "--input", "ids=8x12:int64:0-50", "--input", "8x12"], "either all --input have names (name=8x3) or none"),
        (["nets.py:text", "--input", "a b=8x12"], "'a b' is no name of an argument"),
        (["nets.py:healthy", "--loader", "nets.py:none"], "must give at least one batch, got none"),
        (["nets.py:healthy", "--input", "8x32", "--threshold", "growth_sever=3"], "did you mean 'growth_severe'?"),
        (
            ["nets.py:healthy", "--input", "8x32", "--threshold", "growth_severe=much"],
            "--threshold 'growth_severe=much' must be NAME=NUMBER",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments, message, capsys):
    assert main(["probe", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
