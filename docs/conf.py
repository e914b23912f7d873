"""How the documentation is built: Sphinx with furo, pages in MyST Markdown, the reference from docstrings."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

import equinorm

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "equinorm"
author = "The equinorm developers"
copyright = f"{date.today().year}, {author}"  # noqa: A001 - Sphinx's name
version = release = equinorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "catalogue_pages",
    "performance_tables",
    "probe_tables",
    "executed",
]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_title = "equinorm"
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _literal_stars(app, what, name, obj, options, lines):
    # Shapes are written (N, C, *S) in docstrings, as in code; to reStructuredText that star would begin an emphasis.
    star = re.compile(r"``.*?``|(?:(?<=, )|(?<=\())\*(?=\w)")
    lines[:] = [star.sub(lambda found: found[0] if found[0].startswith("`") else r"\*", line) for line in lines]


def _inline_math(translator, node):
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _display_math(translator, node):
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", _literal_stars, priority=100)
    # Formulas become MathML when the pages are built: browsers show it as it is, with no script fetched from elsewhere.
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
