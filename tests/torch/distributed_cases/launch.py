"""Runs a file of cases in two processes started by torchrun, and collects their results.

A case is a function `case_...` without arguments that returns plain data. Both ranks run all cases
in order, so that the processes are started only once for many tests.
"""

import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

#: Whether FSDP2 runs on CPUs: in torch 2.6 it calls a method that CPU streams lack.
SHARDS_ON_CPUS = hasattr(torch.cpu.Stream, "record_event")


def main(cases, folder):
    """Run all cases on one rank, and record each result or error."""
    torch.set_num_threads(1)
    # On gloo, a deadlock ends with an error after this time.
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    results = {}
    for name, case in cases.items():
        if name.startswith("case_"):
            torch.manual_seed(0)
            try:
                results[name.removeprefix("case_")] = {"value": case()}
            except Exception:
                results[name.removeprefix("case_")] = {"error": traceback.format_exc()}
                break  # the ranks may no longer be synchronised
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def launch(script, folder, *, processes=2, timeout=120):
    """Start the ranks and return their results, one dictionary per rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    files = [Path(folder) / f"{rank}.json" for rank in range(processes)]
    if done.returncode or not all(file.exists() for file in files):
        raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return [json.loads(file.read_text()) for file in files]


def value(results, case):
    """Return a case's result on each rank; raise an AssertionError if it failed."""
    for rank, found in enumerate(results):
        assert case in found, f"rank {rank} did not come to {case}: {[*found][-1:]}, {found}"
        assert "error" not in found[case], f"rank {rank}:\n{found[case]['error']}"
    return [found[case]["value"] for found in results]
