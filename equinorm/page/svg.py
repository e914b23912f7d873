"""Figures for a page: SVG drawn by matplotlib, coloured by the page's style sheet.

Matplotlib draws with placeholder colours, each of which is then replaced by a variable of the style sheet, so that one drawing serves light
and dark. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#000001", "#000002", "#000003", "#000004"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}


def series(number: int) -> str:
    """The placeholder of the style sheet's colour ``--series-number``, 0 to 7; 0 is grey."""
    return f"#0001{number:02x}"


@contextmanager
def drawing(name: str, size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes in the page's style; ``size`` in inches of 72 units, a unit being about a pixel on the page."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # identifiers differ between the figures of a page, and not between two runs
        "font.size": 12,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 1,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "figure.facecolor": "none",
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        yield figure, figure.add_subplot()


def markup(figure: Figure, name: str, description: str) -> Markup:
    """A figure as an SVG element for HTML; ``name`` keeps its identifiers apart from those of other figures on the page."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue and document type; they, and namespaces, have no place inside HTML
    svg = re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # matplotlib's own names, the same in every figure of the page
    svg = re.sub(r"font(-family)?: ?[^;\"]*sans-serif[^;\"]*", _font, svg)
    for placeholder in set(re.findall(r"#0000\d\d|#0001\d\d", svg)):
        variable = VARIABLES.get(placeholder) or f"--series-{int(placeholder[-2:], 16)}"
        svg = svg.replace(placeholder, f"var({variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(description)}"', 1))


def _font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match[0])
    return f"font-size: {size[0]}" if size else "font-family: inherit"
