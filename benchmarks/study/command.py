"""Run the study of docs/study-protocol.md.

You can stop the command at any time and start it again, also several times at once: finished runs
are not repeated, an interrupted run resumes, and no two processes make the same run.
"""

import argparse
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arguments import check_place, count_number
from benchmarks.store import Store
from benchmarks.study.pictures import cell_text
from benchmarks.study.planning import make_plan
from benchmarks.study.settings import QUICK, SETTINGS, Cell, Setting
from benchmarks.study.tables import write_report
from benchmarks.study.workers import FailedRunsError, folder_of, work

__all__ = ["main"]


def main(arguments: Sequence[str] = ()) -> None:
    """Make the missing runs, or write their plan or report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks study",
        description=__doc__,
        epilog="settings: " + "; ".join(f"{s.name}: {s.title}" for s in SETTINGS.values()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    on_cpu = [name for name, setting in SETTINGS.items() if setting.shared["device"] == "cpu"]
    add("settings", nargs="*", default=on_cpu, metavar="SETTING", help="(default: those on a CPU)")
    add("--jobs", type=count_number, default=1, help="number of processes (default: 1)")
    add("--threads", type=count_number, default=1, help="CPU threads per process (default: 1)")
    add("--runs", type=count_number, help="most runs per process (default: all)")
    add(
        "--out", type=Path, default=Path("benchmarks/results"), help="(default: benchmarks/results)"
    )
    add("--plan", action="store_true", help="print the missing runs and exit")
    add("--report", action="store_true", help="write tables and figure and exit")
    add("--quick", action="store_true", help="make two small runs per process, in seconds")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.settings) - set(SETTINGS))
    if unknown:
        known = ", ".join(SETTINGS)
        parser.error(f"SETTING must be one of {known}. Received: {', '.join(unknown)}.")
    settings = [SETTINGS[name] for name in options.settings]
    if options.quick:
        parser.set_defaults(runs=2, out=Path("benchmarks/out"))
        options, settings = parser.parse_args(arguments), [QUICK]
    out = options.out
    if options.plan:
        for setting in settings:
            _show_plan(setting, out)
        return
    if options.report:
        for setting in settings:
            print(write_report(setting, folder_of(setting, out)))
        return
    for setting in settings:
        data = setting.shared["data"]
        check_place(parser, setting.shared["device"], *(() if data == "pydoc" else (data,)))
    call = (settings, out, options.threads, options.runs)
    if options.jobs == 1:
        _work(*call)
        return
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=call) for _ in range(options.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(1)


def _show_plan(setting: Setting, out: Path) -> None:
    """Print the runs of a setting that can be made now."""
    plan = make_plan(setting, Store(folder_of(setting, out)).records())
    print(f"{setting.name}: {len(plan.runs)} runs can be made now")
    for run in plan.runs:
        cell = cell_text(run.method, Cell.of(run))
        print(f"  {run.method}, {cell}, {run.epochs} epochs, seed {run.seed}")


def _work(settings: Sequence[Setting], out: Path, threads: int, most: int | None) -> None:
    torch.set_num_threads(threads)
    try:
        work(settings, out, most=most, say=lambda text: print(text, flush=True))
    except FailedRunsError as error:
        raise SystemExit(str(error)) from None
