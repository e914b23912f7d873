"""The command ``equinorm demo``: two small comparisons on real data, in a few minutes."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from equinorm.compare.command import exit_code, interrupt, write_files
from equinorm.compare.environment import cores, require
from equinorm.compare.plan import Plan

MOST_WORKERS = 8


def plans() -> list[Plan]:
    """What the demo compares."""
    return [
        Plan(
            task="digits-mlp",
            # 16 features per group, one of the two defaults of the group norm paper; the other, 32 groups, leaves four to a group here.
            norms=("none", "batch", "layer", "rms", "group:num_groups=8", "switch"),
            batch_sizes=(2, 4, 16, 64),
        ),
        Plan(task="digits", norms=("batch+ws", "group+ws", "batch_channel+ws"), batch_sizes=(4, 64)),
    ]


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``equinorm demo``."""
    parser.add_argument("--out", type=Path, default=Path("equinorm-demo"), metavar="FOLDER", help="where results go (default: %(default)s)")


def run(arguments: Namespace) -> int:
    """Run both comparisons, write one report, say what was measured. Returns the exit code."""
    require("compare")
    signal.signal(signal.SIGTERM, interrupt)
    from equinorm.compare.progress import duration, progress_on
    from equinorm.compare.report import write_report
    from equinorm.compare.runner import compare
    from equinorm.compare.table import print_results

    workers, begin = min(cores(), MOST_WORKERS), time.monotonic()
    command = shlex.join(["equinorm", *sys.argv[1:]])
    comparisons = []
    for plan in plans():
        folder = arguments.out / plan.task
        print(
            f"{plan.task}: {len(plan.norms)} norms, batch sizes {', '.join(map(str, plan.batch_sizes))}, {len(plan.seeds)} seeds",
            flush=True,
        )
        comparison = compare(plan, folder, workers=workers, command=command, progress=progress_on(sys.stderr, workers))
        write_files(comparison, folder)
        print_results(comparison)
        print()
        comparisons.append(comparison)
    cells = sum(len(comparison.outcomes) for comparison in comparisons)
    report = write_report(comparisons, arguments.out / "report.html")
    print(f"{cells} cells in {duration(time.monotonic() - begin)}. What they say is above, and with figures in {report}")
    return max(map(exit_code, comparisons))
