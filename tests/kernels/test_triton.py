"""The Triton kernels without a GPU: their results under Triton's interpreter, and their machine code for a Hopper chip.

Triton reads at import whether it interprets or compiles, so each of these runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(*arguments: str, interpret: bool) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", ["channel", "row", "layers"])
def test_the_kernels_equal_the_definition(part: str) -> None:
    options = "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="
    output = run("-m", "pytest", *options, str(HERE / "interpreted" / f"{part}.py"), interpret=True)
    assert " passed" in output


@pytest.mark.slow
def test_the_kernels_compile_for_a_hopper_chip() -> None:
    compiled = json.loads(run("-m", "tests.kernels.compiled", interpret=False))
    names = {kernel["name"] for kernel in compiled}
    assert names == {
        *("_moments", "_pool", "_reduce", "_add", "_map", "_running"),
        *("_row_forward", "_row_backward", "_wide_forward", "_wide_sums", "_wide_backward"),
    }
    for kernel in compiled:
        described = json.dumps(kernel)
        # What does not fit into registers goes to the first-level cache: a few values per thread are tolerable, a tile's worth is not.
        assert kernel["stack bytes"] <= 96, described
        assert kernel["shared bytes"] <= 227 * 1024, described
        if kernel["streams"]:
            assert kernel["widest load"] == 16, described
            assert kernel["widest store"] >= (16 if kernel["writes"] else 0), described


def test_plans_cover_every_position_once() -> None:
    from equinorm.kernels.triton_channel import plan

    for itemsize in (2, 4, 8):
        for each in (16, 32):
            for s in (1, 2, 31, 32, 33, 49, 1024, 8192, 8193, 50176, 1_000_003):
                cut = plan(3, s, itemsize, columns=False, each=each)
                assert cut.chunk <= cut.b
                assert (cut.parts - 1) * cut.chunk < s <= cut.parts * cut.chunk
                for c in (1, 3, 16, 24, 63, 64, 100, 257, 4096):
                    cut = plan(c, s, itemsize, columns=True, each=each)
                    height = -(-s // cut.fold)
                    assert (cut.parts - 1) * cut.a < height <= cut.parts * cut.a
                    assert cut.blocks * cut.b >= c * cut.fold
                    assert cut.a * cut.b <= 32768 // itemsize
                    assert 4 <= cut.warps <= 16
