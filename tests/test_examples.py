"""The scripts under examples/ run, and what they show is so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("sklearn")


@pytest.mark.timeout(300)
def test_batch_norm_at_batch_size_two():
    result = subprocess.run([sys.executable, EXAMPLES / "batch_size_two.py"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    table, told = result.stdout.split("\n\n")
    row = {step.strip(): float(value.removesuffix(" %")) for line in table.splitlines() for step, value in [(line[:44], line[44:])]}
    right = row["recalibrated there, without labels"]
    assert row["trained with batches of 50"] > 95
    assert row["the same on another scanner"] < 60, "stale statistics cost most of the accuracy"
    assert right > 90, "and measuring them anew brings it back"
    assert row["normalized by batches of two"] < right - 10
    assert row["batch norm swapped for group norm"] > row["normalized by batches of two"] + 10
    assert row["the recalibrated model, folded"] == right
    assert row["batch norm trained on by twos, rate 0.001"] < right - 2
    assert row["group norm trained on by twos, rate 0.001"] > row["batch norm trained on by twos, rate 0.001"]

    said = dict(zip(("drift", "cured", "small", "alone"), blocks(told), strict=True))
    assert "The running statistics of '" in said["drift"]
    assert said["cured"] == said["alone"] == "nothing"
    assert said["small"].startswith("[severe] '12' takes each statistic over 2 values")


def blocks(told):
    """What stands below each of the four lines that end with a colon, without the lines about rates at the end."""
    found = []
    for line in told.split("\nAt rate")[0].splitlines():
        if line.endswith(":") and not line.startswith("["):
            found.append([])
        else:
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]
