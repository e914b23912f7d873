"""What a comparison reports while it runs, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from equinorm.compare.cells import Cell, grid
from equinorm.compare.outcomes import Failed, Measured
from equinorm.compare.progress import Bar, Lines, TimeLeft, progress_on

CELLS = grid(["none", "batch"], [2, 4], [0, 1], [])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def measured(seconds):
    return Measured({"accuracy": [1.0]}, seconds, seconds, None)


def run(stream):
    with progress_on(stream, workers=1) as progress:
        progress.begin(CELLS, CELLS[1:])
        left = CELLS[1:]
        for cell in CELLS[1:]:
            failed = cell.norm == "batch" and cell.seed == 1
            progress.finished(cell, Failed("diverged", "loss is nan after epoch 1") if failed else measured(10.0))
            left = left[1:]
            progress.update(left, elsewhere=3)
    return stream.getvalue()


def test_time_left_is_that_of_cells_of_the_same_batch_size_shared_by_the_workers():
    time_left = TimeLeft(workers=2)
    assert time_left.seconds(CELLS) is None
    time_left.add(Cell("none", 2, 0), 30.0)
    time_left.add(Cell("batch", 2, 0), 50.0)
    assert time_left.seconds([Cell("layer", 2, 0)]) == pytest.approx(20, abs=0.5)
    assert time_left.seconds([Cell("layer", 8, 0)]) == pytest.approx(5, abs=0.5)  # a quarter of the steps
    time_left.add(Cell("batch", 8, 0), 4.0)
    assert time_left.seconds([Cell("layer", 8, 0), Cell("layer", 2, 0)]) == pytest.approx(22, abs=0.5)
    assert time_left.seconds([]) == 0


def test_lines_elsewhere_a_bar_on_a_terminal():
    assert isinstance(progress_on(io.StringIO(), 1), Lines)
    assert isinstance(progress_on(Terminal(), 1), Bar)


def test_lines_are_few_and_name_a_failing_norm_once():
    lines = run(io.StringIO()).splitlines()
    assert lines[0] == "8 cells: 1 finished before, 7 to measure"
    assert [line for line in lines if "diverged" in line] == ["batch batch_size=2 seed=1: diverged: loss is nan after epoch 1"]
    quarters = [line for line in lines if "cells measured" in line]
    assert [line.partition(" ")[0] for line in quarters] == ["2", "4", "6"]
    assert quarters[0].endswith("of 7 cells measured, about 50 s left")


def test_bar_shows_cells_time_left_and_what_others_do():
    shown = run(Terminal())
    assert "8/8" in shown
    assert shown.count("diverged: loss is nan") == 1
    bar = Bar(1, Terminal())
    assert bar.note() == ""
    bar.begin(CELLS, CELLS[1:])
    assert bar.note() == ""  # nothing measured to estimate from
    bar.finished(CELLS[1], measured(10.0))
    bar.update(CELLS[2:4], elsewhere=1)
    assert bar.note() == "about 10 s left, 1 elsewhere"  # two cells of twice the batch size
    bar.update([], elsewhere=0)
    assert bar.note() == ""
