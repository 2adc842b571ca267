"""The host time of a step: `python -m benchmarks host`.

The networks have many tiny layers, whose kernels take almost no time. The measurement is therefore
of Python and the dispatch of operations, which a GPU waits for. It is processor time on a CPU and
wall time on a GPU, in interleaved rounds, relative to a step of SGD, for ESAM, for the same steps
written by hand, and for another library's SAM.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arguments import count_number
from benchmarks.machine import provenance
from benchmarks.report import write_json, write_tables
from benchmarks.timing import time_interleaved
from esam_torch import ESAM, Between, Everything, Part, Proportional, Suffix

__all__ = ["STEPS", "Scene", "main", "operations"]

WIDTH, BATCH, RHO = 8, 8, 0.05


@dataclass
class Scene:
    """A network of tiny layers, its optimizer and a batch.

    Args:
        tensors: the number of parameter tensors, two per layer.
        device: the device of network and batch.
    """

    tensors: int
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(self.tensors // 2)]
        self.model = nn.Sequential(*layers).to(self.device)
        # As on a GPU, where torch by default updates all tensors in one call.
        self.base = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
        inputs, targets = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % WIDTH
        self.batch = inputs.to(self.device), targets.to(self.device)

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per sample."""
        return F.cross_entropy(self.model(inputs), targets, reduction="none")


Step = Callable[[], Any]


def sgd(scene: Scene) -> Step:
    """Return a step of SGD."""

    def step() -> None:
        scene.base.zero_grad()
        scene.losses(*scene.batch).mean().backward()
        scene.base.step()

    return step


def _climb(gradients: Sequence[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Move weights along their gradients; return copies of the original weights."""
    with torch.no_grad():
        norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
        epsilon = torch._foreach_mul(list(gradients), RHO / (norm + 1e-12))
        copies = [w.clone() for w in weights]
        torch._foreach_add_(weights, epsilon)
    return copies


def sam_by_hand(scene: Scene) -> Step:
    """Return a hand-written step of SAM with operations on lists of tensors."""
    weights = list(scene.model.parameters())

    def step() -> None:
        scene.base.zero_grad()
        gradients = torch.autograd.grad(scene.losses(*scene.batch).mean(), weights)
        copies = _climb(gradients, weights)
        scene.losses(*scene.batch).mean().backward()
        with torch.no_grad():
            torch._foreach_copy_(weights, copies)
        scene.base.step()

    return step


class _Loss(torch.autograd.Function):
    """A loss with a given value, whose gradients a function computes in the backward."""

    @staticmethod
    def forward(ctx: Any, rest: Callable[[Tensor], Any], value: Tensor, *_: Tensor) -> Tensor:
        ctx.rest = rest
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        return (None, None, *ctx.rest(*scales))


def sam_by_hand_as_a_loss(scene: Scene) -> Step:
    """Return the hand-written step of SAM as the backward of a loss, as ESAM's is."""
    weights = list(scene.model.parameters())

    def step() -> None:
        scene.base.zero_grad()
        mean = scene.losses(*scene.batch).mean()

        def rest(scale: Tensor) -> Sequence[Tensor]:
            with torch.enable_grad():
                copies = _climb(torch.autograd.grad(mean, weights, scale), weights)
                perturbed = scene.losses(*scene.batch).mean()
                found = torch.autograd.grad(perturbed, weights, scale)
            with torch.no_grad():
                torch._foreach_copy_(weights, copies)
            return found

        _Loss.apply(rest, mean.detach(), *weights).backward()  # type: ignore[no-untyped-call]
        scene.base.step()

    return step


def _halves(scene: Scene) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of the first half of the layers, and those of the second."""
    weights = list(scene.model.parameters())
    return weights[: len(weights) // 2], weights[len(weights) // 2 :]


def _losses_of(scene: Scene, inputs: Tensor, targets: Tensor, idle: Sequence[Tensor]) -> Tensor:
    """Return one loss per sample, without a graph for the idle weights."""
    for weight in idle:
        weight.requires_grad_(False)
    values = scene.losses(inputs, targets)
    for weight in idle:
        weight.requires_grad_(True)
    return values


def half_by_hand(scene: Scene) -> Step:
    """Return a hand-written step that perturbs half of the layers and uses half of the samples."""
    idle, late = _halves(scene)

    def step() -> None:
        scene.base.zero_grad()
        values = _losses_of(scene, *scene.batch, idle)
        copies = _climb(torch.autograd.grad(values.mean(), late), late)
        with torch.no_grad():
            share = values / values.sum()
            chosen = torch.multinomial(share, BATCH // 2)
            factor = 1.0 / (BATCH * (BATCH // 2) * share[chosen])
        inputs, targets = scene.batch
        (scene.losses(inputs[chosen], targets[chosen]) * factor).sum().backward()
        with torch.no_grad():
            torch._foreach_copy_(late, copies)
        scene.base.step()

    return step


def part_by_hand(scene: Scene) -> Step:
    """Return a hand-written step that perturbs half of the layers, from a quarter of the batch."""
    idle, late = _halves(scene)

    def step() -> None:
        scene.base.zero_grad()
        inputs, targets = scene.batch
        part = torch.randperm(BATCH, device=scene.device)[: BATCH // 4]
        values = _losses_of(scene, inputs[part], targets[part], idle)
        copies = _climb(torch.autograd.grad(values.mean(), late), late)
        scene.losses(inputs, targets).mean().backward()
        with torch.no_grad():
            torch._foreach_copy_(late, copies)
        scene.base.step()

    return step


def peer_sam(scene: Scene) -> Step:
    """Return a step of pytorch-optimizer's SAM."""
    from pytorch_optimizer import SAM

    optimizer = SAM(
        scene.model.parameters(),
        base_optimizer=torch.optim.SGD,
        rho=RHO,
        lr=1e-4,
        momentum=0.9,
        foreach=True,
    )

    def step() -> None:
        scene.losses(*scene.batch).mean().backward()
        optimizer.first_step(zero_grad=True)
        scene.losses(*scene.batch).mean().backward()
        optimizer.second_step(zero_grad=True)

    return step


def ours(**options: Any) -> Callable[[Scene], Step]:
    """Return a function that creates a step of ESAM with these options."""

    def make(scene: Scene) -> Step:
        optimizer = ESAM(scene.base, scene.model, rho=RHO, **options)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.loss(scene.losses, *scene.batch).backward()
            optimizer.step()

        return step

    return make


#: All kinds of step, by name; the others are compared with the first.
STEPS: dict[str, Callable[[Scene], Step]] = {
    "SGD": sgd,
    "SAM by hand": sam_by_hand,
    "SAM by hand, as a loss": sam_by_hand_as_a_loss,
    "SAM of pytorch-optimizer": peer_sam,
    "SAM": ours(perturb=Everything(), gamma=1.0),
    "ESAM": ours(),
    "half of the work by hand": half_by_hand,
    "half of the work": ours(perturb=Suffix(0.5), select=Proportional(0.5)),
    "Suffix with Part by hand": part_by_hand,
    "Suffix with Part": ours(perturb=Suffix(0.5), gamma=1.0, ascend=Part(0.25)),
    "empty mask": ours(perturb=Between(0, 0)),
}


class _Counter(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(step: Step, *, warmup: int = 4) -> int:
    """Return how many operations a step dispatches, after the warm-up steps."""
    for _ in range(warmup):
        step()
    with _Counter() as counter:
        step()
    return counter.count


def measure(tensors: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each kind of step on a network with this many tensors."""
    steps = {name: make(Scene(tensors, device)) for name, make in STEPS.items()}
    counts = {name: operations(step) for name, step in steps.items()}
    on_cpu = device.type == "cpu"
    _, ratios = time_interleaved(
        steps,
        repeats=repeats,
        warmup=3,
        device=device,
        clock=time.process_time if on_cpu else time.perf_counter,
    )
    return [
        {
            "tensors": tensors,
            "step": name,
            "time": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "operations": counts[name],
            "share": counts[name] / counts["SGD"],
        }
        for name, ratio in ratios.items()
    ]


COLUMNS = ("step", "tensors", "time / SGD", "quartiles", "operations", "/ SGD")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks host", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--tensors", type=count_number, nargs="+", default=[60, 240, 960])
    parser.add_argument("--repeats", type=count_number, default=31, help="rounds")
    parser.add_argument("--threads", type=count_number, default=1, help="of the CPU (1)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(cpu)")
    parser.add_argument("--out", type=Path, help="output folder (default: benchmarks/results/host)")
    parser.add_argument("--quick", action="store_true", help="a short network, two rounds")
    options = parser.parse_args(arguments)
    root = Path("benchmarks/out" if options.quick else "benchmarks/results")
    on_cpu = options.device.type == "cpu"
    out = options.out or root / ("host" if on_cpu else f"host-{options.device.type}")
    if options.quick:
        options.tensors, options.repeats = [8], 2
    torch.set_num_threads(options.threads)
    rows = [
        row
        for tensors in options.tensors
        for row in measure(tensors, options.repeats, options.device)
    ]
    shown = [
        [
            row["step"],
            str(row["tensors"]),
            f"{row['time']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            str(row["operations"]),
            f"{row['share']:.3f}",
        ]
        for row in rows
    ]
    clock = "processor time" if on_cpu else f"wall time on {options.device.type}"
    title = f"The host time of a step: {clock} with tiny kernels, and operations"
    write_tables(out, "host", title, COLUMNS, shown)
    write_json(out / "host.json", {"rows": rows, **provenance()})


if __name__ == "__main__":
    main()
