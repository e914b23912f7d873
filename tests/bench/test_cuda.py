"""The benchmark for a CUDA device, on a machine without one: it says so, and what needs no device works."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equinorm.bench import cuda
from equinorm.bench.contenders import BY_NAME


def test_without_a_device_it_says_what_is_missing():
    result = subprocess.run(
        [sys.executable, "-m", "equinorm.bench.cuda"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "this needs a CUDA device" in result.stderr


@pytest.mark.parametrize("arguments", [["--norms", "btach"], ["--shapes", "64x"], ["--dtypes", "int8"]], ids=str)
def test_what_is_not_there_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        cuda.main(arguments)
    assert refused.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_the_check_passes_what_is_right_and_names_what_is_not(monkeypatch):
    chosen = [BY_NAME["layer"], BY_NAME["batch"]]
    assert cuda.check(chosen, ["float32", "bfloat16"], "cpu") == []
    monkeypatch.setitem(cuda.TOLERANCE, "bfloat16", (1e-4, 1e-4))
    lines = cuda.check(chosen[:1], ["float32", "bfloat16"], "cpu")
    assert [line.partition(" off by ")[0] for line in lines] == [
        f"layer, bfloat16, contiguous, mean/std 0.5, std 1: {what}" for what in ("output", "gradient")
    ]


def test_every_line_of_the_table_counts_the_least_traffic(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "compilation", lambda module: module)
    timers = {"cold": lambda call: (call(), 1.0)[1], "warm": lambda call: (call(), 0.5)[1]}
    chosen = [BY_NAME[name] for name in ("batch", "rms", "conditional_instance")]
    lines = cuda.table(chosen, [(4, 6, 3, 5), (8, 32)], ["float32"], timers, "cpu")
    assert [line["who"] for line in lines[:6]] == ["ours", "ours", "torch", "torch", "torch, compiled", "torch, compiled"]
    assert {line["layout"] for line in lines if line["norm"] == "batch"} == {"contiguous", "channels_last"}
    for line in lines:
        elements = 256 if line["norm"] == "rms" else 360
        # The copy moves 2 * 1024 bytes in the same time.
        assert line["of copy"] == pytest.approx({"forward": 2, "backward": 3}[line["pass"]] * elements * 4 / 2048)
        # A graph holds forward and backward, or forward alone: here both take as long.
        assert (line["cold"], line["warm"], line["below goal"]) == (1.0, {"forward": 0.5, "backward": 0.0}[line["pass"]], False)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(lines)


def test_what_cannot_be_captured_has_no_number(capsys):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    assert math.isnan(cuda.captured(refuse, lambda: None))
    assert capsys.readouterr().out == "no graph: operation not permitted when stream is capturing\n"
