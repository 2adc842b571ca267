"""Tables 4 and 5: the share g(N, beta) that SWP saves of an MLP's ascent pass, and its constants.

An MLP of N layers runs ascent passes (forward, and gradients of the masked tensors) alternately
with masks of Bernoulli(beta) and with all tensors. g is the share of the time, and of the FLOPs,
that the masks save. Table 4 has one tensor per layer (no biases: K = 1), table 5 two (biases: K =
2). The fit is `esam_core.savings.fit_savings`, of equations 11 and 12.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arguments import at_least, count_number, whole_share
from benchmarks.figures import COLOURS, MARKERS, panels, save
from benchmarks.machine import provenance
from benchmarks.published import SAVINGS, SAVINGS_CONSTANTS
from benchmarks.report import write_json, write_tables
from esam_core import Bernoulli, Unit
from esam_core.savings import SavingsFit, fit_savings, savings

__all__ = ["printed_fit", "table4", "table5"]

COLUMNS = (
    *("N", "beta", "time", "FLOPs", "fit to the time", "the paper's fit", "printed in the paper"),
)


def printed_fit(name: str) -> SavingsFit:
    """Return the fit to the rows of table 4 or 5 that the paper prints.

    Args:
        name: "table4" or "table5".
    """
    rows = [(n, beta, saved) for n, row in SAVINGS[name].items() for beta, saved in row.items()]
    layers, betas, shares = zip(*rows, strict=True)
    return fit_savings(layers, betas, shares)


def _mlp(layers: int, width: int, *, bias: bool) -> nn.Module:
    """Return `layers` linear layers with ReLUs between them."""
    parts: list[nn.Module] = []
    for i in range(layers):
        parts.append(nn.Linear(width, width, bias=bias))
        if i < layers - 1:
            parts.append(nn.ReLU())
    return nn.Sequential(*parts)


def masked_gradients(loss: Tensor, chosen: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of the masked tensors, without computing others."""
    return torch.autograd.grad(loss, chosen)


def _measure(
    layers: int, betas: Sequence[float], options: argparse.Namespace, *, bias: bool
) -> list[dict[str, float]]:
    """Return the saved shares of time and FLOPs for each beta."""
    torch.manual_seed(0)
    model = _mlp(layers, options.width, bias=bias)
    parameters = list(model.parameters())
    units = [Unit(str(i), tuple(p.shape)) for i, p in enumerate(parameters)]
    x = torch.randn(options.batch, options.width)
    y = torch.randint(options.width, (options.batch,))

    def ascent(chosen: list[Tensor]) -> None:
        loss = F.cross_entropy(model(x), y)
        if chosen:
            masked_gradients(loss, chosen)

    def draw_mask(beta: float, count: int) -> list[Tensor]:
        mask = Bernoulli(beta).draw(units, seed=layers, count=count)
        return [p for p, m in zip(parameters, mask.perturbed, strict=True) if m]

    def flops(chosen: list[Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            ascent(chosen)
        return counter.get_total_flops()

    def seconds(chosen: list[Tensor]) -> float:
        start = time.process_time()  # excludes other work on the machine
        ascent(chosen)
        return time.process_time() - start

    whole_flops = flops(parameters)
    for _ in range(3):
        ascent(parameters)
    # Alternate between all tensors and each beta's mask. A mean of robust times over masks would
    # need many steps per mask; the median of sums over groups of masks is equally robust.
    group = 10
    sums: dict[float, list[float]] = {beta: [] for beta in (1.0, *betas)}
    counted = dict.fromkeys(betas, 0.0)
    for i in range(options.repeats):
        taken = dict.fromkeys(sums, 0.0)
        for j in range(group):
            taken[1.0] += seconds(parameters)
            for beta in betas:
                taken[beta] += seconds(draw_mask(beta, i * group + j))
        for beta, value in taken.items():
            sums[beta].append(value)
    for beta in betas:
        draws = [flops(draw_mask(beta, i)) for i in range(options.masks)]
        counted[beta] = 1 - statistics.mean(draws) / whole_flops
    rows = []
    for beta in betas:
        ratios = [a / b for a, b in zip(sums[beta], sums[1.0], strict=True)]
        rows.append(
            {
                "layers": layers,
                "beta": beta,
                "time_saved": 1 - statistics.median(ratios),
                "flops_saved": counted[beta],
            }
        )
    return rows


def _table(name: str, arguments: Sequence[str], *, bias: bool) -> None:
    """Measure, fit, write and draw."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--layers", nargs="+", type=count_number, default=[2, 4, 8, 16, 32], metavar="N")
    betas = [round(0.1 * i, 1) for i in range(1, 10)]
    add("--betas", nargs="+", type=whole_share, default=betas, metavar="BETA")
    add("--width", type=at_least(2), default=512, help="width of each layer (default: 512)")
    add("--batch", type=count_number, default=256, help="samples per pass (default: 256)")
    add("--repeats", type=count_number, default=15, help="timed groups of ten masks (default: 15)")
    add("--masks", type=count_number, default=200, help="masks to count FLOPs for (default: 200)")
    add("--threads", type=count_number, default=1, help="CPU threads (default: 1)")
    add("--out", type=Path, help="output folder (default: benchmarks/results/NAME)")
    add("--quick", action="store_true", help="a small version that takes seconds")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(
            layers=[2, 4, 8], betas=[0.2, 0.4, 0.6, 0.8], width=192, batch=96, repeats=4, masks=40
        )
        options = parser.parse_args(arguments)
    place = "benchmarks/out" if options.quick else "benchmarks/results"
    out = options.out or Path(place) / name
    torch.set_num_threads(options.threads)
    # In deep networks without normalisation, values are so small that CPUs become slow.
    torch.set_flush_denormal(True)
    rows: list[dict[str, Any]] = []
    for layers in options.layers:
        rows += _measure(layers, options.betas, options, bias=bias)
    fits = {
        kind: fit_savings(
            [r["layers"] for r in rows], [r["beta"] for r in rows], [r[kind] for r in rows]
        )
        for kind in ("time_saved", "flops_saved")
    }
    k1, k2 = SAVINGS_CONSTANTS[name]
    for row in rows:
        fit = fits["time_saved"]
        row["fitted"] = savings(row["layers"], row["beta"], k1=fit.k1, k2=fit.k2)
        row["paper"] = savings(row["layers"], row["beta"], k1=k1, k2=k2)
    biases = "K = 2: one bias per layer" if bias else "K = 1: no biases"
    title = f"Table {name[-1]}: share of an ascent pass that SWP saves ({biases})"
    write_tables(out, name, title, COLUMNS, _cells(name, rows))
    constants = _constants(name, fits)
    columns = ("fit to", "k1", "k2", "residual")
    write_tables(out, f"{name}-fit", f"{title}: the constants", columns, constants)
    found = {"rows": rows, "fits": {k: dataclasses.asdict(f) for k, f in fits.items()}}
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    write_json(out / f"{name}.json", {"title": title, "options": settings, **found, **provenance()})
    _draw(out / f"{name}.png", title, rows, fits)


def _cells(name: str, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the measured rows beside the printed values, then the printed rows without ours."""
    printed = {(n, beta): g for n, row in SAVINGS[name].items() for beta, g in row.items()}
    cells = []
    for r in rows:
        values = [f"{r[k]:.3f}" for k in ("time_saved", "flops_saved", "fitted", "paper")]
        g = printed.pop((r["layers"], r["beta"]), None)
        cells.append([str(r["layers"]), f"{r['beta']:g}", *values, "" if g is None else f"{g:.4f}"])
    k1, k2 = SAVINGS_CONSTANTS[name]
    for (n, beta), g in printed.items():
        fit = f"{savings(n, beta, k1=k1, k2=k2):.3f}"
        cells.append([str(n), f"{beta:g}", "not yet measured", "", "", fit, f"{g:.4f}"])
    return cells


def _constants(name: str, fits: dict[str, SavingsFit]) -> list[list[str]]:
    """Return the rows of k1, k2 and the residual: ours, and the paper's."""
    ours = [("time", fits["time_saved"]), ("FLOPs", fits["flops_saved"])]
    rows = [
        [
            label,
            f"{fit.k1:.4f} ± {fit.k1_error:.4f}",
            f"{fit.k2:.4f} ± {fit.k2_error:.4f}",
            f"{fit.residual:.4f}",
        ]
        for label, fit in (*ours, ("the paper's printed rows", printed_fit(name)))
    ]
    k1, k2 = SAVINGS_CONSTANTS[name]
    return [*rows, ["the paper, of all its rows", f"{k1:.4f}", f"{k2:.4f}", ""]]


def _draw(path: Path, title: str, rows: list[dict[str, Any]], fits: dict[str, SavingsFit]) -> None:
    """Draw the measured savings by beta, one colour per depth, with the fitted curves."""
    figure, axes = panels(2, width=5.5)
    depths = sorted({r["layers"] for r in rows})
    fine = [i / 50 for i in range(5, 51)]
    for axis, kind, what in ((axes[0], "time_saved", "time"), (axes[1], "flops_saved", "FLOPs")):
        fit = fits[kind]
        for i, n in enumerate(depths):
            chosen = [r for r in rows if r["layers"] == n]
            colour = COLOURS[i % len(COLOURS)]
            x, y = [r["beta"] for r in chosen], [r[kind] for r in chosen]
            axis.plot(x, y, MARKERS[i % len(MARKERS)], color=colour, label=f"N = {n}, measured")
            curve = [savings(n, b, k1=fit.k1, k2=fit.k2) for b in fine]
            axis.plot(fine, curve, color=colour, alpha=0.6, label=f"N = {n}, fitted")
        axis.set(title=f"{what}: k1 = {fit.k1:.3f}, k2 = {fit.k2:.3f}", xlabel="beta")
        axis.set_ylabel(f"share of the {what} saved")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, path)


def table4(arguments: Sequence[str] = ()) -> None:
    """One tensor per layer."""
    _table("table4", arguments, bias=False)


def table5(arguments: Sequence[str] = ()) -> None:
    """Two tensors per layer."""
    _table("table5", arguments, bias=True)
