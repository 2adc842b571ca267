"""The cost of each method's step relative to the base optimizer's: FLOPs, time and memory.

Steps are timed in rounds of one step per method, so that slow moments of the machine affect all
equally. A time relative to SGD is the median of the ratios within rounds. FLOPs are counted, and
averaged over random masks.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arguments import at_least, check_place, count_number, method_name
from benchmarks.costs import counted_steps, predicted_ratio
from benchmarks.figures import scatter
from benchmarks.machine import provenance
from benchmarks.methods import METHODS, Method, Schedule, make_stepper, parse_method
from benchmarks.models import MODELS, build
from benchmarks.report import write_json, write_tables
from benchmarks.timing import Timing, peak_memory, time_interleaved

__all__ = ["BARS", "flops_bars", "main", "measure_model"]

#: The methods that the figure names.
NAMED = ("sgd", "sam", "esam", "suffix", "part", "suffix-part", "previous")

DEFAULT = (
    *("sgd", "sam", "peer-sam", "esam", "swp", "sds", "suffix", "suffix-sds", "last-sds"),
    *(
        "last-loss",
        "norm-suffix-sds",
        "sds-loss",
        "every10",
        "late-phase",
        "suffix-proportional",
        "half-suffix",
        "suffix-part",
        "part-random",
        "budget",
        "empty",
        "part",
        "previous",
        "momentum",
    ),
)

#: Widths of the models on a CPU, where the published ones take minutes per round.
NARROW = {"resnet18": 16, "wrn16-4": 1, "vit-small-cifar": 96, "wrn28-10": 1, "pyramidnet110": 48}

#: The maximum cost of a step in FLOPs relative to SGD's, on CIFAR ResNet-18 of full width.
BARS = {
    "esam": 1.72,
    "suffix-sds": 1.49,
    "suffix": 1.66,
    "last-sds": 1.33,
    "norm-suffix-sds": 1.33,
    "last-loss": 1.00,
    "part": 1.26,
    "suffix-part": 1.17,
    "previous": 1.00,
    "momentum": 1.00,
    "empty": 1.00,
}

COLUMNS = (
    *("method", "predicted", "FLOPs / SGD", "time / SGD", "quartiles", "time / FLOPs", "ms a step"),
    *("images/s", "peak MiB"),
)


def _step(
    method: Method,
    model_name: str,
    width: int | None,
    options: argparse.Namespace,
    x: Tensor,
    y: Tensor,
) -> Callable[[], object]:
    """Return a function that runs one step of a method, without its schedule."""
    torch.manual_seed(0)
    model = build(
        model_name, classes=options.classes, channels=x.shape[1], size=x.shape[2], width=width
    ).to(x.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.compile:
        model.compile()

    def losses(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=options.bf16):
            logits = model(a)
        return F.cross_entropy(logits.float(), b, reduction="none")

    stepper = make_stepper(
        dataclasses.replace(method, schedule=Schedule()),
        torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        model,
        model_name=model_name,
        rho=0.05,
        steps=1,
    )
    return lambda: stepper.step(losses, x, y)


def _mix(timing: Timing, base: Timing, share: float) -> Timing:
    """Return the timing of a run in which a share of the steps is perturbed."""
    return Timing(
        *(
            share * a + (1 - share) * b
            for a, b in zip(
                (timing.median, timing.low, timing.high),
                (base.median, base.low, base.high),
                strict=True,
            )
        ),
        timing.repeats,
    )


def measure_model(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all methods on one model; return one record per method.

    Args:
        name: a key of `MODELS`.
        options: the command's options.
    """
    width = _width(name, options)
    device = torch.device(options.device)
    x = torch.randn(options.batch, 3, options.size, options.size, device=device)
    y = torch.randint(options.classes, (options.batch,), device=device)
    if options.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    methods = {m: parse_method(m) for m in dict.fromkeys(["sgd", *options.methods])}
    shape = (3, options.size, options.size)
    counted = {
        m: counted_steps(
            method,
            model=name,
            width=width,
            classes=options.classes,
            shape=shape,
            batch=options.batch,
            repeats=options.masks if method.random else 1,
        )
        for m, method in methods.items()
    }
    predicted = {
        m: predicted_ratio(
            method,
            model=name,
            width=width,
            classes=options.classes,
            shape=shape,
            batch=options.batch,
        )
        for m, method in methods.items()
    }
    steps = {m: _step(method, name, width, options, x, y) for m, method in methods.items()}
    memory = {}
    for m, step in steps.items():
        step()  # finds blocks and creates optimizer state
        memory[m] = peak_memory(step, device)
    times, ratios = time_interleaved(
        steps,
        repeats=options.repeats,
        warmup=options.warmup,
        device=device,
        clock=time.process_time if options.clock == "cpu" else time.perf_counter,
        tell=lambda text: print(f"{name}: {text}", flush=True),
    )
    base_flops = sum(counted["sgd"]) / len(counted["sgd"])
    records = []
    for m, method in methods.items():
        share = method.schedule.share(10_000)
        flops = share * sum(counted[m]) / len(counted[m]) / base_flops + 1 - share
        taken = _mix(times[m], times["sgd"], share)
        ratio = _mix(ratios[m], ratios["sgd"], share)
        records.append(
            {
                "model": name,
                "method": m,
                "title": method.title,
                "predicted_ratio": share * predicted[m] + 1 - share,
                "flops_ratio": flops,
                "seconds": dataclasses.asdict(taken),
                "time_ratio": dataclasses.asdict(ratio),
                "images_per_second": options.batch / taken.median,
                "peak_bytes": memory[m],
            }
        )
    return records


def _width(name: str, options: argparse.Namespace) -> int | None:
    """Return the width of a model; None is the published one."""
    if options.width is None and options.narrow:
        return NARROW.get(name)
    return options.width


def _rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for r in records:
        ratio = r["time_ratio"]
        rows.append(
            [
                r["title"],
                f"{r['predicted_ratio']:.3f}",
                f"{r['flops_ratio']:.3f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
                f"{ratio['median'] / r['flops_ratio']:.2f}",
                f"{1e3 * r['seconds']['median']:.1f}",
                f"{r['images_per_second']:.0f}",
                f"{r['peak_bytes'] / 2**20:.1f}",
            ]
        )
    return rows


def flops_bars(masks: int) -> list[dict[str, Any]]:
    """Return the FLOPs of all methods with a bar, on CIFAR ResNet-18 of full width.

    Args:
        masks: number of random masks to average over.
    """
    (base,) = counted_steps(METHODS["sgd"], model="resnet18")
    records = []
    for name, bar in BARS.items():
        method = METHODS[name]
        counted = counted_steps(method, model="resnet18", repeats=masks if method.random else 1)
        ratio = sum(counted) / len(counted) / base
        records.append({"method": name, "title": method.title, "bar": bar, "flops_ratio": ratio})
    return records


def _flops_bar_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            r["title"],
            f"{r['bar']:.2f}",
            f"{r['flops_ratio']:.3f}",
            _verdict(r["flops_ratio"], r["bar"]),
        ]
        for r in records
    ]


def _verdict(got: float, bar: float) -> str:
    return "met" if got <= bar + 5e-4 else "missed"


def _time_bar_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the bars for times: within a tenth of the FLOPs, no slower than the peer's SAM."""
    by_method = {r["method"]: r["time_ratio"]["median"] for r in records}
    rows = []
    for r in records:
        over = by_method[r["method"]] / r["flops_ratio"]
        rows.append([f"{r['title']}: time over FLOPs", "1.10", f"{over:.2f}", _verdict(over, 1.1)])
    if {"sam", "peer-sam"} <= by_method.keys():
        against = by_method["sam"] / by_method["peer-sam"]
        times = {r["method"]: r["time_ratio"] for r in records}
        verdict = _verdict(against, 1.0)
        if verdict == "missed" and times["sam"]["low"] <= times["peer-sam"]["high"]:
            verdict = "equal: their quartiles overlap"
        rows.append(["our SAM's time over the peer's", "1.00", f"{against:.3f}", verdict])
    return rows


def _draw(path: Path, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Draw the methods' times against their FLOPs."""
    scatter(
        path,
        title=title,
        x=("FLOPs of a step / SGD's", [r["flops_ratio"] for r in records]),
        y=("time of a step / SGD's, and quartiles", [r["time_ratio"]["median"] for r in records]),
        spread=[(r["time_ratio"]["low"], r["time_ratio"]["high"]) for r in records],
        labels=[r["title"] for r in records],
        diagonal="time = FLOPs",
        named=[r["title"] for r in records if r["method"] in NAMED],
    )


def main(arguments: Sequence[str] = ()) -> None:
    """Measure according to the arguments; print tables, write JSON, tables and plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed",
        description=__doc__,
        epilog="methods: " + "; ".join(f"{m.name}: {m.title}" for m in METHODS.values()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["resnet18", "wrn16-4", "vit-small-cifar"],
        choices=list(MODELS),
        metavar="MODEL",
    )
    add("--methods", nargs="+", type=method_name, default=list(DEFAULT), metavar="NAME")
    add("--batch", type=count_number, default=128, help="samples per step (default: 128)")
    add("--size", type=count_number, default=32, help="image size (default: 32)")
    add("--classes", type=at_least(2), default=10, help="(default: 10)")
    add("--width", type=count_number, help="model width (default: the published one)")
    add(
        "--narrow",
        action=argparse.BooleanOptionalAction,
        help="narrow models (default: on a CPU); FLOP bars are checked at full width",
    )
    add("--repeats", type=count_number, default=9, help="measured rounds (default: 9)")
    add("--warmup", type=at_least(0), default=2, help="warm-up rounds (default: 2)")
    add("--masks", type=count_number, default=100, help="random masks to average FLOPs over (100)")
    add(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the process's own time, for a machine with other work (default: wall)",
    )
    add("--threads", type=count_number, help="CPU threads (default: torch's choice)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: cuda if available)",
    )
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--channels-last", action="store_true", help="memory format")
    add("--compile", action="store_true", help="compile the whole model")
    add("--out", type=Path, default=Path("benchmarks/results/speed"))
    add("--quick", action="store_true", help="a narrow ResNet-18, few rounds")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(
            models=["resnet18"],
            width=8,
            batch=32,
            size=16,
            repeats=5,
            warmup=1,
            masks=10,
            device="cpu",
            out=Path("benchmarks/out/speed"),
        )
        options = parser.parse_args(arguments)
    check_place(parser, options.device)
    if options.clock == "cpu" and (options.device, options.threads) != ("cpu", 1):
        parser.error("--clock cpu needs --device cpu and --threads 1: it adds up all threads.")
    if options.narrow is None:
        options.narrow = options.device == "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name in options.models:
        records = measure_model(name, options)
        wide = _width(name, options)
        width = "" if wide is None else f" of width {wide}"
        form = " ".join(
            word
            for word, on in (
                ("bf16", options.bf16),
                ("channels_last", options.channels_last),
                ("compiled", options.compile),
            )
            if on
        )
        clock = ", CPU time" if options.clock == "cpu" else ""
        title = (
            f"{name}{width}, batch {options.batch}, {options.size} x {options.size}, "
            f"{options.device}{' ' + form if form else ''}{clock}"
        )
        stem = "-".join([name, options.device.partition(":")[0], *form.split()])
        write_tables(options.out, stem, title, COLUMNS, _rows(records))
        write_json(
            options.out / f"{stem}.json",
            {
                "title": title,
                "options": {k: str(v) if k == "out" else v for k, v in vars(options).items()},
                "methods": records,
                **provenance(),
            },
        )
        _draw(options.out / f"{stem}.png", title, records)
        columns = ("bar", "at most", "measured", "")
        write_tables(
            options.out, f"{stem}-bars", f"Bars by time: {title}", columns, _time_bar_rows(records)
        )
    if not options.quick and "resnet18" in options.models:
        records = flops_bars(options.masks)
        title = "Bars by counted FLOPs: CIFAR ResNet-18 of full width, batch 128"
        columns = ("method", "at most", "counted", "")
        write_tables(options.out, "flops-bars", title, columns, _flops_bar_rows(records))
        write_json(
            options.out / "flops-bars.json", {"title": title, "methods": records, **provenance()}
        )
