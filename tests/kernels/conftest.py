"""What tests/kernels/test_triton.py runs in processes of its own is not collected here."""

from __future__ import annotations

import os

collect_ignore = ["compiled.py"] if os.environ.get("TRITON_INTERPRET") else ["compiled.py", "interpreted"]
