"""The command ``equinorm compare``."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from equinorm.compare.environment import require
from equinorm.compare.errors import InputError
from equinorm.compare.metrics import DIRECTIONS
from equinorm.compare.norms import literal, split_specs
from equinorm.compare.plan import Plan
from equinorm.compare.task import BUILT_IN

if TYPE_CHECKING:
    from equinorm.compare.results import Comparison

DESCRIPTION = """Train the same task with each norm, at each batch size, for each seed, and report what came out.

A run that was stopped goes on where it was when the same command is given again; a finished one adds nothing. Commands with the same
--storage and
--study share the work, on one machine or many."""

EPILOG = """norms:
  NAME, NAME:key=value,key=value, none, and any of them with +ws for weight standardization: batch group:num_groups=8 batch_channel+ws

exit codes:
  0    every cell is measured, or could not be: the norm refused the task, or training diverged (both are results)
  1    a cell failed by an error in the task or a process that died, or no cell has a result
  2    bad input: nothing was started, or the task does not yield metrics; what was measured before is kept
  130  stopped by Ctrl-C or SIGTERM; finished cells are kept"""


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``equinorm compare``."""
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, RawDescriptionHelpFormatter
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "task", nargs="?", default="digits-mlp", help=f"{', '.join(BUILT_IN)}, file.py:function or module:function (default: %(default)s)"
    )
    what.add_argument(
        "--norms", nargs="+", default=["none", "batch", "layer", "group"], metavar="NORM", help="default: none batch layer group"
    )
    what.add_argument("--batch-sizes", default="2,4,16,64", metavar="N,N", help="default: %(default)s")
    what.add_argument("--seeds", default="3", metavar="N", help="number of seeds, or a list of them such as 7,8,9 (default: %(default)s)")
    what.add_argument(
        "--lr", default="", metavar="X,X", help="learning rate; of several, the best by validation for each norm and batch size"
    )
    what.add_argument("--epochs", type=_integer, metavar="N", help="passes over the training data (default: the task's own)")
    what.add_argument("--metric", default="", metavar="NAME", help="what to compare (default: accuracy, or what the task says)")
    what.add_argument("--direction", choices=DIRECTIONS, default="", help="which way is better (default: by the metric's name)")
    what.add_argument("--data", metavar="FOLDER", help="where the task finds its data")
    what.add_argument("--device", default="cpu", help="default: %(default)s")
    what.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="further keyword argument for the task; may be repeated"
    )
    how = parser.add_argument_group("how to run it")
    how.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: compare-TASK)")
    how.add_argument(
        "--workers", type=_integer, default=1, metavar="N", help="cells measured side by side; threads are divided (default: %(default)s)"
    )
    how.add_argument(
        "--storage", metavar="URL", help="database of the study, such as postgresql://user@host/name (default: SQLite in the folder)"
    )
    how.add_argument("--study", metavar="NAME", help="name of the study in the database (default: the task's name)")
    how.add_argument(
        "--stale-after",
        type=_integer,
        default=30,
        metavar="SECONDS",
        help="without a sign of life for so long, another command's cell counts as lost and is measured again (default: %(default)s)",
    )
    how.add_argument("--retry-failed", action="store_true", help="measure failed cells again")
    how.add_argument("--report-only", action="store_true", help="measure nothing, report what the study holds")
    how.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def run(arguments: Namespace) -> int:
    """Compare, write the files, print the results. Returns the exit code."""
    require("compare")
    signal.signal(signal.SIGTERM, interrupt)
    if arguments.workers < 1 or arguments.stale_after < 1:
        raise InputError(f"--workers and --stale-after must be positive, got {arguments.workers} and {arguments.stale_after}")
    plan = Plan(
        task=arguments.task,
        norms=split_specs(arguments.norms),
        batch_sizes=_list("--batch-sizes", arguments.batch_sizes, int),
        seeds=_seeds(arguments.seeds),
        learning_rates=_list("--lr", arguments.lr, float) if arguments.lr else (),
        metric=arguments.metric,
        direction=arguments.direction,
        epochs=arguments.epochs,
        data=arguments.data,
        device=arguments.device,
        options=dict(map(_option, arguments.option)),
    )
    folder = arguments.out or Path(f"compare-{re.sub(r'[^A-Za-z0-9_.-]+', '-', plan.task)}")
    comparison = _compare(plan, folder, arguments)
    files = write_files(comparison, folder)
    if arguments.json:
        from equinorm.compare.output import to_json

        print(json.dumps(to_json(comparison, files), indent=2, default=repr))
    else:
        from equinorm.compare.table import print_results

        print_results(comparison)
        print(f"\nReport: {files['report']}\nTables: {files['results']}, {files['cells']}, {files['epochs']}")
    return exit_code(comparison)


def write_files(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Write the CSV files and the report. Returns their paths by name."""
    from equinorm.compare.output import write_csv
    from equinorm.compare.report import write_report

    return {path.stem: str(path) for path in [*write_csv(comparison, folder), write_report([comparison], folder / "report.html")]}


def exit_code(comparison: Comparison) -> int:
    """0 if all that could be measured was; 1 if something went wrong that the user should look at."""
    wrong = [failed for failed in comparison.failures.values() if failed.kind in ("error", "died")]
    return 1 if wrong or not any(row.scores for row in comparison.rows) else 0


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C: give up the cells in flight, keep the rest."""
    raise KeyboardInterrupt


def _compare(plan: Plan, folder: Path, arguments: Namespace) -> Comparison:
    from equinorm.compare.progress import progress_on
    from equinorm.compare.runner import compare

    return compare(
        plan,
        folder,
        storage=arguments.storage,
        study=arguments.study,
        workers=arguments.workers,
        stale_after=arguments.stale_after,
        retry_failed=arguments.retry_failed,
        measure=not arguments.report_only,
        command=repeatable(sys.argv[1:], arguments.storage),
        progress=progress_on(sys.stderr, arguments.workers),
    )


def repeatable(words: Sequence[str], storage: str | None) -> str:
    """The command as typed, for the report; without the database's password."""
    from equinorm.compare.study import shown

    return shlex.join(["equinorm", *(word.replace(storage, shown(storage)) if storage else word for word in words)])


def _list(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(piece) for piece in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} must be numbers with commas between them, got {text!r}") from error


def _seeds(text: str) -> list[int]:
    seeds = _list("--seeds", text, int)
    if len(seeds) > 1:
        return seeds
    if seeds[0] < 1:
        raise InputError(f"--seeds must be a positive number of seeds or a list of them, got {text!r}")
    return list(range(seeds[0]))


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise InputError(f"--option must be KEY=VALUE, got {text!r}")
    return key, literal(value)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a whole number, got {text!r}") from None
