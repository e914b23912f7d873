"""The catalogue's pages, written from what each method says of itself whenever the documentation is built.

``catalogue/index.md`` compares all methods; ``catalogue/NAME.md`` is the page of one, ``catalogue/NAME.svg`` shows what it pools over.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sphinx.errors import ExtensionError

import equinorm
from equinorm import catalogue
from equinorm.catalogue_show import pooled, signature
from equinorm.facts import FAMILIES, INVARIANCES

INTRODUCTION = """# The catalogue

{count} methods, by what they act on. Everything on these pages comes from the methods themselves: their facts, which the tests check, and
their docstrings. `equinorm list` and `equinorm show` print the same in a terminal.

*Pools over* says what one statistic averages over: N samples, C channels, G the channels of a group, L a window of channels, S positions,
K a window of positions, D the last dimensions, W the weights of an output unit. *Alone*: a sample's output does not depend on the rest of
the batch.
*Gap*: training and evaluation compute different things. *Folds*: evaluation is one affine map per channel, at no cost behind a
convolution. *Sync*: statistics can be pooled across processes. *Traffic*: the least reads (R) and writes (W) of the input in a training
forward."""


FULL_LINE = 122  # characters of a docstring's formula behind which an author breaks the line for want of room
REQUIRED = ("Formula", "Use it when", "Not when", "Known trouble", "Args", "Source")


def write(folder: Path) -> None:
    """Write all pages into ``folder``, from scratch.

    Raises:
        ExtensionError: methods whose docstrings lack a section, all of them named.
    """
    if wrong := [complaint for method in catalogue.methods().values() if (complaint := lacking(method))]:
        raise ExtensionError("the catalogue cannot be written: " + "; ".join(wrong))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, method in catalogue.methods().items():
        (folder / f"{name}.md").write_text(page(method))
        if method.facts.pools:
            (folder / f"{name}.svg").write_text(figure(method.facts.pools))
    (folder / "index.md").write_text(index())


def lacking(method: catalogue.Method) -> str:
    """Which sections a method's docstring should have and has not, as a sentence; empty if none."""
    text = catalogue.prose(method)
    missing = [name for name in REQUIRED if not text.get(name) and not (name == "Args" and not inspect.signature(method).parameters)]
    missing = (["a first sentence"] if not text["Summary"] else []) + [f'"{name}:"' for name in missing]
    return f"the docstring of {method.__module__}.{method.__name__} lacks {', '.join(missing)}" if missing else ""


def index() -> str:
    """The comparison of all methods."""
    lines = [INTRODUCTION.format(count=len(catalogue.methods()))]
    for family, meaning in FAMILIES.items():
        members = [m for m in catalogue.methods().values() if m.facts.family == family]
        if not members:
            continue
        lines += ["", f"## {family.capitalize()}", "", f"{meaning.capitalize()}.", ""]
        lines += ["| method | what it does | pools over | properties | traffic |", "|---|---|---|---|---|"]
        for method in members:
            facts = method.facts
            does = " ".join(catalogue.prose(method)["Summary"].split())
            marks = {
                "alone": "per-sample" in facts.invariances,
                "gap": facts.train_differs,
                "folds": facts.folds,
                "sync": bool(facts.synchronizes),
            }
            properties = ", ".join(mark for mark, holds in marks.items() if holds)
            link = f"[{method.__name__}]({facts.name}.md) {facts.paper.year}"
            lines.append(f"| {link} | {markdown(does)} | {facts.pools or 'nothing'} | {properties} | {facts.reads_writes} |")
    lines += ["", "```{toctree}", ":hidden:", "", *catalogue.methods(), "```", ""]
    return "\n".join(lines)


def page(method: catalogue.Method) -> str:
    """The page of one method."""
    facts, text = method.facts, catalogue.prose(method)
    lines = [f"# {facts.title}", "", f"`equinorm.{signature(method)}`", "", markdown(text["Summary"]), ""]
    if facts.pools:
        alt = f"One statistic averages over {pooled(facts.pools)}."
        width = 250 * min(facts.pools.count("+") + 1, 3) + 90
        lines += [f"```{{figure}} {facts.name}.svg", f":alt: {alt}", f":width: {width}px", "", alt, "```", ""]
    lines += ["## Formula", "", "```text", unwrapped(text["Formula"]), "```", ""]
    if source := rule(method):
        lines += ["The rule as it runs:", "", "```python", source, "```", ""]
    lines += ["## When", ""]
    for section in ("Use it when", "Not when", "Known trouble"):
        lines += [f"**{section}** {markdown(text[section])}", ""]
    if "Differences" in text:
        lines += [f"**Differences** {markdown(text['Differences'])}", ""]
    lines += ["## Properties", "", "| | |", "|---|---|"]
    properties = {
        "family": f"{facts.family}: {FAMILIES[facts.family]}",
        "training and evaluation": "compute different things" if facts.train_differs else "compute the same",
        "batch of one": facts.batch_of_one,
        "one position": facts.one_position,
        "across processes": facts.synchronizes or "nothing to exchange",
        "inference": "one affine map per channel: folds into a neighbouring layer" if facts.folds else "does not fold",
        "claims, tested": "; ".join(INVARIANCES[name] for name in sorted(facts.invariances)) or "none",
        "least traffic": facts.reads_writes,
    }
    lines += [f"| {name} | {value} |" for name, value in properties.items()]
    lines += ["", "## Parameters", ""]
    lines += [f"- {markdown(entry)}" for entry in entries(text.get("Args", "none"))]
    for section in ("Shape", "Returns", "Raises"):
        if section in text:
            lines += ["", f"**{section}**", "", *(f"- {markdown(entry)}" for entry in entries(text[section]))]
    if "Example" in text:
        lines += ["", "## Example", "", "```pycon", text["Example"], "```"]
    lines += ["", "## Source", "", f"{facts.paper}.", "", markdown(text["Source"]), ""]
    return "\n".join(lines)


def rule(method: catalogue.Method) -> str:
    """The source that computes the method: the rule beside the class in its file, or where there is none of the mechanism's, its forward.

    Of functions that register a parametrization it is what they register. Left out are checks of arguments and what users import.
    """
    module = sys.modules[method.__module__]
    exported = set(map(id, vars(equinorm).values()))
    parts = [
        m
        for m in vars(module).values()
        if inspect.isfunction(m) and m.__module__ == module.__name__ and id(m) not in exported and not m.__name__.startswith(("_", "check"))
    ]
    complete = any("Affine" in str(m.__annotations__.get("return")) or module.__name__.endswith(f".{m.__name__}") for m in parts)
    if not complete:  # parts of a method, without what puts them together
        parts += forward_of(method) if inspect.isclass(method) else registered(module) or [method]
    return "\n\n\n".join(map(code, parts))


def forward_of(method: type) -> list[Callable[..., object]]:
    """What a class's forward runs: where it is inherited, with what the class fills in."""
    owner = next(c for c in method.__mro__ if "forward" in vars(c))
    if owner is method:
        return [vars(method)["forward"]]
    usual = ("for_channels", "reset_parameters", "extra_repr")
    filled = [m for name, m in vars(method).items() if inspect.isfunction(m) and not name.startswith("_") and name not in usual]
    return [*filled, vars(owner)["forward"]]


def registered(module: ModuleType) -> list[Callable[..., object]]:
    """The forward of the parametrizations in a file."""
    return [vars(c)["forward"] for c in vars(module).values() if inspect.isclass(c) and {"forward", "right_inverse"} <= vars(c).keys()]


def code(function: Callable[..., object]) -> str:
    """The source of a function without its decorators and its docstring."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    assert isinstance(node, ast.FunctionDef)
    documented = ast.get_docstring(node) is not None
    head = lines[node.lineno - 1 : (node.body[0].lineno - 1)]
    body = lines[node.body[0].end_lineno :] if documented else lines[node.body[0].lineno - 1 :]
    while body and not body[0].strip():
        body.pop(0)
    return "\n".join([*head, *body]).rstrip()


def unwrapped(text: str) -> str:
    """A formula with its paragraphs on one line each: a line goes on where the next word would not have fitted into the source."""
    lines: list[str] = []
    length = 0  # of the last line in the source
    for line in text.splitlines():
        if lines and line[:1].strip() and length + len(line.split()[0]) >= FULL_LINE:
            lines[-1] += f" {line}"
        else:
            lines.append(line)
        length = len(line)
    return "\n".join(lines).replace("``", "`")


def entries(text: str) -> list[str]:
    """The entries of a docstring section, each with its continuation lines: those set in, and those of an unfinished sentence."""
    found: list[str] = []
    for line in filter(str.strip, text.splitlines()):
        if found and (line.startswith(" ") or not (found[-1].endswith(".") or re.match(r"[\w*, ]+: ", line))):
            found[-1] += " " + line.strip()
        else:
            found.append(line.strip())
    return found


def markdown(text: str) -> str:
    """A docstring's paragraph as Markdown: roles become code, and stars that stand for dimensions stay stars."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].rsplit('.', 1)[-1]}`", text)
    parts = re.split(r"(``.*?``|`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_|<])", r"\\\1", part) for part in parts)


# The figure: a block of samples (into the page) x channels (to the right) x positions (downwards); what shares one statistic is filled.

CELL, DEPTH, RISE = 34, 20, 13  # sizes of a cell: along channels and positions; its shift to the right and upwards per sample
CHANNELS, SAMPLES, POSITIONS, GROUP, WINDOW = 6, 4, 4, 3, 2
STYLE = """<style>
.f{fill:#2f6fde;stroke:#fff;stroke-width:1}.t{fill:#5b8fe8;stroke:#fff;stroke-width:1}.r{fill:#2458b5;stroke:#fff;stroke-width:1}
.e{fill:#8a94a6;fill-opacity:.16;stroke:#8a94a6;stroke-opacity:.55;stroke-width:.8}
text{font:13px system-ui,sans-serif;fill:#7a8496}
</style>"""


Drawing = tuple[float, float, list[str]]  # width, height, SVG elements


def figure(pools: str) -> str:
    """The figure of what each statistic averages over, side by side, as SVG for light and dark pages."""
    drawings = [table(letters) if set(letters) & set("DW") else block(letters) for letters in pools.split("+")]
    parts, left = [], 0.0
    for width, _, elements in drawings:
        parts += [f'<g transform="translate({left:.0f} 0)">', *elements, "</g>"]
        left += width
    height = max(height for _, height, _ in drawings)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left:.0f} {height:.0f}">{STYLE}{"".join(parts)}</svg>\n'


def block(pools: str) -> Drawing:
    """A block (N, C, S)."""

    def inside(n: int, c: int, s: int) -> bool:
        in_channels = 1 <= c <= GROUP if "L" in pools else c == 0 or "C" in pools or ("G" in pools and c < GROUP)
        in_positions = s == 0 or "S" in pools or ("K" in pools and s < WINDOW)
        return (n == 0 or "N" in pools) and in_channels and in_positions

    left, top = 44, 30 + SAMPLES * RISE

    def at(n: float, c: float, s: float) -> str:
        return f"{left + c * CELL + n * DEPTH:.0f},{top + s * CELL - n * RISE:.0f}"

    def face(kind: str, filled: bool, corners: list[tuple[float, float, float]]) -> str:
        return f'<polygon class="{kind if filled else "e"}" points="{" ".join(at(*corner) for corner in corners)}"/>'

    front = [
        face("f", inside(0, c, s), [(0, c, s), (0, c + 1, s), (0, c + 1, s + 1), (0, c, s + 1)])
        for c in range(CHANNELS)
        for s in range(POSITIONS)
    ]
    lid = [
        face("t", inside(n, c, 0), [(n, c, 0), (n, c + 1, 0), (n + 1, c + 1, 0), (n + 1, c, 0)])
        for c in range(CHANNELS)
        for n in range(SAMPLES)
    ]
    last = CHANNELS
    side = [
        face("r", inside(n, last - 1, s), [(n, last, s), (n + 1, last, s), (n + 1, last, s + 1), (n, last, s + 1)])
        for n in range(SAMPLES)
        for s in range(POSITIONS)
    ]
    bottom, middle = top + POSITIONS * CELL, top + POSITIONS * CELL // 2
    labels = [
        f'<text x="{left + CHANNELS * CELL / 2:.0f}" y="{bottom + 20}" text-anchor="middle">channels</text>',
        f'<text x="{left - 12}" y="{middle}" text-anchor="middle" transform="rotate(-90 {left - 12} {middle})">positions</text>',
        f'<text x="{left + DEPTH * SAMPLES / 2 - 8:.0f}" y="{top - RISE * SAMPLES / 2 - 8:.0f}" text-anchor="end">samples</text>',
    ]
    width, height = left + CHANNELS * CELL + SAMPLES * DEPTH + 12, bottom + 30
    return width, height, [*front, *lid, *side, *labels]


def table(pools: str) -> Drawing:
    """Rows of features, or of the weights of output units."""
    left, top = 44, 16
    cells = [
        f'<rect class="{"f" if row == 0 else "e"}" x="{left + column * CELL}" y="{top + row * CELL}" width="{CELL}" height="{CELL}"/>'
        for row in range(4)
        for column in range(8)
    ]
    across, down = ("weights of a unit", "output units") if "W" in pools else ("features", "tokens")
    middle = top + 2 * CELL
    labels = [
        f'<text x="{left + 4 * CELL}" y="{top + 4 * CELL + 20}" text-anchor="middle">{across}</text>',
        f'<text x="{left - 12}" y="{middle}" text-anchor="middle" transform="rotate(-90 {left - 12} {middle})">{down}</text>',
    ]
    return left + 8 * CELL + 12, top + 4 * CELL + 30, [*cells, *labels]


def setup(app) -> dict[str, bool]:
    """Write the pages before Sphinx looks for its sources."""
    app.connect("config-inited", lambda app, _: write(Path(app.srcdir) / "catalogue"))
    return {"parallel_read_safe": True}
