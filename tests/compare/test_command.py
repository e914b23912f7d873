"""``python -m equinorm compare``: runs, stops, goes on, shares its work, and says what is wrong."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from equinorm.cli import main
from equinorm.compare import demo
from equinorm.compare.command import repeatable
from equinorm.compare.plan import Plan

GRID = ("tiny.py:task", "--norms", "none", "batch", "layer", "--batch-sizes", "2,4", "--seeds", "2", "--out", "out")
CELLS = 3 * 2 * 2


def test_runs_writes_and_adds_nothing_the_second_time(tiny):
    first = tiny.finish(tiny.start(*GRID, "--workers", "2", "--json"))
    result = first.json
    assert result["schema"] == "equinorm.compare/1"
    assert result["cells"] == {"asked": CELLS, "measured": CELLS, "failed": 0, "missing": 0}
    assert result["metric"] == "test_accuracy"
    assert [(row["norm"], row["batch_size"]) for row in result["results"]] == [(n, b) for n in ("none", "batch", "layer") for b in (2, 4)]
    assert len(set(result["results"][0]["scores"])) == 2  # one for each seed
    for row in result["results"]:
        assert row["low"] <= row["median"] <= row["high"]
        assert (row["seeds"], len(row["scores"]), row["confidence"], row["failed"]) == (2, 2, 0.5, {})
        assert row["seconds_per_step"] == 0.5
        assert row["peak_memory_bytes"] >= 0
        assert row["scores"] == result["results"][0]["scores"]  # made of initial weights: the same for every norm and batch size
    (machine,) = result["machines"]
    assert {"equinorm", "torch", "python", "processor", "threads"} <= machine.keys()
    assert result["command"].startswith("equinorm compare tiny.py:task --norms none batch layer")

    folder = tiny.folder / "out"
    files = {name: (folder / name).stat().st_mtime_ns for name in ("results.csv", "cells.csv", "epochs.csv", "report.html", "study.db")}
    assert {path.rsplit("/", 1)[-1] for path in result["files"].values()} == files.keys() - {"study.db"}
    assert len(_lines(folder / "results.csv")) == 6
    assert len(_lines(folder / "cells.csv")) == CELLS
    assert len(_lines(folder / "epochs.csv")) == CELLS * 2
    assert "this must not reach the results" in (folder / "output.log").read_text()
    assert len(tiny.starts()) == CELLS
    assert f"{CELLS} cells: 0 finished before, {CELLS} to measure" in first.err.splitlines()

    second = tiny.run(*GRID, "--workers", "2")
    assert len(tiny.starts()) == CELLS
    assert f"{CELLS} finished before, 0 to measure" in second.err
    assert "none" in second.out
    assert "report.html" in second.out
    more = tiny.run(*GRID, "--seeds", "3", "--json")  # a larger grid adds its own cells and keeps the rest
    assert len(tiny.starts()) == CELLS + 6
    assert more.json["cells"]["measured"] == CELLS + 6


def test_two_commands_share_one_study(tiny):
    storage = f"sqlite:///{tiny.folder}/shared.db"
    both = [tiny.start(*GRID[:-1], folder, "--storage", storage, "--option", "pause=0.05", "--json") for folder in ("a", "b")]
    results = [tiny.finish(process) for process in both]
    assert sorted(tiny.starts()) == sorted(set(tiny.starts()))
    assert len(tiny.starts()) == CELLS
    assert results[0].json["results"] == results[1].json["results"]
    assert results[0].json["cells"]["measured"] == CELLS


def test_goes_on_after_kill_and_loses_only_the_cells_in_flight(tiny):
    arguments = (*GRID, "--workers", "2", "--option", "pause=0.4", "--stale-after", "2", "--json")
    process = tiny.start(*arguments)
    _wait_for(lambda: len(tiny.starts()) >= 5)
    process.kill()
    process.communicate()
    begun = tiny.starts()
    resumed = tiny.run(*arguments)
    assert resumed.json["cells"] == {"asked": CELLS, "measured": CELLS, "failed": 0, "missing": 0}
    again = len(tiny.starts()) - CELLS
    assert 1 <= again <= 2, f"{again} cells were measured twice, with 2 in flight; before: {begun}"
    assert len(set(tiny.starts())) == CELLS


def test_workers_end_with_a_command_that_is_killed(tiny):
    process = tiny.start(*GRID, "--workers", "2", "--option", "pause=100")
    _wait_for(lambda: len(tiny.starts()) == 2)
    workers = [int(line.rsplit(" ", 1)[1]) for line in (tiny.folder / "starts.txt").read_text().splitlines()]
    assert all(map(_alive, workers))
    process.kill()
    process.communicate()
    _wait_for(lambda: not any(map(_alive, workers)), seconds=60)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stops_on_request_and_keeps_what_is_done(tiny, sent):
    arguments = (*GRID, "--option", "pause=0.2")
    process = tiny.start(*arguments)
    _wait_for(lambda: len(tiny.starts()) >= 3)
    os.killpg(process.pid, sent)  # as a terminal or a batch system does: the workers get it too
    stopped = tiny.finish(process, code=130)
    assert "cells are finished and kept" in stopped.err
    shown = tiny.run(*arguments, "--report-only", "--json").json["cells"]
    assert shown["measured"] in (len(tiny.starts()) - 1, len(tiny.starts()))  # the last one was in flight, or just done
    assert shown["missing"] == CELLS - shown["measured"] > 0


def test_failed_cells_are_recorded_and_the_others_go_on(tiny):
    common = ("tiny.py:task", "--norms", "none", "instance", "--batch-sizes", "2,3", "--seeds", "1", "--json")
    kinds = {}
    for fail, code in (("raise", 1), ("diverge", 0), ("die", 1)):
        result = tiny.run(*common, "--out", fail, "--option", f"fail={fail}", code=code)
        assert result.json["cells"] == {"asked": 4, "measured": 1, "failed": 3, "missing": 0}
        failures = {(line["norm"], line["batch_size"]): line for line in result.json["failures"]}
        assert failures["instance", 2]["state"] == failures["instance", 3]["state"] == "refused"
        assert "InstanceNorm" in failures["instance", 2]["reason"]
        kinds[fail] = failures["none", 3]
    assert kinds["raise"]["state"] == "error"
    assert kinds["raise"]["reason"] == "RuntimeError: no such luck"
    assert kinds["diverge"]["state"] == "diverged"
    assert kinds["diverge"]["reason"] == "train_loss is nan after epoch 2"
    assert kinds["diverge"]["epochs"] == 1
    assert kinds["die"]["state"] == "died"
    assert "SIGKILL" in kinds["die"]["reason"]
    before = len(tiny.starts())
    tiny.run(*common, "--out", "raise", "--option", "fail=raise", code=1)
    assert len(tiny.starts()) == before  # a failure is a result
    tiny.run(*common, "--out", "raise", "--option", "fail=raise", "--retry-failed", code=1)
    assert len(tiny.starts()) == before + 3
    page = (tiny.folder / "raise" / "report.html").read_text()
    assert "no such luck" in page
    assert "Traceback" in page


def test_grid_of_learning_rates_is_chosen_by_validation_and_reported_on_test(tiny):
    result = tiny.run(
        "tiny.py:task", "--norms", "layer", "--batch-sizes", "2", "--seeds", "2", "--lr", "0.01,0.1,1.0", "--out", "out", "--json"
    ).json
    (row,) = result["results"]
    assert row["lr"] == 0.1
    assert result["cells"]["measured"] == 6
    at_rate = [line for line in _lines(tiny.folder / "out" / "cells.csv") if line["lr"] == "0.1"]
    assert row["scores"] == [float(line["test_accuracy"]) for line in at_rate]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("silent", "yielded nothing: it must yield a dict of metrics per epoch"),
        ("empty", "it yielded an empty dict"),
        ("words", "metrics must be numbers; the task yielded 'good' (str) for 'accuracy'"),
        ("no_dict", "it yielded 0.9 (float)"),
        ("other_metric", "the task yielded no metric 'accuracy' (or 'test_accuracy'), only loss: name one of those with --metric"),
        ("no_generator", "must be a generator function"),
    ],
)
def test_a_task_without_metrics_stops_the_command(tiny, task, message):
    assert message in tiny.run(f"tiny.py:{task}", "--norms", "none", "--batch-sizes", "2", "--seeds", "1", code=2).err


def test_plain_task_needs_only_accuracy(tiny):
    assert "0.750" in tiny.run("tiny.py:plain", "--norms", "none", "layer", "--batch-sizes", "2", "--seeds", "1", "--out", "out").out
    assert "One seed: there are no intervals" in (tiny.folder / "out" / "report.html").read_text()
    assert "s per epoch" in (tiny.folder / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits-mpl"], "unknown task 'digits-mpl': did you mean digits-mlp"),
        (["nothing.py:task"], "there is no file nothing.py"),
        (["tiny.py:tusk"], "has no function 'tusk'; did you mean task?"),
        (["tiny.py:STARTS"], "is not a function"),
        (["no.such.module:task"], "module 'no.such.module' cannot be imported"),
        (["tiny.py:no_norm_layer"], "does not take norm_layer"),
        (["tiny.py:picky"], "task 'tiny.py:picky': the moon is not full"),
        (["--norms", "bacth"], "did you mean 'batch'"),
        (["--norms", "group:groups=2"], "Its options are num_groups"),
        (["--norms", "batch:eps=-1"], "norm 'batch:eps=-1' cannot be made"),
        (["--norms", "none:eps=1"], "norm 'none' takes no options"),
        (["--norms", "group:num_groups"], "is not understood: expected NAME"),
        (["--norms", "ba tch"], "is not understood: expected NAME"),
        (["--norms", "batch+group"], "'group' is a norm: name it before the +"),
        (["--norms", "weight_standardization"], "is a weight method: name it after a +"),
        (["tiny.py:plain", "--norms", "batch+ws"], "has no parameter 'weight_layer', so norm batch+ws cannot be used"),
        (["tiny.py:plain", "--lr", "0.1"], "has no parameter 'lr', so --lr cannot be used"),
        (["tiny.py:task", "--option", "depth=3"], "has no parameter 'depth', so --option depth=3 cannot be used; it takes lr, epochs"),
        (["tiny.py:task", "--option", "depth"], "--option must be KEY=VALUE"),
        (["--data", "somewhere"], "has no parameter 'data', so --data cannot be used"),
        (["--batch-sizes", "2,0"], "batch sizes must be positive whole numbers, got 0"),
        (["--batch-sizes", "2,four"], "--batch-sizes must be numbers with commas between them, got '2,four'"),
        (["--batch-sizes", "2000"], "a batch size must not be larger than the training data, got batch size 2000 for 1024 images"),
        (["--seeds", "0"], "--seeds must be a positive number of seeds"),
        (["--seeds", "1,-1"], "seeds must be whole numbers from 0"),
        (["--lr", "0.1,-0.1"], "learning rates must be positive numbers, got -0.1"),
        (["--lr", "nan"], "learning rates must be positive numbers, got nan"),
        (["--epochs", "0"], "epochs must be positive whole numbers, got 0"),
        (["--workers", "0"], "--workers and --stale-after must be positive"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--metric", "sharpness"], "whether a higher or a lower 'sharpness' is better is not known: say --direction"),
        (["cifar10"], "the folder with CIFAR-10 is not named. Get cifar-10-binary.tar.gz"),
        (["cifar10", "--data", "nowhere"], "there is no folder nowhere. Get cifar-10-binary.tar.gz"),
        (["--storage", "study"], "storage 'study' is not a database URL"),
        (["--storage", "sqlite:///tiny.py"], "cannot be opened: file is not a database"),
        (["--storage", "sqlite:////no/such/folder/study.db"], "cannot be opened: unable to open database file"),
        (["--out", "tiny.py"], "the folder of the results cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_work(tiny, arguments, message):
    task = 0 if arguments[0].startswith("-") else 1
    assert message in tiny.run(*arguments[:task], "--norms", "none", *arguments[task:], code=2).err
    assert tiny.starts() == []


def test_another_comparison_under_the_same_name_is_refused(tiny):
    storage = f"sqlite:///{tiny.folder}/study.db"
    common = ("--norms", "none", "--batch-sizes", "2", "--seeds", "1", "--storage", storage, "--study", "mine")
    tiny.run("tiny.py:task", *common)
    other = tiny.run("tiny.py:task", "--epochs", "3", *common, code=2)
    assert "study 'mine'" in other.err
    assert "holds another comparison" in other.err
    assert "task arguments was {}, now {'epochs': 3}" in other.err
    tiny.file.write_text(tiny.file.read_text() + "\n# changed\n")
    assert "task source was" in tiny.run("tiny.py:task", *common, code=2).err
    assert len(tiny.starts()) == 1


def test_the_entry_point_refuses_with_its_exit_code(tiny):
    refused = tiny.finish(tiny.start("tiny.py:task", "--norms", "bacth"), code=2)
    assert refused.err.startswith("equinorm compare: no normalization method is called 'bacth'; did you mean 'batch'")
    assert refused.out == ""


def test_a_missing_extra_is_named(monkeypatch, capsys):
    found = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optuna" else found(name))
    assert main(["compare"]) == 2
    assert capsys.readouterr().err == 'equinorm compare: optuna not installed: pip install "equinorm[compare]"\n'


def test_demo_writes_one_report_on_both_comparisons(tiny, monkeypatch, capfd):
    assert [(plan.task, len(plan.cells())) for plan in demo.plans()] == [("digits-mlp", 72), ("digits", 18)]
    tasks = (f"tiny.py:{name}" for name in ("plain", "task"))
    small = [Plan(task=task, norms=("none", "layer"), batch_sizes=(2, 4), seeds=(0, 1)) for task in tasks]
    monkeypatch.setattr(demo, "plans", lambda: small)
    assert main(["demo", "--out", "here"]) == 0
    shown = capfd.readouterr().out
    assert "At batch size 4 the highest median accuracy is that of none, 0.750" in shown.replace("\n", " ")
    assert shown.splitlines()[-1].startswith("16 cells in ")
    assert shown.rstrip().endswith("here/report.html")
    page = Path("here/report.html").read_text()
    assert page.count("<h2>tiny.py:") == 2


@pytest.mark.parametrize("option", ["--storage {}", "--storage={}"])
def test_the_command_in_the_report_holds_no_password(option):
    url = "postgresql://me:secret@host/db"
    words = ["compare", "digits", *option.format(url).split()]
    assert repeatable(words, url) == "equinorm compare digits " + shlex.join(option.format("postgresql://me:***@host/db").split())


def _alive(pid):
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _lines(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def _wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
