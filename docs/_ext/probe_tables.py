"""The tables of probe.md, from the tables that the diagnosis itself uses, whenever the documentation is built."""

from __future__ import annotations

import shutil
from pathlib import Path

from equinorm.probe import KINDS, SUGGESTIONS, THRESHOLDS


def write(folder: Path) -> None:
    """Write what probe.md includes into ``folder``, from scratch."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kinds = [
        f"**{kind.title}** (`{name}`)\n: {kind.meaning} *What usually helps:* {SUGGESTIONS[kind.suggestion]}.\n"
        for name, kind in KINDS.items()
    ]
    (folder / "kinds.inc").write_text("\n".join(kinds))
    rows = [f"| `{name}` | {t.value:g} | {cell(t.meaning)} | {cell(t.reason)} |" for name, t in THRESHOLDS.items()]
    (folder / "thresholds.inc").write_text(
        "\n".join(["| name | value | what is compared | why this number |", "|---|---|---|---|", *rows, ""])
    )


def cell(text: str) -> str:
    """Text that can stand in a cell: a bar would end it."""
    return text.replace("|", "\\|")


def setup(app):
    app.connect("config-inited", lambda app, _: write(Path(app.srcdir) / "probe-tables"))
    return {"parallel_read_safe": True}
