"""Code that runs while the page is built: ``{run}`` shows it and what it printed, ``{drawing}`` turns it into a figure.

The blocks of a page run in order in one namespace, with torch seeded at the first. A drawing's code is not shown. It finds ``axes``, which
it draws on with the colours of :mod:`equinorm.page.svg`, and becomes an SVG that the page's style sheet colours, light or dark. Its
argument is the description for those who do not see it.
"""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar

import torch
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from equinorm.page import svg

SIZE = (9.6, 4.2)  # inches of 72 units; a unit is about a pixel on the page
EXAMPLES = Path(__file__).parents[2] / "examples"


class Executed(SphinxDirective):
    """What both kinds of block share: the namespace of the page, and an error that names the line."""

    has_content = True

    def execute(self, **given: Any) -> str:
        """Run the block and return what it printed."""
        pages = self.env.temp_data  # emptied by Sphinx after each page
        if "executed" not in pages:
            torch.manual_seed(0)
            pages["executed"] = {"__name__": self.env.docname}
        source, line = self.get_source_info()
        code = compile("\n" * line + "\n".join(self.content), source, "exec")  # the first line of code is the one behind the fence
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, pages["executed"] | given if given else pages["executed"])
        except Exception as error:
            raise ExtensionError(f"{source}: a block of code failed\n{traceback.format_exc()}") from error
        return printed.getvalue()


class Run(Executed):
    """Show code, run it, and show what it printed."""

    def run(self) -> list[nodes.Node]:
        output = self.execute().rstrip()
        code = "\n".join(self.content)
        shown: list[nodes.Node] = [nodes.literal_block(code, code, language="python")]
        if output:
            shown.append(nodes.literal_block(output, output, language="text", classes=["printed"]))
        return shown


class Drawing(Executed):
    """A figure, drawn by code that is not shown."""

    required_arguments = 1
    final_argument_whitespace = True
    names: ClassVar[list[str]] = ["INK", "MUTED", "series"]

    def run(self) -> list[nodes.Node]:
        name = f"{self.env.docname.rsplit('/', 1)[-1]}-{self.env.new_serialno('drawing')}"
        with svg.drawing(name, SIZE) as (figure, axes):
            self.execute(axes=axes, **{name: getattr(svg, name) for name in self.names})
            image = svg.markup(figure, name, self.arguments[0])
        return [nodes.raw("", f'<figure class="drawing">{image}</figure>', format="html")]


def setup(app) -> dict[str, bool]:
    """Register the directives, and let pages import the examples."""
    sys.path.insert(0, str(EXAMPLES))
    app.add_directive("run", Run)
    app.add_directive("drawing", Drawing)
    return {"parallel_read_safe": True}
