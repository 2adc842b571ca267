"""The memory that a step of each method needs in addition to the weights, relative to SAM's.

On a GPU it is measured by the allocator. On a CPU every tensor that an operation creates is tracked
until it is freed. The result is exact, and counts tensors, not the process.
"""

import argparse
import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.arguments import at_least, check_place, count_number, method_name
from benchmarks.machine import provenance
from benchmarks.methods import METHODS, make_stepper, parse_method
from benchmarks.models import MODELS, build
from benchmarks.report import write_json, write_tables
from esam_torch import ESAM

__all__ = ["LiveBytes", "Meter", "main", "measure"]

DEFAULT = (
    *("sgd", "peer-sam", "sam", "asam", "esam", "suffix-sds", "last-sds", "last-loss"),
    *("suffix-part", "part", "previous", "momentum"),
)

COLUMNS = (
    *("method", "peak MiB", "over SGD", "copies of the weights", "against SAM's"),
    *("kept between steps", "peak, accumulating"),
)


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all tensors created while it is active.

    Attributes:
        now: bytes of the live tensors.
        peak: the maximum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _plain(x)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _plain(leaf) and id(leaf.untyped_storage()) not in before:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _plain(x: Any) -> bool:
    """Return whether a value is a tensor with an ordinary storage."""
    return isinstance(x, Tensor) and x.layout is torch.strided


class Meter:
    """Bytes in use in addition to those at the meter's creation.

    Args:
        device: the device to measure.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._live = None if device.type == "cuda" else LiveBytes()
        self._before = 0 if self._live else torch.cuda.memory_allocated(device)

    @property
    def now(self) -> int:
        """Bytes in use."""
        if self._live is not None:
            return self._live.now
        return torch.cuda.memory_allocated(self._device) - self._before

    def peak(self, work: Callable[[], object]) -> int:
        """Run some work, and return the maximum number of bytes in use during it."""
        if self._live is not None:
            self._live.peak = self._live.now
            with self._live:
                work()
            return self._live.peak
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def _allocate_workspaces(device: torch.device) -> None:
    """Run the first matrix products: on a GPU they allocate workspaces, which no method needs."""
    matrix = torch.randn(64, 64, device=device, requires_grad=True)
    (matrix @ matrix).sum().backward()


def measure(
    method: str, model: nn.Module, model_name: str, x: Tensor, y: Tensor
) -> dict[str, float]:
    """Return bytes in addition to the weights: the peak, those kept, the peak when accumulating.

    Args:
        method: the method's name.
        model: the model to train.
        model_name: its name, for the blocks to cut at.
        x: inputs.
        y: targets.
    """

    def losses(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(model(a), b, reduction="none")

    base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    stepper = make_stepper(
        parse_method(method), base, model, model_name=model_name, rho=0.05, steps=1
    )

    def step() -> None:
        stepper.step(losses, x, y)
        base.zero_grad()

    gc.collect()  # a model that is freed later would count as memory that this one freed
    meter = Meter(x.device)
    meter.peak(step)  # finds blocks and creates momenta
    result = {"kept": float(meter.now), "peak": float(meter.peak(step))}
    optimizer = getattr(stepper, "optimizer", None)
    if isinstance(optimizer, ESAM):
        meter.peak(lambda: optimizer.backward(losses, x, y))
        again = meter.peak(lambda: optimizer.backward(losses, x, y))
        result["accumulating"] = float(again)
        optimizer.zero_grad()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--methods", nargs="+", type=method_name, default=list(DEFAULT), help=", ".join(METHODS)
    )
    parser.add_argument("--model", default="resnet18", choices=list(MODELS))
    parser.add_argument("--width", type=count_number, default=None)
    parser.add_argument(
        "--batch", type=count_number, default=4, help="small, so that the weights dominate"
    )
    parser.add_argument("--size", type=count_number, default=32)
    parser.add_argument("--classes", type=at_least(2), default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=count_number, help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="output folder (default: benchmarks/results/memory, or memory-cuda for a GPU)",
    )
    parser.add_argument("--quick", action="store_true", help="a narrow network")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    check_place(parser, options.device)
    device = torch.device(options.device)
    name = "memory" if device.type == "cpu" else f"memory-{device.type}"
    out = options.out or Path("benchmarks/out" if options.quick else "benchmarks/results") / name
    width = 8 if options.quick and options.width is None else options.width
    x = torch.randn(options.batch, 3, options.size, options.size, device=device)
    y = torch.randint(options.classes, (options.batch,), device=device)
    found: dict[str, dict[str, float]] = {}
    weights = 0
    _allocate_workspaces(device)
    for name in dict.fromkeys(["sgd", "peer-sam", *options.methods]):
        torch.manual_seed(0)
        model = build(
            options.model, classes=options.classes, channels=3, size=options.size, width=width
        ).to(device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        found[name] = measure(name, model, options.model, x, y)
    base, sam = found["sgd"]["peak"], found["peer-sam"]["peak"]
    rows = [
        [
            METHODS[name].title if name in METHODS else name,
            f"{need['peak'] / 2**20:.2f}",
            f"{(need['peak'] - base) / 2**20:+.2f}",
            f"{(need['peak'] - base) / weights:+.2f}",
            f"{need['peak'] / sam:.2f}",
            f"{need['kept'] / 2**20:.2f}",
            f"{need['accumulating'] / 2**20:.2f}" if "accumulating" in need else "",
        ]
        for name, need in found.items()
    ]
    title = (
        f"Memory of a step in addition to the weights: {options.model}, batch {options.batch}, "
        f"weights of {weights / 2**20:.2f} MiB, {device.type}"
    )
    write_tables(out, "memory", title, COLUMNS, rows)
    write_json(out / "memory.json", {"needs": found, **provenance()})


if __name__ == "__main__":
    main()
