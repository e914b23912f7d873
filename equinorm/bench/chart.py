"""The numbers as a figure: shares of a copy's bandwidth, and ratios to the fastest peer, a line per norm."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from equinorm.bench.goals import SideBySide

LIGHT = {"ink": "#1f2933", "grid": "#cbd2d9", "forward": "#2f6fde", "both": "#d9480f", "eval": "#2b8a3e"}
DARK = {"ink": "#e4e7eb", "grid": "#52606d", "forward": "#74a7ff", "both": "#ff922b", "eval": "#69db7c"}
# What an SVG is drawn with; its own style sheet then says what each stands for, on light and on dark pages.
PLACEHOLDERS = {role: f"#0000{k:02x}" for k, role in enumerate(LIGHT, 1)}
NAMES = {"forward": "training forward", "both": "forward and backward", "eval": "evaluation"}
MARKS = {"forward": "o", "both": "s", "eval": "^"}


def draw(compared: Sequence[SideBySide], circumstances: Mapping[str, Any], path: Path) -> None:
    """Draw what is not small, with pages reused where there are such entries: a mark for each entry.

    Args:
        compared: the numbers.
        circumstances: of the measurement; named below the figure.
        path: ends in .svg (serves light and dark pages) or .png (light).
    """
    big = [one for one in compared if not one.entry.small]
    pages = "reused" if any(one.entry.pages == "reused" for one in big) else "default"
    big = [one for one in big if one.entry.pages == pages]
    norms = list(dict.fromkeys(one.entry.norm for one in big))
    colours = PLACEHOLDERS if path.suffix == ".svg" else LIGHT
    ink = colours["ink"]
    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "equinorm"}):
        figure = Figure(figsize=(10.5, 1.6 + 0.3 * len(norms)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _dots(left, big, norms, lambda one: one.ours.of_copy, colours)
        _dots(right, big, norms, lambda one: one.ratio(), colours)
        for axes, title in ((left, "share of the bandwidth of a copy"), (right, "time of the fastest peer / ours")):
            axes.axvline(1.0, color=ink, linewidth=1)
            axes.set_title(title, color=ink, fontsize=10, loc="left")
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        left.set_xlim(left=0)
        right.set_xscale("log")
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right.xaxis.set_minor_locator(NullLocator())
        lowest, highest = right.get_xlim()
        right.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if lowest <= tick <= highest])
        left.set_yticks(range(len(norms)), norms)
        left.set_ylim(len(norms) - 0.4, -0.6)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, labelcolor=ink)
        measured = f"{circumstances['processor']}, {circumstances['threads']} threads, {circumstances['date']}, pages {pages}"
        figure.supxlabel(f"a mark is an entry: shape, type, layout. {measured}", fontsize=8, color=ink)
        _save(figure, path)


def _dots(
    axes: Axes,
    compared: Sequence[SideBySide],
    norms: Sequence[str],
    number: Callable[[SideBySide], float | None],
    colours: Mapping[str, str],
) -> None:
    for k, (of, mark) in enumerate(MARKS.items()):
        points = [(value, norms.index(one.entry.norm)) for one in compared if one.entry.of == of and (value := number(one)) is not None]
        if points:
            values, lines = zip(*points, strict=True)
            apart = [line + (k - 1) * 0.22 for line in lines]
            axes.scatter(values, apart, s=14, color=colours[of], marker=mark, label=NAMES[of], linewidths=0, alpha=0.85)
    axes.grid(axis="both", color=colours["grid"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["ink"], which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    if path.suffix != ".svg":
        figure.savefig(path, dpi=160)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    for role, placeholder in PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{role})")
    light, dark = (";".join(f"--{role}:{colour}" for role, colour in colours.items()) for colours in (LIGHT, DARK))
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}text{{font-family:system-ui,sans-serif}}</style>"
    start = text.index(">", text.index("<svg")) + 1
    path.write_text(text[:start] + style + text[start:])
