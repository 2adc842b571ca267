"""Train with four methods from the same initial weights, and compare cost and result."""

import copy
import sys

import torch
from benchmarks.data.batches import Batches
from rich import box
from rich.console import Console
from rich.table import Table
from torch.optim.lr_scheduler import CosineAnnealingLR

from demo.images import Epochs, Tests, load
from demo.measures import RADIUS, costs, sharpness
from demo.methods import choices, losses, make
from demo.network import Network
from demo.options import Options, parse
from demo.pictures import draw_curves, draw_landscapes, landscape
from esam_torch import History, accuracy, fit

#: Samples per step.
BATCH = 64


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    options = parse(arguments)
    # The network is small: several threads would wait for each other more than they help.
    torch.set_num_threads(options.threads)
    console = Console()
    data = load(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    batches = Batches(data, batch=BATCH, seed=options.seed, device=options.device)
    console.print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images, "
        f"{data.classes} classes; epochs with each method: {options.epochs}"
    )
    if options.device == "cpu" and len(data.train) > 10_000:
        console.print(
            "On a CPU, this many images take hours: use --device cuda, or fewer --epochs."
        )
    torch.manual_seed(options.seed)
    start = Network(data.shape[0], data.classes).to(options.device)
    models, histories = {}, {}
    for name, chosen in choices(options).items():
        models[name] = copy.deepcopy(start)
        optimizer = make(models[name], chosen, options)
        torch.manual_seed(options.seed)
        histories[name] = fit(
            models[name],
            optimizer,
            losses,
            Epochs(batches),
            epochs=options.epochs,
            eval_loader=Tests(batches),
            metrics={"accuracy": accuracy},
            scheduler=CosineAnnealingLR(optimizer, options.epochs),
            device=options.device,
            title=f"{name:<13}",
        )
    x, y = next(batches.epoch(1))
    with console.status("Timing interleaved steps and counting their FLOPs"):
        prices = costs(start, x, y, options)
    x, y = (torch.cat(parts) for parts in zip(*batches.epoch(1), strict=True))
    x, y = x[:1024], y[:1024]
    rises = {name: sharpness(model, x, y) for name, model in models.items()}
    with console.status("Evaluating the loss around the minima"):
        # A quarter of the images is enough for a picture.
        grids = {
            name: landscape(model, x[:256], y[:256], options.seed) for name, model in models.items()
        }
    draw_curves(histories, options.out / "curves.png")
    draw_landscapes(grids, options.out / "landscapes.png")
    console.print(_table(histories, prices, rises, options))
    console.print(f"Pictures: {options.out / 'curves.png'}, {options.out / 'landscapes.png'}")


def _table(
    histories: dict[str, History],
    prices: dict[str, dict[str, float]],
    rises: dict[str, float],
    options: Options,
) -> Table:
    """Return the demo's table."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=f"seed {options.seed}, {options.epochs} epochs, batch {BATCH}, rho {options.rho}, "
        f"beta {options.beta}, gamma {options.gamma}. Time (median step) and FLOPs (counted, and "
        "predicted by the cost model) are relative to SGD. Sharpness: increase of the training "
        f"loss at distance {RADIUS} along its gradient. Suffix, Part: perturbs the last half of "
        "the network, along the gradient of a quarter of the batch.",
    )
    for title in ("method", "best", "final", "images/s", "time", "FLOPs", "predicted", "sharpness"):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for name, history in histories.items():
        found, price = history["eval_accuracy"], prices[name]
        table.add_row(
            name,
            f"{max(found):.1%}",
            f"{found[-1]:.1%}",
            f"{BATCH / price['seconds']:,.0f}",
            f"{price['seconds'] / prices['SGD']['seconds']:.2f}",
            f"{price['flops']:.2f}",
            f"{price['predicted']:.2f}",
            f"{rises[name]:.4f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
