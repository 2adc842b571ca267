"""Cases for two ranks under FSDP2's fully_shard; see launch.py."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from equations import step_by_hand
from launch import main

from esam_core import NonFiniteError
from esam_torch import (
    ESAM,
    All,
    Batch,
    Bernoulli,
    Everything,
    Part,
    Previous,
    Suffix,
    TopIncrease,
    fit,
)

WORLD = 2
RHO = 0.1


class Net(nn.Module):
    """Odd sizes, so that shards differ; some layers are sharded on their own, some not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 13)
        self.norm = nn.LayerNorm(13)
        self.middle = nn.Sequential(nn.Linear(13, 13), nn.ReLU(), nn.Dropout(0.1))
        self.last = nn.Linear(13, 3)

    def forward(self, x):
        return self.last(self.middle(self.norm(self.first(x).relu())))


def plain(dropout=0.0):
    torch.manual_seed(0)
    model = Net()
    model.middle[2].p = dropout
    return model


def sharded(mesh=None, dropout=0.0, **options):
    model = plain(dropout)
    mesh = mesh or init_device_mesh("cpu", (WORLD,))
    fully_shard(model.middle, mesh=mesh, **options)
    fully_shard(model.last, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch_of(rank, step, size=8):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(size, 6, generator=generator)
    return inputs, torch.randint(3, (size,), generator=generator)


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def weights(model):
    """Return the whole weights, on every rank."""
    model.reshard() if hasattr(model, "reshard") else None
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return [getattr(p, "full_tensor", p.detach)().detach().clone() for p in model.parameters()]


def gap(these, those):
    return max((a - b).abs().max().item() for a, b in zip(these, those, strict=True))


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


OPTIONS = {
    "sam": {"perturb": Everything()},
    "tensors": {"beta": 0.6},
    "single_weights": {"perturb": Bernoulli(0.5, unit="weight")},
    "adaptive": {"beta": 0.6, "adaptive": True, "rho": 1.0},
    "estimated": {"beta": 0.6, "norm": "estimated"},
    "full": {"beta": 0.6, "norm": "full"},
    "unnormed": {"beta": 0.6, "norm": "none"},
    "suffix": {"perturb": Suffix("middle.0")},
    "share": {"perturb": Suffix(0.3)},
}


def case_like_one_process():
    """With gamma = 1: the same as one process with both ranks' samples."""
    rank, found = dist.get_rank(), {}
    for name, options in OPTIONS.items():
        model, twin = sharded(), plain()
        base = torch.optim.AdamW if name == "estimated" else torch.optim.SGD
        optimizer = ESAM(base(model.parameters(), lr=0.01), model, select=All(), **options)
        single = ESAM(base(twin.parameters(), lr=0.01), twin, select=All(), **options)
        mine, theirs = [], []
        for step in range(4):
            both = [torch.cat(parts) for parts in zip(batch_of(0, step), batch_of(1, step))]  # noqa: B905
            mine.append(optimizer.step(losses_of(model), *batch_of(rank, step)))
            theirs.append(single.step(losses_of(twin), *both))
        found[name] = {
            "gap": gap(weights(model), weights(twin)),
            "norms": max(
                abs(float(a.perturbation_norm) - float(b.perturbation_norm))
                + abs(float(a.gradient_norm) - float(b.gradient_norm))
                for a, b in zip(mine, theirs, strict=True)
            ),
            "perturbed": [a.perturbed == b.perturbed for a, b in zip(mine, theirs, strict=True)],
        }
    return found


def case_selection_on_each_rank():
    """With gamma = 0.5 and different batch sizes: one epsilon, and one selection per rank."""
    rank, size, found = dist.get_rank(), (8, 5), []
    model, twin = sharded(), plain()
    optimizer = ESAM(sgd(model), model, rho=RHO)
    base = sgd(twin)
    for step in range(5):
        report = optimizer.step(losses_of(model), *batch_of(rank, step, size[rank]))
        batches = [batch_of(r, step, size[r]) for r in range(WORLD)]
        gradient, selected = step_by_hand(
            *(twin, losses_of(twin), batches),
            ascend=Batch(),
            select=TopIncrease(0.5),
            radius=RHO / 0.6,
            perturbed=report.perturbed,
        )
        for parameter, g in zip(twin.parameters(), gradient, strict=True):
            parameter.grad = g
        base.step()
        found.append([gap(weights(model), weights(twin)), report.indices.tolist(), selected[rank]])
    return found


def case_weights_come_back():
    """After a backward the weights are restored bit for bit, and forwards use them."""
    rank = dist.get_rank()
    model = sharded(dropout=0.1)
    optimizer = ESAM(sgd(model), model, rho=1.0)
    intact, seen = [], []
    for step in range(4):
        batch = batch_of(rank, step)
        with torch.no_grad():  # keeps the root's gathered weights
            model.eval()
            before, outputs = weights(model), model(batch[0])
            model(batch[0])
            model.train()
        optimizer.backward(losses_of(model), *batch)
        with torch.no_grad():
            model.eval()
            seen.append(torch.equal(outputs, model(batch[0])))
            model.train()
        intact.append(same(before, weights(model)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()
            seen.append(not torch.equal(outputs, model(batch[0])))
            model.train()
    return {"intact": intact, "seen": seen}


def case_accumulation():
    """Existing gradients are kept in the ascent pass, and added to in the descent pass."""
    rank = dist.get_rank()
    model = sharded()
    optimizer = ESAM(sgd(model), model)
    optimizer.backward(losses_of(model), *batch_of(rank, 0))
    first = [p.grad.full_tensor() for p in model.parameters()]
    optimizer.backward(losses_of(model), *batch_of(rank, 1))
    both = [p.grad.full_tensor() for p in model.parameters()]
    optimizer.zero_grad()
    fresh = ESAM(sgd(model), model)
    fresh.load_state_dict(
        {**fresh.state_dict(), "esam": {**optimizer.state_dict()["esam"], "count": 1}}
    )
    fresh.backward(losses_of(model), *batch_of(rank, 1))
    second = [p.grad.full_tensor() for p in model.parameters()]
    return gap([a + b for a, b in zip(first, second, strict=True)], both)


def case_outside_the_optimizer():
    """Parameters outside the optimizer get the descent gradient, once."""
    rank, found = dist.get_rank(), {}
    for name, held in {"first": "middle last", "last": "first middle", "root": "middle"}.items():
        model, twin = sharded(), plain()
        gradients = []
        for net in (model, twin):
            of_base = [p for n, p in net.named_parameters() if n.split(".")[0] in held.split()]
            optimizer = ESAM(torch.optim.SGD(of_base, lr=0.1), net, rho=RHO, select=All())
            both = [torch.cat(parts) for parts in zip(batch_of(0, 0), batch_of(1, 0), strict=True)]
            mine = batch_of(rank, 0) if net is model else both
            for _ in range(2):  # existing gradients are added to
                optimizer.backward(losses_of(net), *mine)
            gradients.append(
                [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in net.parameters()]
            )
        found[name] = gap(*gradients)
    return found


def case_gathered_weights():
    """Whether layers have dropped their gathered weights after the forward of each pass."""
    found = []
    for options in ({}, {"ascend": Part(0.5)}, {"ascend": Previous()}):
        model = sharded()
        optimizer = ESAM(sgd(model), model, gamma=0.5, perturb=Everything(), **options)

        def losses(x, y, model=model):
            values = losses_of(model)(x, y)
            layers = (model.middle[0], model.last)
            found.append(all(hasattr(layer.weight, "placements") for layer in layers))
            return values

        for step in range(2):
            optimizer.step(losses, *batch_of(dist.get_rank(), step))
    return found


def case_leaves_outside_the_model():
    """Inputs with a gradient, and a learned temperature, with the same batch on both ranks."""
    found = {}
    for name in ("sam", "top increase"):
        gradients, hooked = [], []
        for net in (sharded(), plain()):
            select = All() if name == "sam" else TopIncrease(0.5)
            optimizer = ESAM(sgd(net), net, rho=RHO, perturb=Everything(), select=select)
            inputs, targets = batch_of(0, 0)
            inputs.requires_grad_(True)
            temperature = torch.tensor(0.7, requires_grad=True)
            temperature.register_hook(hooked.append)

            def losses(x, y, net=net, temperature=temperature):
                return F.cross_entropy(net(x) / temperature, y, reduction="none")

            for _ in range(2):  # existing gradients are added to
                optimizer.loss(losses, inputs, targets).backward()
            gradients.append([inputs.grad, temperature.grad])
        found[name] = [gap(*gradients), float(gradients[0][1].abs()), len(hooked)]
    return found


def case_nonfinite():
    """One rank's loss is not a number in the second of four steps, in all three modes."""
    rank, found = dist.get_rank(), {}
    for mode in ("propagate", "skip", "raise"):
        model = sharded()
        optimizer = ESAM(sgd(model), model, on_nonfinite=mode)
        outcome, intact = [], []
        for step in range(4):
            inputs, targets = batch_of(rank, step)
            if step == 1 and rank == 1:
                inputs[3] = torch.nan
            optimizer.zero_grad()
            before = weights(model)
            try:
                report = optimizer.backward(losses_of(model), inputs, targets)
                outcome.append("skipped" if report.skipped else "done")
            except NonFiniteError:
                outcome.append("raised")
            intact.append(same(before, weights(model)))
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if gradients and all(g.full_tensor().isfinite().all() for g in gradients):
                optimizer.step()
            elif outcome[-1] == "done":
                outcome[-1] = "seen"
        found[mode] = {"outcome": outcome, "intact": intact}
    return found


def case_fault():
    """All ranks fail in each pass in turn; the weights are intact and training continues."""
    rank = dist.get_rank()
    model, twin = sharded(), sharded()
    optimizer, other = ESAM(sgd(model), model), ESAM(sgd(twin), twin)
    intact = []
    for failing in (1, 2, 3):
        passes = []

        def losses(x, y, failing=failing, passes=passes):
            values = losses_of(model)(x, y)
            passes.append(len(x))
            if len(passes) == failing:
                raise KeyboardInterrupt
            return values

        optimizer.zero_grad()
        before = weights(model)
        with torch.no_grad():
            outputs = model(batch_of(rank, 7)[0])
        with contextlib.suppress(KeyboardInterrupt):
            optimizer.backward(losses, *batch_of(rank, 7))
        with torch.no_grad():  # before anything else drops the gathered weights
            intact.append(torch.equal(outputs, model(batch_of(rank, 7)[0])))
        intact.append(same(before, weights(model)))
        intact.append(all(p.grad is None for p in model.parameters()))
        for step in range(2):
            optimizer.step(losses_of(model), *batch_of(rank, step))
            other.step(losses_of(twin), *batch_of(rank, step))
    return {"intact": intact, "same": same(weights(model), weights(twin))}


def case_refusals():
    """Errors for unreduced gradients and for FSDP1."""
    model = sharded()
    optimizer = ESAM(sgd(model), model)
    model.set_requires_gradient_sync(False)
    found = []
    try:
        optimizer.backward(losses_of(model), *batch_of(0, 0))
    except RuntimeError as error:
        found.append(str(error))
    from torch.distributed.fsdp import FullyShardedDataParallel

    old = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"), use_orig_params=True)
    try:
        ESAM(sgd(old), old)
    except TypeError as error:
        found.append(str(error))
    model = sharded()
    try:
        fit(model, sgd(model), losses_of, [], epochs=1, device="cpu", progress=False)
    except TypeError as error:
        found.append(str(error))
    return found


def case_meshes_and_precision():
    """Replicas of shards (HSDP), and weights gathered as bfloat16."""
    rank, found = dist.get_rank(), {}
    reference = None
    for name, shape in {"shards": (2,), "replicas": (2, 1), "both": (1, 2)}.items():
        names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
        model = sharded(init_device_mesh("cpu", shape, mesh_dim_names=names))
        optimizer = ESAM(sgd(model), model, norm="estimated")
        for step in range(4):
            optimizer.step(losses_of(model), *batch_of(rank, step))
        reference = reference or weights(model)
        found[name] = gap(reference, weights(model))
    model = sharded()
    model.set_reshard_after_backward(False)  # gathered weights stay until they are dropped
    optimizer = ESAM(sgd(model), model, norm="estimated")
    for step in range(4):
        optimizer.step(losses_of(model), *batch_of(rank, step))
    found["kept"] = gap(reference, weights(model))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(mp_policy=policy)
    optimizer = ESAM(sgd(model), model)
    for step in range(4):
        batch = batch_of(rank, step)
        report = optimizer.step(lambda x, y: losses_of(model)(x.bfloat16(), y).float(), *batch)
    found["bfloat16"] = gap(reference, weights(model))
    found["loss"] = float(report.loss)
    return found


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
