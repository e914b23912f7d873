"""The command ``equinorm``: one subcommand per instrument, each in its own module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import equinorm

# Name, what it does, and the module that has add_arguments(parser) and run(arguments) -> exit code.
COMMANDS = (
    ("probe", "see the signal in a model, find what hurts it, try what helps", "equinorm.checkup.command"),
    ("compare", "train a task with each norm, batch size and seed, and report", "equinorm.compare.command"),
    ("demo", "compare norms on scikit-learn's digits, in a few minutes", "equinorm.compare.demo"),
    ("trains", "train a small network with every method: first and last loss", "equinorm.trains.command"),
    ("bench", "time the norms beside torch's and others on this machine", "equinorm.bench.command"),
    ("list", "the catalogue of methods, by family and property", "equinorm.catalogue_list"),
    ("show", "one method: formula, what it pools over, when to choose it", "equinorm.catalogue_show"),
    ("info", "versions, machine, kernels", "equinorm.compare.environment"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code: that of the subcommand, 2 for bad input, 130 if stopped."""
    parser = argparse.ArgumentParser(prog="equinorm", description=equinorm.__doc__)
    parser.add_argument("--version", action="version", version=f"equinorm {equinorm.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, does, module in COMMANDS:
        command = importlib.import_module(module)
        subparser = commands.add_parser(name, help=does)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, name=name)
    parsed = parser.parse_args(arguments)
    from equinorm.compare.errors import InputError, Interrupted

    try:
        return parsed.run(parsed)
    except InputError as error:
        print(f"equinorm {parsed.name}: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"equinorm {parsed.name}: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"equinorm {parsed.name}: stopped", file=sys.stderr)
        return 130
