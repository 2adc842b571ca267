"""Cases for four ranks, two by two: data parallel by tensor parallel; see launch.py."""

import contextlib
import copy
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from launch import SHARDS_ON_CPUS, main

from esam_torch import (
    ESAM,
    All,
    Bernoulli,
    DistributedState,
    Everything,
    Momentum,
    Part,
    Previous,
    Proportional,
    Random,
    Suffix,
    TopIncrease,
    fit,
)

RHO = 0.3
KINDS = ("columns and rows", "sequences", *(("with FSDP2",) if SHARDS_ON_CPUS else ()))


def mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layers"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Reads sequences of four vectors; its last layer has an odd number of outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.norm(self.blocks(self.first(x)))).mean(1)


def plain():
    torch.manual_seed(0)
    return Net()


def parallel(kind):
    """Return the same network, split over ranks. Gradients of its norms may be partial sums."""
    model, both = plain(), mesh()
    if kind == "columns and rows":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    else:
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        ends = {
            "first": ColwiseParallel(output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "last": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, both["layers"], ends)
    for block in model.blocks:
        parallelize_module(block, both["layers"], plan)
        if kind == "with FSDP2":
            fully_shard(block, mesh=both["data"])
    return fully_shard(model, mesh=both["data"]) if kind == "with FSDP2" else model


def batch_of(step, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    inputs = torch.randn(8, 4, 6, generator=generator)
    return inputs, torch.randint(5, (8,), generator=generator)


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def shards(model):
    return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]


def gap(model, twin):
    whole = [getattr(p, "full_tensor", p.detach)() for p in model.parameters()]
    return max(float((a - b).abs().max()) for a, b in zip(whole, twin.parameters(), strict=True))


OPTIONS = {
    "sam": {"perturb": Everything(), "select": All()},
    "paper": {},
    "single_weights": {"perturb": Bernoulli(0.5, unit="weight"), "select": All()},
    "adaptive": {"beta": 0.6, "adaptive": True},
    "estimated": {"beta": 0.6, "norm": "estimated"},
    "full": {"beta": 0.6, "norm": "full"},
    "suffix": {"perturb": Suffix(0.5), "select": All(), "ascend": Part(0.25)},
    "proportional": {"perturb": Suffix(0.5), "select": Proportional(0.5)},
    "random": {"perturb": Everything(), "select": Random(0.5), "ascend": Part(0.5)},
    "previous": {"perturb": Everything(), "ascend": Previous()},
    "momentum": {"perturb": Everything(), "select": All(), "ascend": Momentum()},
}


def case_like_one_process():
    """Data-parallel ranks have the same batch here, so each step equals one process's."""
    found = {}
    for kind in KINDS:
        # torch 2.6 adds partial sums to momenta wrongly, also without ESAM.
        momentum = 0.9 if SHARDS_ON_CPUS or kind != "sequences" else 0.0
        for name, options in OPTIONS.items():
            if name == "momentum" and not momentum:
                continue
            model, twin = parallel(kind), plain()
            optimizer = ESAM(sgd(model, momentum), model, rho=RHO, **options)
            single = ESAM(sgd(twin, momentum), twin, rho=RHO, **options)
            norms, intact, chosen = [], [], []
            for step in range(3):
                for half in range(2):  # accumulated
                    before = shards(model)
                    (optimizer.loss(losses_of(model), *batch_of(step, half)) / 2).backward()
                    intact.append(all(map(torch.equal, before, shards(model))))
                    (single.loss(losses_of(twin), *batch_of(step, half)) / 2).backward()
                    mine, theirs = optimizer.report, single.report
                    norms.append(float(mine.perturbation_norm) - float(theirs.perturbation_norm))
                    chosen.append(
                        (mine.indices is None and theirs.indices is None)
                        or mine.indices.tolist() == theirs.indices.tolist()
                    )
                for each in (optimizer, single):
                    each.step()
                    each.zero_grad()
            found[f"{kind}, {name}"] = {
                "gap": gap(model, twin),
                "norms": max(map(abs, norms)),
                "intact": all(intact),
                "chosen": all(chosen),
            }
    return found


def case_samples():
    """Which samples ranks select if their losses differ, as they may in the last digit."""
    both, found = mesh(), {}
    for kind in KINDS:
        model = parallel(kind)
        inputs, targets = batch_of(0, seed=both["data"].get_local_rank())
        noise = torch.rand(8, generator=torch.Generator().manual_seed(dist.get_rank()))
        plain_losses = losses_of(model)

        def losses(x, y, numbers, plain_losses=plain_losses, noise=noise):
            return plain_losses(x, y) * (1 + noise[numbers])

        optimizer = ESAM(sgd(model), model, rho=RHO, beta=1.0, select=Proportional(0.5))
        optimizer.loss(losses, inputs, targets, torch.arange(8)).backward()
        report = optimizer.report
        found[kind] = [report.indices.tolist(), report.sample_weights.tolist()]
    return [both["data"].get_local_rank(), found]


def case_checkpoints():
    """A resumed run equals one without an interruption."""
    folder, found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None], {}
    dist.broadcast_object_list(folder)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            optimizer.loss(losses_of(model), *batch_of(step)).backward()
            optimizer.step()

    def fresh(kind):
        model = parallel(kind)
        base = torch.optim.AdamW(model.parameters())  # torch cannot save SGD's partial momenta
        return model, ESAM(base, model, rho=RHO, beta=0.6, ascend=Previous())

    for kind in KINDS:
        whole, first, second = fresh(kind), fresh(kind), fresh(kind)
        train(*whole, range(6))
        train(*first, range(3))
        dcp.save({"run": DistributedState(*first)}, checkpoint_id=f"{folder[0]}/{kind}")
        dcp.load({"run": DistributedState(*second)}, checkpoint_id=f"{folder[0]}/{kind}")
        train(*second, range(3, 6))
        same = map(torch.equal, shards(whole[0]), shards(second[0]))
        found[kind] = [second[1].count, all(same)]
    return found


def case_losses_of_several_ranks():
    """Logits that are split over the classes give a DTensor of losses."""
    found = []
    for selector in (All(), TopIncrease(0.5)):
        model, twin, layers = parallel("columns and rows"), plain(), mesh()["layers"]
        parallelize_module(model, layers, {"last": ColwiseParallel(use_local_output=False)})
        optimizer = ESAM(sgd(model), model, rho=RHO, beta=1.0, select=selector)
        with loss_parallel():
            optimizer.step(losses_of(model), *batch_of(0))
        ESAM(sgd(twin), twin, rho=RHO, beta=1.0, select=selector).step(
            losses_of(twin), *batch_of(0)
        )
        found.append(gap(model, twin))
    return found


def case_refusals():
    """What is not supported is refused by name."""
    model, found = parallel("sequences"), []
    optimizer = ESAM(sgd(model), model, rho=RHO, beta=1.0)
    inputs, targets = batch_of(0)
    batch = distribute_tensor(inputs, mesh()["layers"], [Replicate()])
    before = shards(model)
    try:
        optimizer.loss(losses_of(model), batch, targets)
    except TypeError as error:
        found.append(str(error))
    try:
        fit(model, optimizer, losses_of(model), [batch_of(0)], epochs=1)
    except TypeError as error:
        found.append(str(error))
    return [*found, all(map(torch.equal, before, shards(model)))]


class Averaging(nn.Linear):
    """Writes to its buffers in each forward, and reads one of them."""

    def __init__(self):
        super().__init__(8, 12)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        self.average.lerp_(x.detach().mean((0, 1)), 0.1)
        return super().forward(x - self.average)


def case_buffers():
    """Buffers of a split layer are distributed too, and change once in a step."""
    found = []
    for selector in (All(), TopIncrease(0.5)):
        pair = plain(), plain()
        for model in pair:
            torch.manual_seed(0)
            model.blocks[0].up = Averaging()
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(pair[0].blocks[0], mesh()["layers"], plan)
        for model in pair:
            optimizer = ESAM(sgd(model), model, rho=RHO, beta=1.0, select=selector)
            for step in range(3):
                optimizer.step(losses_of(model), *batch_of(step))
        layer = pair[0].blocks[0].up
        before = [b.to_local().clone() for b in layer.buffers()]
        calls, second = [], 4 if selector.gamma < 1.0 else 2  # two calls compare the losses

        def fails(x, y, model=pair[0], calls=calls, second=second):
            calls.append(losses_of(model)(x, y))
            if len(calls) == second:
                raise RuntimeError("in the second pass")
            return calls[-1]

        model = pair[0]
        with contextlib.suppress(RuntimeError):
            ESAM(sgd(model), model, rho=RHO, beta=1.0, select=selector).step(fails, *batch_of(0))
        after = [b.to_local() for b in layer.buffers()]
        kept = len(calls) == second and all(map(torch.equal, before, after))
        found.append([gap(*pair), float(after[0]), kept])
    return found


def case_frozen_layers():
    """Split layers that are frozen and not in the optimizer, with other trained weights."""
    model = parallel("columns and rows")
    for block in model.blocks:
        block.up.requires_grad_(False)
        block.down.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    noise = torch.rand(8, generator=torch.Generator().manual_seed(dist.get_rank()))
    base = torch.optim.SGD(trained, lr=0.1)
    optimizer = ESAM(base, model, rho=RHO, beta=1.0, gamma=0.5)
    plain_losses = losses_of(model)
    inputs, targets = batch_of(0)
    optimizer.step(
        lambda x, y, i: plain_losses(x, y) * (1 + noise[i]), inputs, targets, torch.arange(8)
    )
    return optimizer.report.indices.tolist()


def case_other_layouts():
    """The direction of `Previous()` is loaded from one process, and by one process."""
    found = []
    for here, there in ((parallel, lambda _: plain()), (lambda _: plain(), parallel)):
        models = [make("columns and rows") for make in (here, there)]
        optimizers = [
            ESAM(sgd(m), m, rho=RHO, beta=1.0, gamma=1.0, ascend=Previous()) for m in models
        ]
        for step in range(2):
            optimizers[0].step(losses_of(models[0]), *batch_of(step))
        for mine, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
            whole = getattr(other, "full_tensor", other.detach)()
            part = (
                distribute_tensor(whole, mine.device_mesh, mine.placements)
                if (hasattr(mine, "placements"))
                else whole
            )
            mine.data.copy_(part.detach())
        entry = optimizers[0].state_dict()["esam"]
        state = {**optimizers[1].state_dict(), "esam": entry}
        optimizers[1].load_state_dict(state)
        directions = []
        for optimizer, model in zip(optimizers, models, strict=True):
            optimizer.zero_grad()
            optimizer.backward(losses_of(model), *batch_of(2))
            gradients = [getattr(p.grad, "full_tensor", p.grad.clone)() for p in model.parameters()]
            directions.append(gradients)
        found.append(max(float((a - b).abs().max()) for a, b in zip(*directions, strict=True)))
    return found


def case_copies():
    """A copy of model and optimizer goes on as the original does."""
    model = parallel("columns and rows")
    optimizer = ESAM(sgd(model), model, rho=RHO, beta=0.6, ascend=Previous())
    optimizer.step(losses_of(model), *batch_of(0))
    twin, other = copy.deepcopy((model, optimizer))
    for step in range(1, 3):
        optimizer.step(losses_of(model), *batch_of(step))
        other.step(losses_of(twin), *batch_of(step))
    return all(map(torch.equal, shards(model), shards(twin)))


def case_agreement():
    """A flaw in the gradient of one rank's shard is a flaw of the step."""
    from esam_torch.synchronisation import Ranks

    model = parallel("columns and rows")
    first = mesh()["layers"].get_local_rank() == 0
    parameters = list(model.parameters())
    return [Ranks(model).agree(flag, parameters) for flag in (True, first)]


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
