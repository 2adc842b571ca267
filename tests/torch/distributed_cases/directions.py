"""Cases for ascent directions on two ranks; see launch.py."""

import copy
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import fsdp
from ddp import WORLD, batch_of, bits, counted, gap, losses_of, model_of, sgd
from launch import main

from esam_core.directions import climbing_indices
from esam_torch import (
    ESAM,
    All,
    DistributedState,
    Everything,
    Momentum,
    Part,
    Previous,
    Suffix,
    TopIncrease,
)

SOURCES = {"part": Part(0.5), "previous": Previous(), "momentum": Momentum()}
OPTIONS = {
    "all samples": {"select": All()},
    "top increase": {"select": TopIncrease(0.5)},
    "suffix": {"perturb": Suffix("3"), "select": All()},
}


def by_hand(model, steps, **options):
    """Train without DDP on the ranks' mean gradient, which is also the next direction."""
    base = sgd(model)
    replicas = [copy.deepcopy(model) for _ in range(WORLD)]
    optimizers = [ESAM(sgd(replica), replica, **options) for replica in replicas]
    for step in range(steps):
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            optimizer.zero_grad()
            with torch.no_grad():
                for mine, theirs in zip(replica.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)
                    state = base.state.get(theirs)
                    if state:
                        moment = state["momentum_buffer"].clone()
                        optimizer.state[mine] = {"momentum_buffer": moment}
            optimizer.backward(losses_of(replica), *batch_of(rank, step))
        for parts in zip(model.parameters(), *(r.parameters() for r in replicas), strict=True):
            parameter, *theirs = parts
            parameter.grad = sum(p.grad for p in theirs) / WORLD
            for p in theirs:
                p.grad = parameter.grad.clone()
        for optimizer in optimizers:
            run = optimizer._run
            run.memory.record_update(run._layout, run.config)
        base.step()
    return model


def case_replicas():
    """Weights on both ranks, reductions per step, distance to the average of single ranks."""
    rank, found, steps = dist.get_rank(), {}, 5
    for name, ascend in SOURCES.items():
        for kind, options in OPTIONS.items():
            for unused in (False, True):
                settings = {"rho": 0.2, "perturb": Everything(), "ascend": ascend, **options}
                model = DistributedDataParallel(model_of(), find_unused_parameters=unused)
                counts = counted(model)
                optimizer = ESAM(sgd(model), model, **settings)
                parts = []
                for step in range(steps):
                    report = optimizer.step(losses_of(model), *batch_of(rank, step))
                    parts.append(None if report.part is None else report.part.tolist())
                twin = by_hand(model_of(), steps, **settings)
                found[f"{name}, {kind}, {unused}"] = {
                    "bits": bits(model),
                    "reductions": len(counts) / steps,
                    "gap": gap(model.module, twin),
                    "parts": parts,
                    "direction": {
                        n: g.sum().item() for n, g in optimizer._run.memory.gradients.items()
                    },
                }
    return found


def case_accumulation():
    """Two batches per update, the first under no_sync: one reduction, and equal models."""
    rank, found = dist.get_rank(), {}
    for name, ascend in SOURCES.items():
        model = DistributedDataParallel(model_of())
        counts = counted(model)
        optimizer = ESAM(sgd(model), model, rho=0.2, beta=1.0, gamma=1.0, ascend=ascend)
        for update in range(3):
            optimizer.zero_grad()
            with model.no_sync():
                (optimizer.loss(losses_of(model), *batch_of(rank, 2 * update)) / 2).backward()
            (optimizer.loss(losses_of(model), *batch_of(rank, 2 * update + 1)) / 2).backward()
            optimizer.step()
        found[name] = {"bits": bits(model), "reductions": len(counts)}
    return found


def sharded_by_hand(model, step, ascend, before):
    """Return the gradient of one step on an unsharded model, computed from the equations."""
    parameters = list(model.parameters())
    batches = [fsdp.batch_of(rank, step) for rank in range(WORLD)]

    def gradient(batches):
        rows = [
            torch.autograd.grad(fsdp.losses_of(model)(*batch).mean(), parameters)
            for batch in batches
        ]
        return [sum(column) / WORLD for column in zip(*rows, strict=True)]

    direction = before
    if isinstance(ascend, Part):
        drawn = torch.from_numpy(climbing_indices(ascend, 8, seed=0, count=step))
        direction = gradient([(x[drawn], y[drawn]) for x, y in batches])
    if direction is None:
        return gradient(batches)
    length = torch.stack([d.norm() for d in direction]).norm()
    theta = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p += 0.1 * d / length
    found = gradient(batches)
    with torch.no_grad():
        for p, start in zip(parameters, theta, strict=True):
            p.copy_(start)
    return found


def case_distributed_moments():
    """A base optimizer that keeps the momenta of half of the parameters on each rank."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    rank, found = dist.get_rank(), {}
    for name, ascend in SOURCES.items():
        weights = []
        for base in (torch.optim.SGD, ZeroRedundancyOptimizer):
            model = DistributedDataParallel(model_of())
            options = {} if base is torch.optim.SGD else {"optimizer_class": torch.optim.SGD}
            momentum = base(model.parameters(), lr=0.1, momentum=0.9, **options)
            try:
                optimizer = ESAM(momentum, model, rho=0.2, perturb=Everything(), ascend=ascend)
            except ValueError as error:
                weights.append(str(error))
                continue
            for step in range(4):
                optimizer.step(losses_of(model), *batch_of(rank, step))
            weights.append(bits(model))
        found[name] = weights[1] if name == "momentum" else weights[0] == weights[1]
    return found


def case_sharded():
    """FSDP2: one perturbation on all ranks, from the global direction."""
    rank, found = dist.get_rank(), {}
    for name, ascend in SOURCES.items():
        model, twin = fsdp.sharded(), fsdp.plain()
        base = fsdp.sgd(twin)
        optimizer = ESAM(
            fsdp.sgd(model), model, rho=0.1, beta=1.0, gamma=1.0, ascend=ascend, seed=0
        )
        before, gaps, intact = None, [], []
        for step in range(4):
            if name == "momentum" and step:
                before = [-base.state[p]["momentum_buffer"] for p in twin.parameters()]
            gradient = sharded_by_hand(twin, step, ascend, before)
            for p, g in zip(twin.parameters(), gradient, strict=True):
                p.grad = g
            base.step()
            if name == "previous":
                before = gradient
            optimizer.zero_grad()
            start = fsdp.weights(model)
            optimizer.loss(fsdp.losses_of(model), *fsdp.batch_of(rank, step)).backward()
            intact.append(fsdp.same(fsdp.weights(model), start))
            optimizer.step()
            gaps.append(fsdp.gap(fsdp.weights(model), list(twin.parameters())))
        found[name] = {"gap": max(gaps), "intact": intact}
    return found


def case_checkpoints():
    """Saved by torch.distributed.checkpoint and loaded into new objects: the run resumes."""
    rank, found = dist.get_rank(), {}
    for name, ascend in SOURCES.items():
        for kind in ("sharded", "replicas"):

            def fresh(kind=kind, ascend=ascend):
                torch.manual_seed(0)
                model = (
                    fsdp.sharded() if kind == "sharded" else DistributedDataParallel(fsdp.plain())
                )
                optimizer = ESAM(
                    fsdp.sgd(model), model, rho=0.2, perturb=Suffix("norm"), ascend=ascend
                )
                return model, optimizer

            def go_on(model, optimizer, first, last):
                for step in range(first, last):
                    optimizer.step(fsdp.losses_of(model), *fsdp.batch_of(rank, step))

            model, optimizer = fresh()
            go_on(model, optimizer, 0, 3)
            folder = os.path.join(sys.argv[1], f"{name}-{kind}")
            dcp.save({"run": DistributedState(model, optimizer)}, checkpoint_id=folder)
            go_on(model, optimizer, 3, 6)
            twin, other = fresh()
            dcp.load({"run": DistributedState(twin, other)}, checkpoint_id=folder)
            go_on(twin, other, 3, 6)
            found[f"{name}, {kind}"] = {
                "same": fsdp.same(fsdp.weights(twin), fsdp.weights(model)),
                "count": other.count,
            }
    return found


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
