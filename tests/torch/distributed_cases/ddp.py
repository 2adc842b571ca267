"""Cases for two ranks under DistributedDataParallel; see launch.py."""

import contextlib
import copy
import hashlib
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from launch import main

from esam_core import NonFiniteError
from esam_torch import ESAM, All, Every, Everything, Suffix, TopIncrease
from esam_torch.guards import statistics_layers

WORLD = 2


def model_of(batchnorm=True):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)]
    if batchnorm:
        layers.insert(1, nn.BatchNorm1d(12))
    return nn.Sequential(*layers)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch_of(rank, step, size=8):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(size, 6, generator=generator)
    return inputs, torch.randint(3, (size,), generator=generator)


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def counted(model):
    """Count the reductions of a DDP model."""
    counts = []

    def hook(state, bucket):
        if bucket.is_last():  # a reduction has one bucket or several
            counts.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    return counts


def bits(model):
    """Return a hash of the exact weights."""
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(data).hexdigest()


def gap(model, twin):
    """Return the largest difference between two models' weights."""
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def by_hand(model, steps, sizes, **options):
    """Train without DDP, on the average of all ranks' ESAM gradients."""
    base = sgd(model)
    replicas = [copy.deepcopy(model) for _ in range(WORLD)]
    optimizers = [ESAM(sgd(replica), replica, **options) for replica in replicas]
    for step in range(steps):
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            optimizer.zero_grad()
            with torch.no_grad():
                for mine, theirs in zip(replica.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)
            optimizer.backward(losses_of(replica), *batch_of(rank, step, sizes[rank]))
        for parts in zip(model.parameters(), *(r.parameters() for r in replicas), strict=True):
            parameter, *theirs = parts
            parameter.grad = sum(p.grad for p in theirs) / WORLD
        base.step()
    return model


def trained(steps=8, sizes=(8, 8), ddp=None, batchnorm=True, **options):
    """Train under DDP; return the model, its reductions and the reports."""
    rank = dist.get_rank()
    model = DistributedDataParallel(model_of(batchnorm), **(ddp or {}))
    counts = counted(model)
    optimizer = ESAM(sgd(model), model, **options)
    reports = [
        optimizer.step(losses_of(model), *batch_of(rank, step, sizes[rank]))
        for step in range(steps)
    ]
    return model, counts, reports


OPTIONS = {
    "esam": {},
    "sam": {"perturb": Everything(), "select": All()},
    "suffix": {"perturb": Suffix("3"), "gamma": 0.5},
    "suffix_all": {"perturb": Suffix("3"), "select": All()},
    "interval": {"perturb": Every(2, Everything())},
    "full": {"gamma": 0.3, "norm": "full"},
}


def case_many_steps():
    """Each kind of step: weights on both ranks, reductions per step, distance to the average."""
    found = {}
    for name, options in OPTIONS.items():
        steps = 25 if name == "esam" else 6
        model, counts, reports = trained(steps, **options)
        twin = by_hand(model_of(), steps, (8, 8), **options)
        found[name] = {
            "bits": bits(model),
            "reductions": len(counts) / steps,
            "gap": gap(model.module, twin),
            "indices": [r.indices.tolist() for r in reports if r.indices is not None],
        }
    return found


def case_uneven_batches():
    """Different batch sizes and k on each rank; one selected sample with BatchNorm."""
    found = []
    for sizes, batchnorm in (((8, 5), True), ((7, 2), False), ((2, 9), True)):
        model, counts, reports = trained(5, sizes, batchnorm=batchnorm)
        twin = by_hand(model_of(batchnorm), 5, sizes)
        found.append(
            {
                "bits": bits(model),
                "gap": None if 2 in sizes and batchnorm else gap(model.module, twin),
                "reductions": len(counts) / 5,
                "selected": len(reports[-1].indices),
            }
        )
    return found


def case_nonfinite():
    """One rank's loss is not a number in the second of four steps, in all three modes."""
    rank, found = dist.get_rank(), {}
    for mode in ("propagate", "skip", "raise"):
        model = DistributedDataParallel(model_of())
        optimizer = ESAM(sgd(model), model, on_nonfinite=mode, gamma=0.4)
        skipped, raised, finite, intact = [], [], [], []

        for step in range(4):
            inputs, targets = batch_of(rank, step)
            if step == 1 and rank == 1:
                inputs[3] = torch.nan
            optimizer.zero_grad()
            before = bits(model.module)
            try:
                report = optimizer.backward(losses_of(model), inputs, targets)
                skipped.append(report.skipped)
                raised.append(False)
            except NonFiniteError:
                skipped.append(False)
                raised.append(True)
            intact.append(bits(model.module) == before)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            finite.append(bool(gradients) and all(g.isfinite().all().item() for g in gradients))
            if finite[-1]:
                optimizer.step()
        found[mode] = {
            "bits": bits(model),
            "skipped": skipped,
            "raised": raised,
            "finite": finite,
            "intact": intact,
        }
    return found


def case_accumulation():
    """Two micro-batches per step, the first under no_sync: one reduction, gradients add up."""
    rank = dist.get_rank()
    model = DistributedDataParallel(model_of())
    counts = counted(model)
    optimizer = ESAM(sgd(model), model, on_nonfinite="skip")
    gradients, skipped = [], []
    for update in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            with model.no_sync() if micro == 0 else contextlib.nullcontext():
                batch = batch_of(rank, 10 * update + micro)
                if update == 2 and micro == 0 and rank == 0:
                    batch[0][0] = torch.inf
                report = optimizer.backward(losses_of(model), *batch)
                skipped.append(report.skipped)
        gradients.append([p.grad.clone() for p in model.parameters()])
        if update == 0:  # the same by hand, at the same weights
            parts = []
            for other in range(WORLD):
                replica = model_of()
                twin = ESAM(sgd(replica), replica)
                for micro in range(2):
                    twin.backward(losses_of(replica), *batch_of(other, micro))
                parts.append([p.grad for p in replica.parameters()])
            averages = [sum(g) / WORLD for g in zip(*parts, strict=True)]
            distance = max(
                (a - b).abs().max().item() for a, b in zip(gradients[0], averages, strict=True)
            )
        optimizer.step()
    return {
        "bits": bits(model),
        "reductions": len(counts),
        "distance": distance,
        "skipped": skipped,
    }


def case_join():
    """One rank has fewer batches than the other, under DDP's own join()."""
    rank = dist.get_rank()
    model = DistributedDataParallel(model_of())
    optimizer = ESAM(sgd(model), model)
    with model.join(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3 + 2 * rank):
            optimizer.step(losses_of(model), *batch_of(rank, step))
    return {"bits": bits(model), "count": optimizer.count}


def case_fault():
    """Both ranks fail in the descent pass; the weights are intact and training continues."""
    rank = dist.get_rank()
    model = DistributedDataParallel(model_of())
    optimizer = ESAM(sgd(model), model)
    optimizer.step(losses_of(model), *batch_of(rank, 0))
    before, passes = bits(model), []

    def failing(x, y):
        values = losses_of(model)(x, y)
        passes.append(len(x))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return values

    optimizer.zero_grad()
    with contextlib.suppress(KeyboardInterrupt):
        optimizer.backward(failing, *batch_of(rank, 1))
    intact = bits(model) == before and all(p.grad is None for p in model.parameters())
    optimizer.zero_grad()
    for step in range(2, 5):
        optimizer.step(losses_of(model), *batch_of(rank, step))
    return {"intact": intact, "passes": passes, "bits": bits(model)}


class Unused(nn.Module):
    """Has a parameter that the forward does not use."""

    def __init__(self):
        super().__init__()
        self.body = model_of()
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)


def case_options_of_ddp():
    """DDP's own options, and torch.compile around it."""
    rank, found = dist.get_rank(), {}
    options = {
        "views": {"gradient_as_bucket_view": True},
        "buckets": {"bucket_cap_mb": 0.0001},
        "no_buffers": {"broadcast_buffers": False},
    }
    reference = trained(6)[0]
    for name, chosen in options.items():
        model, counts, _ = trained(6, ddp=chosen)
        found[name] = {
            "bits": bits(model),
            "gap": gap(model, reference),
            "reductions": len(counts) / 6,
        }
    try:
        trained(1, ddp={"static_graph": True})
    except RuntimeError as error:
        found["static"] = str(error)
    torch.manual_seed(0)
    model = DistributedDataParallel(Unused(), find_unused_parameters=True)
    optimizer = ESAM(sgd(model), model)
    for step in range(6):
        optimizer.step(losses_of(model), *batch_of(rank, step))
    found["unused"] = {"bits": bits(model), "gap": gap(model.module.body, reference.module)}
    model = DistributedDataParallel(model_of())
    counts = counted(model)
    compiled = torch.compile(model, backend="eager")
    optimizer = ESAM(sgd(model), compiled, select=TopIncrease(0.5))
    for step in range(6):
        optimizer.step(losses_of(compiled), *batch_of(rank, step))
    found["compiled"] = {
        "bits": bits(model),
        "gap": gap(model, reference),
        "reductions": len(counts) / 6,
    }
    return found


def case_losses():
    """`loss.backward()` in two micro-batches, with parameters that the forward does not use."""
    rank, found = dist.get_rank(), {}
    for name in ("esam", "sam"):
        torch.manual_seed(0)
        model = DistributedDataParallel(Unused(), find_unused_parameters=True)
        counts = counted(model)
        optimizer = ESAM(sgd(model), model, **OPTIONS[name])
        for update in range(4):
            optimizer.zero_grad()
            for micro in range(2):
                with model.no_sync() if micro == 0 else contextlib.nullcontext():
                    loss = optimizer.loss(losses_of(model), *batch_of(rank, 10 * update + micro))
                    (loss / 2).backward()
            if update == 0:  # the same by hand, at the same weights
                parts = []
                for other in range(WORLD):
                    replica = model_of()
                    twin = ESAM(sgd(replica), replica, **OPTIONS[name])
                    for micro in range(2):
                        (twin.loss(losses_of(replica), *batch_of(other, micro)) / 2).backward()
                    parts.append([p.grad for p in replica.parameters()])
                rows = zip(model.module.body.parameters(), *parts, strict=True)
                distance = max((p.grad - sum(g) / WORLD).abs().max().item() for p, *g in rows)
            optimizer.step()
        spare = [p.grad for p in model.module.spare.parameters()]
        found[name] = {
            "bits": bits(model),
            "reductions": len(counts),
            "distance": distance,
            "spare": all(g is None or not g.any() for g in spare),
            "count": optimizer.count,
        }
    return found


def case_buffers():
    """BatchNorm's statistics are rank 0's after a forward of each step, and updated once."""
    rank = dist.get_rank()
    model, _, _ = trained(4)
    model.eval()
    batches = model.module[1].num_batches_tracked.item()
    # DDP sends rank 0's buffers at the next forward that it synchronises.
    model.train()
    model(batch_of(rank, 0)[0]).sum().backward()
    return {"batches": batches}


def case_synchronised_statistics():
    """SyncBatchNorm does not run on a CPU, so this only checks which layers are affected."""
    layers = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3))
    return [type(layer).__name__ for layer in statistics_layers(layers)]


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
