"""The benchmark's file, goals, chart and command, on made-up numbers and tiny inputs."""

from __future__ import annotations

import csv

import pytest

from equinorm.bench import command
from equinorm.bench import results as module
from equinorm.bench.goals import goals, side_by_side
from equinorm.bench.grid import Entry
from equinorm.bench.measure import BATCH, COPY, OURS, Timing, measure
from equinorm.bench.results import COLUMNS, Results, read
from equinorm.bench.table import missed, summary
from equinorm.cli import main
from equinorm.compare.errors import InputError

MIB = 1 << 20
BIG, SMALL = (64, 256, 32, 32), (32, 64, 8, 8)


def timings(entry, copy=0.01, **seconds):
    return [Timing(entry, who.replace("_", " "), value, copy, 15) for who, value in {"ours": 0.02, "copy": copy, **seconds}.items()]


def made(norm="batch", shape=BIG, dtype="float32", layout="contiguous", of="forward", pages="reused", **seconds):
    return timings(Entry(pages, norm, shape, dtype, layout, of), **seconds)


def reached(found):
    return {goal.what: (round(goal.value, 6), goal.target) for goal in goals(found, 32 * MIB)}


def test_the_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "bench.csv"
    written = [*made(torch=0.05), Timing(made()[0].entry, "timm", None, 0.01, 0, "does not run: ValueError: a, b")]
    results = Results(path)
    results.add(written)
    there, back = read(path)
    assert back == written
    assert there == results.circumstances
    assert {"equinorm", "torch", "processor", "threads", "commit", "date", "last level cache"} <= set(there)
    head, *rows = path.read_text().splitlines()
    assert head.startswith("# {")
    (first, *_) = csv.DictReader(rows)
    assert tuple(first) == COLUMNS
    assert (first["ms"], first["of_copy"], first["gb_per_s"]) == ("20", "0.5", "6.71")


def test_a_file_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["bench", "--norms", "rms", "--shapes", "6x16", "--dtypes", "float32", "--rounds", "1", "--quick", "--pages", "default"]
    path = str(tmp_path / "bench.csv")
    assert main([*command, "--csv", path, "--passes", "eval"]) == 0
    first = (tmp_path / "bench.csv").read_text()
    assert main([*command, "--csv", path, "--passes", "eval", "both"]) == 0
    second = (tmp_path / "bench.csv").read_text()
    assert second.startswith(first)
    assert [line.split(",")[5] for line in second.splitlines()[2:]].count("eval") == len(first.splitlines()) - 2
    assert "numbers reach their goal" in capsys.readouterr().out


def test_numbers_of_other_code_are_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "bench.csv"
    monkeypatch.setattr(module, "commit", lambda: "aaaaaaa")
    Results(path)
    monkeypatch.setattr(module, "commit", lambda: "bbbbbbb")
    with pytest.raises(InputError, match=r"measured under other circumstances \(commit differ\)"):
        Results(path)


@pytest.mark.parametrize("text", ["", "shape,ms\n1,2\n", '# {"torch": "2"}\npages,norm\nnew,batch\n'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="is no file of equinorm bench"):
        read(path)


def test_goals_of_a_layer_that_torch_has():
    assert reached(made(torch=0.05)) == {
        "geometric mean, best peer / ours": (2.5, 1.8),
        "share of a copy's bandwidth": (0.5, 0.6),  # contiguous float32 beyond the last cache
        "torch / ours": (2.5, 0.9),
        "torch eager / ours": (2.5, 2.0),
    }
    assert reached(made("rms", (32768, 768), of="both", torch=0.08, **{"torch, compiled": 0.03})) == {
        "geometric mean, best peer / ours": (1.5, 1.5),
        "share of a copy's bandwidth": (1.25, 0.6),
        "torch, compiled / ours": (1.5, 0.9),
        "torch eager / ours": (4.0, 3.0),
    }
    assert reached(made("instance", layout="channels_last", pages="default", torch=0.05)).keys() == {
        "geometric mean, best peer / ours",
        "torch / ours",
        "torch eager / ours",
    }
    assert reached(made("group", dtype="bfloat16", of="both", torch=0.05))["share of a copy's bandwidth"] == (1.25, 0.4)


def test_goals_of_small_tensors():
    assert reached(made(shape=SMALL, torch=0.05)) == {"geometric mean, best peer / ours": (2.5, 1.8), "torch / ours": (2.5, 0.67)}


def test_goals_of_a_method_that_torch_has_not():
    found = reached(made("switch", of="both", layout="channels_last", composed=0.2, our_batch_norm=0.01))
    assert found == {
        "share of a copy's bandwidth": (1.25, 0.4),
        "composed / ours": (10.0, 5.0),
        "our batch norm / ours": (0.5, 1 / 1.5),
    }
    assert BATCH == "our batch norm"


def test_what_is_below_its_goal_is_listed_the_furthest_first():
    lines = missed(goals([*made(torch=0.01), *made(of="both", torch=0.025), *made(of="eval", torch=0.03)], 32 * MIB))
    assert lines[0] == "geometric mean, best peer / ours, forward, pages reused, entries: 1: 0.50, goal 1.8"
    assert lines[2] == "3 of 9 numbers reach their goal; below it:"
    assert lines[3] == "    0.50 of 2    torch eager / ours: batch 64x256x32x32 float32 contiguous forward, pages reused"


def test_the_summary_leaves_small_tensors_out():
    head, lines = summary(side_by_side([*made(torch=0.05), *made(dtype="bfloat16", torch=0.2), *made(shape=SMALL, torch=0.01)]))
    assert head[0] == "norm"
    assert lines == [["batch", "reused", "forward", "50%", "50%", "5.00", "2.50"]]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_chart_is_drawn(tmp_path, suffix):
    from equinorm.bench.chart import draw

    found = [*made(torch=0.05), *made("switch", of="both", composed=0.2), *made("rms", (32768, 768), torch=0.1)]
    draw(side_by_side(found), {"processor": "a processor", "threads": 2, "date": "2026-11-21"}, tmp_path / f"chart.{suffix}")
    content = (tmp_path / f"chart.{suffix}").read_bytes()
    assert len(content) > 5000
    if suffix == "svg":
        assert b"prefers-color-scheme" in content
        for name in (b"switch", b"rms", b"a processor"):
            assert name in content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norms", "bach"], "invalid choice: 'bach'"),
        (["--shapes", "3x4x5"], "a shape is ROWSxFEATURES or SAMPLESxCHANNELSxHEIGHTxWIDTH"),
        (["--rounds", "0"], "must be a positive number, got 0"),
        (["--time-budget", "soon"], "must be a positive number, got soon"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norms", "rms", "--shapes", "4x6x5x5"], "nothing to measure: no norm of --norms takes a shape of --shapes"),
        (["--plot", "chart.txt"], "--plot needs a file that ends in .svg or .png, got chart.txt"),
    ],
)
def test_what_cannot_be_done(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["bench", "--plot", "chart.svg"]) == 2
    assert '--plot needs matplotlib: pip install "equinorm[compare]"' in capsys.readouterr().err


def test_an_input_that_fails_does_not_end_the_run(monkeypatch, capsys, tmp_path):
    def fails_on_bfloat16(entries, *options):
        if entries[0].dtype == "bfloat16":
            raise RuntimeError("out of memory")
        return measure(entries, *options)

    monkeypatch.setattr(command, "measure", fails_on_bfloat16)
    arguments = ["--norms", "rms", "--shapes", "6x16", "--passes", "eval", "--rounds", "1", "--pages", "default", "--quick"]
    assert main(["bench", *arguments, "--csv", str(tmp_path / "bench.csv")]) == 1
    assert "failed: rms 6x16 bfloat16 contiguous eval, pages default: RuntimeError: out of memory" in capsys.readouterr().out
    _, found = read(tmp_path / "bench.csv")
    assert {timing.entry.dtype for timing in found} == {"float32"}


def test_the_time_budget_ends_a_run_in_good_order(capsys):
    command = ["bench", "--norms", "batch", "rms", "--shapes", "6x16", "4x8x3x3", "--rounds", "1", "--pages", "default", "--quick"]
    assert main([*command, "--time-budget", "1e-9"]) == 0
    out = capsys.readouterr().out
    assert "the time budget is spent: 6 of 6 inputs were not measured" in out


def test_compiled_peers_are_timed_where_asked_for(capsys):
    command = ["bench", "--norms", "rms", "--shapes", "6x16", "--dtypes", "float32", "--passes", "eval", "--rounds", "1"]
    assert main([*command, "--pages", "default", "--compile", "torch"]) == 0
    assert "torch, compiled" in capsys.readouterr().out


def test_ours_is_always_there():
    assert {t.who for t in made()} == {OURS, COPY}
