"""The tables and the figure of performance.md, from the files in benchmarks/results/, whenever the documentation is built."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from sphinx.errors import ExtensionError

import equinorm
from equinorm.bench.chart import draw
from equinorm.bench.goals import SideBySide, goals, side_by_side
from equinorm.bench.grid import written
from equinorm.bench.results import busy, read
from equinorm.compare.errors import InputError
from equinorm.kernels.traffic import least, streamed

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PASSES = {"forward": "training forward", "both": "forward and backward", "eval": "evaluation"}
LAYOUTS = {"contiguous": "contiguous", "channels_last": "channels last"}


def write(folder: Path, results: Path = RESULTS) -> None:
    """Write what performance.md includes into ``folder``, from scratch.

    Raises:
        ExtensionError: a file of results is missing or none of ours.
    """
    try:
        circumstances, timings = read(results / "cpu.csv")
        with (results / "exactness.csv").open(newline="") as file:
            head, *errors = csv.reader(file)
    except (InputError, OSError, ValueError) as error:
        raise ExtensionError(f"the tables of performance.md cannot be written: {error}") from None
    compared = side_by_side(timings)
    pages = "reused" if any(one.entry.pages == "reused" for one in compared) else "default"
    big = [one for one in compared if one.entry.pages == pages and not one.entry.small]
    small = [one for one in compared if one.entry.pages == pages and one.entry.small]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = {
        "circumstances": [sentence(circumstances, pages)],
        "counts": counts(),
        "layers": entries([one for one in big if one.entry.contender.torch]),
        "methods": entries([one for one in big if not one.entry.contender.torch]),
        "small": entries([one for one in small if one.entry.contender.torch]),
        "pages": reuse(compared),
        "below": below(timings, circumstances["last level cache"]),
        "exactness": table(["input", "norm", *head[3:]], [[row[0], row[1], *row[3:]] for row in errors]),
    }
    for name, lines in parts.items():
        (folder / f"{name}.inc").write_text("\n".join(lines) + "\n")
    draw(compared, circumstances, folder / "performance.svg")


def sentence(found: dict[str, object], pages: str) -> str:
    """What was measured with what."""
    threads = f"{found['threads']} thread" + "s" * (found["threads"] != 1)
    text = (
        f"Measured on {found['date']} at commit {found['commit'] or 'unknown'} with torch {found['torch']} and Python {found['python']} on "
        f"{found['processor']} ({found['cpu capability']}), {threads}, a last-level cache of {int(found['last level cache']) >> 20} MiB; "
        f"pages {pages} unless said otherwise."
    )
    return text + (f" Other processes were at work (load {found['load']}): read ratios." if busy(found) else "")


def counts() -> list[str]:
    """The least traffic by kind of statistic, with the methods that have it."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for facts in equinorm.find():
        try:
            key = tuple(f"{least(facts, of)} ({streamed(facts, of)})" for of in ("forward", "eval", "backward"))
        except ValueError:
            continue
        groups.setdefault(key, []).append(facts.name)
    rows = [[", ".join(names), *key] for key, names in sorted(groups.items(), key=lambda group: -len(group[1]))]
    return table(["methods", "training forward", "evaluation", "backward"], rows)


def entries(compared: Sequence[SideBySide]) -> list[str]:
    """A line per input: of each pass the time, the share of a copy's bandwidth, and the fastest peer's time in units of ours."""
    inputs: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for one in compared:
        entry = one.entry
        key = (entry.norm, written(entry.shape).replace("x", " × "), entry.dtype, LAYOUTS[entry.layout])
        assert one.ours.seconds is not None
        cell = f"{one.ours.seconds * 1e3:.3g} ms, {one.ours.of_copy:.0%}"
        if one.best is not None:
            cell += f", {one.best} × {one.ratio():.2f}"
        inputs.setdefault(key, {})[entry.of] = cell
    rows = [[*key, *(cells.get(of, "") for of in PASSES)] for key, cells in inputs.items()]
    return table(["norm", "input", "type", "layout", *PASSES.values()], rows)


def reuse(compared: Sequence[SideBySide]) -> list[str]:
    """The median over inputs, not small, of the time with new pages in units of that with reused pages: ours, and torch's layers."""
    by_entry = {one.entry: one for one in compared}
    rows = []
    for of, name in PASSES.items():
        pairs = [
            (one, by_entry[other])
            for one in compared
            if one.entry.pages == "default" and one.entry.of == of and not one.entry.small
            if (other := one.entry._replace(pages="reused")) in by_entry
        ]
        if not pairs:
            continue
        ours = [one.ours.seconds / other.ours.seconds for one, other in pairs if one.ours.seconds and other.ours.seconds]
        torch = [one.peers["torch"] / other.peers["torch"] for one, other in pairs if "torch" in one.peers and "torch" in other.peers]
        rows.append([name, str(len(pairs)), f"{median(ours):.1f}", f"{median(torch):.1f}" if torch else ""])
    if not rows:
        return ["The file of results holds no entries with both."]
    return table(["pass", "inputs", "ours, new / reused", "torch, new / reused"], rows)


def below(timings: Iterable, last_level_cache: int) -> list[str]:
    """Goals that are not reached, by norm and kind of goal: how many, and the furthest of each."""
    found = goals(timings, last_level_cache)
    missed: dict[tuple[str, str], list] = {}
    for goal in found:
        if not goal.reached:
            norm = "all together" if goal.what.startswith("geometric") else goal.where.split()[0]
            missed.setdefault((norm, goal.what), []).append(goal)
    rows = []
    for (norm, what), group in sorted(missed.items(), key=lambda item: min(g.value / g.target for g in item[1])):
        worst = min(group, key=lambda g: g.value / g.target)
        rows.append([norm, what, str(len(group)), f"{worst.value:.2f} of {worst.target:.3g}", worst.where])
    reached = sum(goal.reached for goal in found)
    return [f"{reached} of {len(found)} numbers reach their goal.", "", *table(["norm", "goal", "below", "furthest", "where"], rows)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def setup(app) -> dict[str, bool]:
    """Write the tables before Sphinx looks for its sources."""
    app.connect("config-inited", lambda app, _: write(Path(app.srcdir) / "measured"))
    return {"parallel_read_safe": True}
