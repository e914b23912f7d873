"""``equinorm show NAME``: what a method computes, what it pools over, when to choose it."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap

from equinorm.catalogue import Method, prose, resolve
from equinorm.catalogue_list import as_json, columns
from equinorm.facts import FAMILIES, INVARIANCES, Facts

POOLED = {
    "N": "all samples",
    "C": "all channels",
    "G": "the channels of a group",
    "L": "a window of channels",
    "S": "all positions",
    "K": "a window of positions",
    "D": "the normalized last dimensions",
    "W": "the weights of one output unit",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("name", help="as in `equinorm list`; BatchNorm, batch_norm and batch are the same")
    parser.add_argument("--json", action="store_true", help="facts and text as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the page of one method. Exit code 2 for an unknown name."""
    try:
        method = resolve(arguments.name)
    except ValueError as error:
        parser = argparse.ArgumentParser(prog="equinorm show", add_help=False, usage="equinorm show NAME")
        parser.error(str(error))
    facts: Facts = method.facts  # type: ignore[union-attr]
    if arguments.json:
        print(json.dumps({"facts": as_json(facts), "text": prose(method), "signature": signature(method)}, indent=2))
    else:
        print(page(method))
    return 0


def page(method: Method) -> str:
    """The page of a method as text."""
    facts: Facts = method.facts  # type: ignore[union-attr]
    text = prose(method)
    lines = [facts.title, "=" * len(facts.title), "", wrapped(text["Summary"]), "", indented(text.get("Formula", "")), ""]
    if facts.pools:
        lines += [f"One statistic averages over {pooled(facts.pools)}:", "", indented(picture(facts.pools)), ""]
    properties = {
        "Family": f"{facts.family}: {FAMILIES[facts.family]}",
        "Training": "computes something else than evaluation" if facts.train_differs else "computes the same as evaluation",
        "Batch of one": facts.batch_of_one,
        "One position": facts.one_position,
        "Across processes": facts.synchronizes or "nothing to exchange",
        "Inference": "one affine map per channel, folds into a neighbouring layer" if facts.folds else "does not fold",
        "Claims, tested": "; ".join(INVARIANCES[name] for name in sorted(facts.invariances)) or "no claim",
        "Least traffic": f"{facts.reads_writes} of the input, training forward" if facts.family != "weight" else facts.reads_writes,
    }
    label = max(map(len, properties)) + 2
    lines += [wrapped(f"{name:<{label}}{value}", hanging=label) for name, value in properties.items()]
    for section in ("Use it when", "Not when", "Known trouble", "Differences"):
        if section in text:
            said = text[section]
            lines += ["", wrapped(f"{section} {said}" if said.startswith("from ") else f"{section}: {said}")]
    lines += ["", wrapped(f"equinorm.{signature(method)}", hanging=4)]
    if "Args" in text:
        lines += ["", indented(text["Args"])]
    lines += ["", wrapped(f"Paper: {facts.paper}"), *([wrapped(f"Source: {text['Source']}")] if "Source" in text else [])]
    return "\n".join(lines)


def signature(method: Method) -> str:
    """The call with its parameters and defaults, without types."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(method).parameters.values()]
    return f"{method.__name__}{inspect.Signature(parameters)}"


def pooled(pools: str) -> str:
    """What the letters of ``pools`` stand for, in words."""
    each = []
    for letters in pools.split("+"):
        words = [POOLED[letter] for letter in letters]
        each.append(" and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words))
    return "; another over ".join(each)


def picture(pools: str) -> str:
    """A small map of the input for each statistic: which values share it.

    Rows are samples, columns are channels, the three marks of a cell are positions.
    """
    return "\n\n".join(_map(letters) for letters in pools.split("+"))


def _map(letters: str) -> str:
    if set(letters) & set("DW"):
        what = "weight: each row is one output unit" if "W" in letters else "each row is one token or sample, each column one feature"
        return "\n".join([what, "  █ █ █ █ █ █", "  · · · · · ·", "  · · · · · ·"])
    full, window, single, none = "███", "██·", "█··", "···"
    inside = full if "S" in letters else window if "K" in letters else single
    rows = []
    for sample in range(3):
        cells = []
        for channel in range(6):
            in_batch = sample == 0 or "N" in letters
            in_channels = 1 <= channel <= 3 if "L" in letters else channel == 0 or "C" in letters or ("G" in letters and channel < 3)
            cells.append(inside if in_batch and in_channels else none)
        rows.append(f"sample {sample + 1}  " + "  ".join(cells))
    head = " " * 10 + "  ".join(f"ch{channel + 1}" for channel in range(6))
    return "\n".join([head, *rows])


def wrapped(text: str, hanging: int = 0) -> str:
    """Paragraphs of ``text`` filled to the terminal, following lines indented by ``hanging``."""
    paragraphs = [" ".join(part.split()) if hanging == 0 else part for part in text.split("\n\n")]
    return "\n\n".join(textwrap.fill(part, columns(), subsequent_indent=" " * hanging, break_long_words=False) for part in paragraphs)


def indented(text: str) -> str:
    """The lines of ``text`` as they are, set in."""
    return textwrap.indent(text, "    ")
