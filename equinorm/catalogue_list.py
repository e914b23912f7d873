"""``equinorm list``: the catalogue by family, filtered."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict
from typing import Any

from equinorm.catalogue import find, prose, resolve
from equinorm.facts import FAMILIES, INVARIANCES, Facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("text", nargs="?", default="", help="occurs in the name, the title, the class or the paper")
    parser.add_argument("--family", choices=FAMILIES, help="only this family")
    parser.add_argument("--invariance", action="append", default=[], choices=INVARIANCES, help="only methods that claim it (repeatable)")
    for flag, meaning in (
        ("train-differs", "training and evaluation compute different things"),
        ("folds", "evaluation is one affine map per channel"),
        ("synchronizes", "statistics can be pooled across processes"),
    ):
        parser.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, default=None, help=meaning)
    parser.add_argument("--json", action="store_true", help="facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the methods that match. Exit code 1 when none does."""
    wanted = {name: value for name in ("train_differs", "folds", "synchronizes") if (value := getattr(arguments, name)) is not None}
    found = find(arguments.text, family=arguments.family, invariances=arguments.invariance, **wanted)
    if arguments.json:
        print(json.dumps([as_json(facts) for facts in found], indent=2))
    elif not found:
        print("no method matches")
    else:
        print(table(found))
    return 0 if found else 1


def table(found: list[Facts]) -> str:
    """Name, year and what it does of each method, under the heading of its family."""
    width = max(len(facts.name) for facts in found)
    lines = []
    for family, meaning in FAMILIES.items():
        members = [facts for facts in found if facts.family == family]
        if not members:
            continue
        lines += ["", f"{family}: {meaning}"]
        for facts in members:
            does = " ".join(prose(resolve(facts.name))["Summary"].split())
            line = f"  {facts.name:<{width}}  {facts.paper.year}  {does}"
            lines.append(textwrap.fill(line, columns(), subsequent_indent=" " * (width + 10), break_long_words=False))
    lines += ["", f"{len(found)} method{'s' * (len(found) != 1)}; `equinorm show NAME` tells more of one"]
    return "\n".join(lines[1:])


def columns() -> int:
    """How many characters a line of text may have: the terminal's, but no more than reads well."""
    return min(shutil.get_terminal_size().columns, 120)


def as_json(facts: Facts) -> dict[str, Any]:
    """The facts as JSON holds them: sets become sorted lists."""
    return asdict(facts) | {"invariances": sorted(facts.invariances)}
