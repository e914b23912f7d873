"""The package is there when asked for, and not before."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, equinorm
assert not any(name.startswith("equinorm.surgery") for name in sys.modules)
equinorm.surgery.swap, equinorm.surgery.Plan
loaded = {name.partition(".")[0] for name in sys.modules} & {"rich", "numpy.testing", "matplotlib", "sklearn", "transformers"}
assert not loaded, loaded
"""


def test_loaded_at_first_use_and_light():
    subprocess.run([sys.executable, "-c", CODE], check=True)
