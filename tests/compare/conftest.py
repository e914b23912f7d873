"""Running ``equinorm compare`` on tiny tasks, through its real entry point."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from equinorm.cli import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def tiny(tmp_path, monkeypatch, capfd):
    """A folder with the file ``tiny.py``, which is the current one, and ways to run commands in it.

    ``run`` calls the command in this process, ``start`` and ``finish`` start a process of its own and wait for its end.
    """
    shutil.copy(Path(__file__).with_name("tiny.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    on_terminate = signal.getsignal(signal.SIGTERM)

    def start(*arguments):
        command = [sys.executable, "-m", "equinorm", "compare", *map(str, arguments)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def finish(process, code=0):
        out, err = process.communicate(timeout=120)
        return _result(process.args, process.returncode, out, err, code)

    def run(*arguments, code=0):
        capfd.readouterr()
        words = ["compare", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["equinorm", *words])
        returned = main(words)
        captured = capfd.readouterr()
        return _result(words, returned, captured.out, captured.err, code)

    def starts():
        file = tmp_path / "starts.txt"
        return [line.rsplit(" ", 1)[0] for line in file.read_text().splitlines()] if file.exists() else []

    yield SimpleNamespace(folder=tmp_path, file=tmp_path / "tiny.py", start=start, finish=finish, run=run, starts=starts)
    signal.signal(signal.SIGTERM, on_terminate)


def _result(words, returned, out, err, code):
    assert returned == code, f"exit code {returned}, expected {code}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return SimpleNamespace(out=out, err=err, json=json.loads(out) if "--json" in words and code < 2 else None)
