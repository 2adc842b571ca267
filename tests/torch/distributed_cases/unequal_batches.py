"""Cases for two ranks whose batches differ so much that only one of them leaves samples out."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from equations import step_by_hand
from fsdp import RHO, batch_of, gap, losses_of, plain, sgd, sharded, weights
from launch import SHARDS_ON_CPUS, main

from esam_torch import ESAM, Batch, Everything, Part, Previous, TopIncrease, TopLoss

STEPS = 3

#: Each with the batch sizes of the ranks, after a first step with eight samples on both.
SETTINGS = {
    "increase": (Batch(), TopIncrease(0.5), (8, 1)),
    "increase, nearly all": (Batch(), TopIncrease(0.9), (16, 4)),
    "loss": (Batch(), TopLoss(0.5), (8, 1)),
    "part and increase": (Part(0.5), TopIncrease(0.5), (8, 1)),
    "part and loss": (Part(0.5), TopLoss(0.5), (8, 1)),
    "part, nearly all": (Part(0.5), TopIncrease(0.9), (16, 4)),
    "previous and increase": (Previous(), TopIncrease(0.5), (8, 1)),
    "previous and loss": (Previous(), TopLoss(0.5), (8, 1)),
}


def case_sharded():
    """The same weights as from the equations, whichever passes a rank needs for its own batch."""
    if not SHARDS_ON_CPUS:
        return {}
    found = {}
    for name, (ascend, select, sizes) in SETTINGS.items():
        model, twin = sharded(), plain()
        optimizer = ESAM(
            sgd(model), model, rho=RHO, perturb=Everything(), ascend=ascend, select=select
        )
        base, previous, gaps = sgd(twin), None, []
        for step in range(STEPS):
            now = sizes if step else (8, 8)
            batch = batch_of(dist.get_rank(), step, now[dist.get_rank()])
            optimizer.step(losses_of(model), *batch)
            batches = [batch_of(r, step, size) for r, size in enumerate(now)]
            previous, _ = step_by_hand(
                *(twin, losses_of(twin), batches),
                ascend=ascend,
                select=select,
                radius=RHO,
                count=step,
                previous=previous,
            )
            for parameter, g in zip(twin.parameters(), previous, strict=True):
                parameter.grad = g
            base.step()
            gaps.append(gap(weights(model), weights(twin)))
        found[name] = gaps
    return found


class Waiting(nn.SyncBatchNorm):
    """Waits for the other ranks in each forward in training, as SyncBatchNorm does on a GPU."""

    def forward(self, x):
        if self.training:
            self.calls = getattr(self, "calls", 0) + 1
            dist.all_reduce(torch.tensor(self.calls))
        return x * self.weight + self.bias


def case_synchronised():
    """Under DistributedDataParallel with such a layer, both ranks run the same passes."""
    rank, found = dist.get_rank(), {}
    for name, (ascend, select, sizes) in SETTINGS.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        model = DistributedDataParallel(net)
        layer = net[1]
        layer.__class__, layer.process_group = Waiting, None  # the wrapper refuses it on a CPU
        optimizer = ESAM(
            sgd(model), model, rho=RHO, perturb=Everything(), ascend=ascend, select=select
        )
        calls = []
        for step in range(STEPS):
            optimizer.step(losses_of(model), *batch_of(rank, step, sizes[rank] if step else 8))
            calls.append(layer.calls)
        found[name] = calls
    return found


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
