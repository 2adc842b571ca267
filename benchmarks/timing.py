"""Interleaved times of steps, and the memory that they need."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Timing", "peak_memory", "time_interleaved"]

Step = Callable[[], object]

#: Steps of one measurement on CUDA: the host queues the next steps while the GPU runs, as it does
#: in training.
_STEPS_ON_CUDA = 10


@dataclass(frozen=True)
class Timing:
    """Times of repeated steps, in seconds.

    Args:
        median: the median.
        low: the first quartile.
        high: the third quartile.
        repeats: the number of repeats.
    """

    median: float
    low: float
    high: float
    repeats: int


def time_interleaved(
    steps: Mapping[str, Step],
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[str], None] | None = None,
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Time steps in rounds of one each, so that slow moments of the machine affect all equally.

    Args:
        steps: the steps by name; the others are compared with the first.
        repeats: measured rounds.
        warmup: warm-up rounds before them.
        device: the device to wait for before and after each measurement: of one step, on CUDA of
            ten.
        clock: returns seconds; `time.process_time` excludes other work on the machine.
        tell: called with a message for each round.

    Returns:
        Seconds of each step, and their ratios to the first step *of the same round*. On a machine
        with other work, their median varies less than a ratio of medians.
    """

    count = _STEPS_ON_CUDA if device.type == "cuda" else 1

    def seconds(step: Step) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - start) / count

    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(-warmup, repeats):
        # Each round starts with a different step, because the previous step affects the caches.
        turned = names[i % len(names) :] + names[: i % len(names)]
        for name in turned:
            value = seconds(steps[name])
            if i >= 0:
                taken[name].append(value)
        if tell is not None and i >= 0:
            tell(f"round {i + 1}/{repeats}")
    first = taken[names[0]]
    ratios = {n: [a / b for a, b in zip(v, first, strict=True)] for n, v in taken.items()}
    return (
        {name: _timing(values) for name, values in taken.items()},
        {name: _timing(values) for name, values in ratios.items()},
    )


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def peak_memory(step: Step, device: torch.device) -> int:
    """Return the maximum number of bytes allocated during a step, beyond those before it.

    It is counted on CUDA by the allocator, and on a CPU by torch's profiler, which sees each
    allocation of a tensor.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _silent_errors(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        step()
    now = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@contextlib.contextmanager
def _silent_errors() -> Iterator[None]:
    """Discard the process's standard error, where torch's profiler prints messages."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
