"""The page about performance: its tables come from the files of results, all of them, and say what the files say."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from equinorm.bench.grid import Entry
from equinorm.bench.measure import Timing
from equinorm.bench.results import Results, read
from equinorm.catalogue import methods

ROOT = Path(__file__).parents[1]
sphinx_errors = pytest.importorskip("sphinx.errors")
_spec = importlib.util.spec_from_file_location("performance_tables", ROOT / "docs" / "_ext" / "performance_tables.py")
assert _spec is not None
assert _spec.loader is not None
performance_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(performance_tables)

BIG, ROWS, SMALL = (64, 256, 32, 32), (32768, 768), (64, 128)


def timings(pages, norm, shape, of, ours, **peers):
    entry = Entry(pages, norm, shape, "float32", "contiguous", of)
    return [Timing(entry, who, seconds, 0.01, 5) for who, seconds in {"ours": ours, "copy": 0.01, **peers}.items()]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    kept = Results(folder / "cpu.csv")
    for pages, factor in (("default", 4.0), ("reused", 1.0)):
        kept.add(timings(pages, "batch", BIG, "forward", 0.016 * factor, torch=0.048 * factor))
    kept.add(timings("reused", "rms", SMALL, "both", 0.0001, torch=0.00005))
    kept.add(timings("reused", "switch", BIG, "both", 0.04, composed=0.1))
    (folder / "exactness.csv").write_text("input,norm,type,torch,ours\nplain,batch,float32,2e-07 / 3e-07,1e-07 / 1e-07\n")
    return folder


@pytest.fixture
def written(results, tmp_path):
    performance_tables.write(tmp_path / "measured", results)
    return {path.stem: path.read_text() for path in (tmp_path / "measured").glob("*.inc")}


def test_everything_that_the_page_includes_is_written(written):
    page = (ROOT / "docs" / "performance.md").read_text()
    assert set(re.findall(r"\{include\} measured/(\w+)\.inc", page)) == set(written)


def test_the_page_holds_no_time_of_its_own():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert not re.findall(r"\d ?(?:ms|GB/s|MB|µs)\b|\|", page)


def test_cells_say_what_the_file_says(written):
    assert "| batch | 64 × 256 × 32 × 32 | float32 | contiguous | 16 ms, 62%, torch × 3.00 |  |  |" in written["layers"]
    assert "| switch | 64 × 256 × 32 × 32 | float32 | contiguous |  | 40 ms, 62%, composed × 2.50 |  |" in written["methods"]
    assert "| rms | 64 × 128 | float32 | contiguous |  | 0.1 ms, 25000%, torch × 0.50 |  |" in written["small"]
    assert "| training forward | 1 | 4.0 | 4.0 |" in written["pages"]
    assert "| switch | composed / ours | 1 | 2.50 of 5 | switch 64x256x32x32 float32 contiguous both, pages reused |" in written["below"]
    assert "| plain | batch | 2e-07 / 3e-07 | 1e-07 / 1e-07 |" in written["exactness"]


def test_every_counted_method_is_in_the_table_of_counts(written):
    from equinorm.kernels.traffic import UNCOUNTED

    named = set(re.findall(r"\w+", written["counts"]))
    assert {name for name, method in methods().items() if method.facts.family != "weight" and name not in UNCOUNTED} <= named


def test_the_figure_is_there(results, tmp_path):
    performance_tables.write(tmp_path / "measured", results)
    assert "<svg" in (tmp_path / "measured" / "performance.svg").read_text()


@pytest.mark.parametrize("name", ["cpu.csv", "exactness.csv"])
def test_a_missing_file_stops_the_build(results, tmp_path, name):
    (results / name).unlink()
    with pytest.raises(sphinx_errors.ExtensionError, match=rf"the tables of performance.md cannot be written: .*{name}"):
        performance_tables.write(tmp_path / "measured", results)


def test_the_files_in_the_repository_are_complete(tmp_path):
    folder = ROOT / "benchmarks" / "results"
    circumstances, found = read(folder / "cpu.csv")
    assert circumstances["commit"], "measure in a checkout"
    assert {timing.entry.norm for timing in found} >= {"batch", "instance", "group", "layer", "rms"}
    shutil.copytree(folder, tmp_path / "results")
    performance_tables.write(tmp_path / "measured", tmp_path / "results")
