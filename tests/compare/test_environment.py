"""``equinorm info``."""

from __future__ import annotations

import json

import torch

import equinorm
from equinorm.cli import main
from equinorm.compare.environment import OPTIONAL


def test_info_names_versions_machine_and_kernels(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["equinorm"], found["torch"]) == (equinorm.__version__, torch.__version__)
    assert found["kernels"]["state"] in ("ready", "unavailable")
    assert found["threads"] == torch.get_num_threads()
    assert found["optional"].keys() == {distribution for _, distribution, _ in OPTIONAL}


def test_info_says_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("equinorm.compare.environment._version", lambda distribution: None if distribution == "pyarrow" else "1.0")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "  pyarrow         not installed\n" in shown
    assert "  optuna          1.0\n" in shown
    assert f"torch             {torch.__version__}\n" in shown
