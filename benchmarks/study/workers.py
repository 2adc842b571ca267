"""Workers that make the study's runs, in any number of processes.

A worker makes the first run of the plan that no other worker is making. It locks a file for that
run; the system releases the lock when the process ends, for whatever reason. If a worker is killed,
the next one resumes from its checkpoint.
"""

import fcntl
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.run import Run
from benchmarks.store import Store
from benchmarks.study.fit import FIT, Fit
from benchmarks.study.planning import make_plan
from benchmarks.study.settings import Setting
from benchmarks.train import train

__all__ = ["FailedRunsError", "claim_run", "folder_of", "work"]


class FailedRunsError(RuntimeError):
    """Some runs raised exceptions; all others have been made."""


def folder_of(setting: Setting, results: Path) -> Path:
    """Return the folder of a setting's runs."""
    return results / f"study-{setting.name}"


@contextmanager
def claim_run(run: Run, folder: Path) -> Iterator[bool]:
    """Lock a run, unless another process has locked it.

    Args:
        run: the run.
        folder: the folder of its setting.

    Yields:
        Whether this process has the lock.
    """
    path = folder / "checkpoints" / f"{run.key(FIT)}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def work(
    settings: Sequence[Setting],
    results: Path,
    *,
    most: int | None = None,
    wait: float = 10.0,
    say: Callable[[str], None] = print,
) -> int:
    """Make runs until none is missing; return the number of runs made by this process.

    Args:
        settings: the settings, the most important first.
        results: the folder that contains the settings' folders.
        most: the most runs to make; None for no limit.
        wait: seconds to wait if other processes are making all the runs that can be made.
        say: a function that is called with a line of text after each epoch.

    Raises:
        FailedRunsError: runs raised exceptions. They are not tried again; all others are made
            first.
    """
    made = 0
    failed: dict[tuple[Path, str], str] = {}
    while most is None or made < most:
        plans = [
            (folder_of(setting, results), make_plan(setting, _records(setting, results)))
            for setting in settings
        ]
        if all(plan.done for _, plan in plans):
            break
        runs = [(folder, run) for folder, plan in plans for run in plan.runs]
        left = [(folder, run) for folder, run in runs if (folder, run.key(FIT)) not in failed]
        if not left:
            break
        for folder, run in left:
            try:
                if _make(run, folder, say):
                    made += 1
                    break
            except Exception:  # such as too little memory: the other runs do not depend on it
                failed[folder, run.key(FIT)] = run.file_name(FIT)
                say(f"{run.file_name(FIT)}: failed\n{traceback.format_exc()}")
                break
        else:
            time.sleep(wait)
    if failed:
        raise FailedRunsError(f"{len(failed)} runs failed: {', '.join(failed.values())}")
    return made


def _records(setting: Setting, results: Path) -> list[dict[str, object]]:
    return Store(folder_of(setting, results)).records()


def _make(run: Run, folder: Path, say: Callable[[str], None]) -> bool:
    """Make a run, unless another process is making it or has made it; return whether."""
    with claim_run(run, folder) as ours:
        if not ours or Store(folder).find(run, FIT) is not None:
            return False
        train(run, folder, checkpoint_every=2, probe=Fit(), say=say)
    return True
