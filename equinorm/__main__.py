"""``python -m equinorm``: the command ``equinorm``."""

from __future__ import annotations

import sys

from equinorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
