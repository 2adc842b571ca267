"""`fit` on two ranks that torchrun starts; see launch.py."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from esam_torch import ESAM, accuracy, fit


def data(n):
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def trained(folder, kind="esam", epochs=3, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = ESAM(base, model) if kind == "esam" else base

    def losses(model, inputs, targets):
        outputs = model(inputs)
        return F.cross_entropy(outputs, targets, reduction="none"), outputs

    history = fit(
        *(model, optimizer, losses, DataLoader(data(53), 8, shuffle=True)),
        epochs=epochs,
        eval_loader=DataLoader(data(31), 8),
        metrics={"accuracy": accuracy},
        accumulate=2,
        device="cpu",
        folder=folder,
        progress="plain",
        title=kind + " ",
        **options,
    )
    weights = b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
    rows = [
        {k: v for k, v in row.items() if k[:7] not in ("seconds", "samples")} for row in history
    ]
    # By hand, on all samples together: the ranks' shares must add up to this.
    model.eval()
    inputs, targets = data(31).tensors
    with torch.no_grad():
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets).item()
        share = (outputs.argmax(1) == targets).float().mean().item()
    return {
        "bits": hashlib.sha256(weights).hexdigest(),
        "rows": rows,
        "loss": loss,
        "accuracy": share,
        "wrapped": isinstance(optimizer.model, nn.parallel.DistributedDataParallel)
        if kind == "esam"
        else False,
    }


class Stream(IterableDataset):
    """The numbers from 0 to 7, those of this rank or all."""

    def __init__(self, *share):
        self.share = share or (None,)

    def __iter__(self):
        return ((torch.full((6,), float(i)), i % 3) for i in list(range(8))[slice(*self.share)])


class Share:
    """Not a DataLoader, so it is this rank's share."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def seen(loader, seed=0):
    """Return the numbers that one epoch of training sees on this rank."""
    torch.manual_seed(seed)
    model, numbers = nn.Linear(6, 3), []

    def losses(model, inputs, targets):
        numbers.extend(inputs[:, 0].int().tolist())
        return F.cross_entropy(model(inputs), targets, reduction="none")

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, base, losses, loader, epochs=1, device="cpu", progress=False)
    return numbers


def orders():
    """The samples that this rank sees with two seeds, and with a generator of its own."""
    inputs = torch.arange(16.0).repeat(6, 1).T.contiguous()
    numbers = TensorDataset(inputs, torch.arange(16) % 3)
    own = torch.Generator().manual_seed(torch.distributed.get_rank())
    return [
        *(seen(DataLoader(numbers, 4, shuffle=True), seed) for seed in (1, 2, 2)),
        seen(DataLoader(numbers, 4, shuffle=True, generator=own)),
        seen(DataLoader(numbers, batch_size=None, shuffle=True, collate_fn=one)),
    ]


def one(sample):
    return [x[None] for x in sample]


def orders_of_an_iterable():
    try:
        seen(DataLoader(Stream(), 4))
    except TypeError as error:
        refused = str(error)
    share = Stream(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
    return refused, seen(Share(DataLoader(share, 4)))


def tiny_evaluation():
    """With fewer samples than ranks, or none."""
    torch.manual_seed(0)
    model, found = nn.Linear(6, 3), []

    def losses(model, inputs, targets):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    for n in (1, 0):
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        try:
            history = fit(
                *(model, base, losses, DataLoader(data(16), 8)),
                eval_loader=DataLoader(data(n), 8),
                epochs=1,
                device="cpu",
                progress=False,
            )
            found.append(history.last["eval_loss"])
        except ValueError as error:
            found.append(str(error))
    model.eval()
    return [*found, losses(model, *data(1).tensors).item()]


def reduced(accumulate, bad=None, **options):
    """Train on six batches of this rank; return the number of reductions, and a hash."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model = nn.parallel.DistributedDataParallel(bare)
    calls = []

    def hook(process_group, bucket):
        calls.append(bucket.is_last())
        return default_hooks.allreduce_hook(process_group, bucket)

    model.register_comm_hook(None, hook)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
    inputs, targets = data(48 + torch.distributed.get_rank()).tensors
    batches = [[inputs[8 * i : 8 * i + 8], targets[8 * i : 8 * i + 8]] for i in range(6)]
    if bad is not None and torch.distributed.get_rank() == 0:
        batches[bad][0] = batches[bad][0] * torch.nan
    fit(
        *(model, optimizer, lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"), batches),
        epochs=1,
        accumulate=accumulate,
        device="cpu",
        progress=False,
    )
    weights = b"".join(p.detach().numpy().tobytes() for p in bare.parameters())
    return [sum(calls), hashlib.sha256(weights).hexdigest()]


def ended(folder, *stopping):
    """End training after the second of three epochs on these ranks; return what each rank sees."""

    def on_epoch(row):
        if row["epoch"] == 2 and torch.distributed.get_rank() in stopping:
            raise StopIteration

    try:
        trained(folder, on_epoch=on_epoch)
    except Exception as error:
        last = torch.load(folder / "last.pt", weights_only=True)
        return [type(error).__name__, str(error), last["epoch"], len(last["history"])]


def resumed_without_a_shared_folder(folder):
    own = folder / str(torch.distributed.get_rank())
    trained(own, epochs=1)
    try:
        trained(own, resume=True)
    except ValueError as error:
        return str(error)


def sharded_base(folder):
    """With a base optimizer whose state is sharded over the ranks: whole, and resumed."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # some versions warn of torch.jit

    def run(where, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        fit(
            *(model, ESAM(base, model), losses, DataLoader(data(32), 8, shuffle=True)),
            device="cpu",
            folder=folder / where,
            progress=False,
            **options,
        )
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))

    def losses(model, inputs, targets):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    whole = run("whole", epochs=3)
    run("parts", epochs=1)
    return [whole.hexdigest(), run("parts", epochs=3, resume=True).hexdigest()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    found = {
        "esam": trained(folder / "esam"),
        "sgd": trained(folder / "sgd", "sgd"),
        "first": trained(folder / "resumed", epochs=1),
        "resumed": trained(folder / "resumed", resume=True, seed=5),
        "reduced": reduced(3),
        "orders": orders(),
        "iterable": orders_of_an_iterable(),
        "tiny": tiny_evaluation(),
        "skipped first": reduced(3, bad=0, on_nonfinite="skip"),
        "skipped last": reduced(3, bad=5, on_nonfinite="skip"),
        "ended by all": ended(folder / "ended by all", 0, 1),
        "ended by one": ended(folder / "ended by one", 1),
        "not shared": resumed_without_a_shared_folder(folder / "not shared"),
        "sharded base": sharded_base(folder / "sharded base"),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
