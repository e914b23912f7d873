"""Every fenced Python example in the Markdown pages is a test: README.md with the tests, docs/ with the documentation."""

from __future__ import annotations

import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["*.md"],
    # Written by the build from docstrings, whose examples are tested where they stand; the other code there is quoted source.
    excludes=["docs/catalogue/*.md"],
    setup=lambda namespace: torch.manual_seed(0),
).pytest()

collect_ignore = ["docs/conf.py", "docs/_build", ".venv"]
