"""Cases for checkpoints of two ranks under FSDP2; see launch.py."""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fsdp import batch_of, losses_of, same, sgd, sharded, weights
from launch import main

from esam_torch import ESAM, DistributedState, Previous, RandomSuffix, TopLoss


def go_on(model, optimizer, steps):
    """Train; return what each step perturbed and selected."""
    rank, seen = dist.get_rank(), []
    for step in steps:
        report = optimizer.step(losses_of(model), *batch_of(rank, step))
        seen.append([list(report.perturbed), report.indices.tolist()])
    return seen


BASES = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "SGD": sgd,
}


CHECKPOINTED = {
    "tensors": {"seed": 7},
    "suffix": {"perturb": RandomSuffix(("middle.0", "last")), "select": TopLoss(0.5), "rho": 0.2},
}


def case_checkpoints():
    """A run saved by torch.distributed.checkpoint and loaded into new objects resumes exactly.

    The new objects have other options, so that all options must come from the checkpoint.
    """
    found = {}
    for base, make in BASES.items():
        for name, options in CHECKPOINTED.items():
            model = sharded()
            optimizer = ESAM(make(model), model, **options)
            go_on(model, optimizer, range(4))
            folder = os.path.join(sys.argv[1], f"{base}-{name}")
            dcp.save({"run": DistributedState(model, optimizer)}, checkpoint_id=folder)
            wanted = go_on(model, optimizer, range(4, 9))
            fresh = sharded()
            other = ESAM(make(fresh), fresh, beta=0.9, gamma=0.3)
            dcp.load({"run": DistributedState(fresh, other)}, checkpoint_id=folder)
            count = other.count
            found[f"{base}, {name}"] = {
                "count": count,
                "steps": wanted == go_on(fresh, other, range(4, 9)),
                "config": other.config == optimizer.config,
                "weights": same(weights(model), weights(fresh)),
            }
    return found


def case_whole_checkpoints():
    """A whole state that only rank 0 has is loaded by both ranks."""
    model = sharded()
    optimizer = ESAM(sgd(model), model, seed=7)
    go_on(model, optimizer, range(3))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = DistributedState(model, optimizer, options=whole).state_dict()
    wanted = go_on(model, optimizer, range(3, 6))
    saved = saved if dist.get_rank() == 0 else {}
    fresh = sharded()
    other = ESAM(sgd(fresh), fresh)
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    DistributedState(fresh, other, options=sent).load_state_dict(saved)
    count = other.count
    steps = wanted == go_on(fresh, other, range(3, 6))
    return {"count": count, "steps": steps, "weights": same(weights(model), weights(fresh))}


def grouped(model, *options):
    """Return SGD with a group of the first layer and one of the others, with these options."""
    first = list(model.first.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("first")]
    groups = [{"params": p, **own} for p, own in zip((first, rest), options, strict=True)]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def options_of(optimizer):
    return [
        {k: v for k, v in group.items() if k.startswith("esam")} for group in optimizer.param_groups
    ]


def case_states_of_torch():
    """torch's own functions keep ESAM's entry of a sharded model, and say if there is none."""
    found = {}
    for kind, options in {
        "sharded": StateDictOptions(),
        "whole": StateDictOptions(full_state_dict=True),
        "sent": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    }.items():

        def save(model, optimizer, name, options=options, kind=kind):
            folder = os.path.join(sys.argv[1], f"{kind}-{name}")
            state = get_optimizer_state_dict(model, optimizer, options=options)
            if kind == "sharded":
                dcp.save({"optimizer": state}, checkpoint_id=folder)
            return state, folder

        def load(model, optimizer, saved, options=options, kind=kind, planner=None):
            state, folder = saved
            if kind == "sharded":
                state = get_optimizer_state_dict(model, optimizer, options=options)
                dcp.load({"optimizer": state}, checkpoint_id=folder, planner=planner)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                set_optimizer_state_dict(model, optimizer, state, options=options)
            return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]

        model = sharded()
        base = grouped(model, {"esam_rho": 0.3}, {"esam_perturb": False})
        optimizer = ESAM(base, model, seed=7, beta=0.9, select=TopLoss(0.5))
        go_on(model, optimizer, range(3))
        saved = save(model, optimizer, "esam")
        fresh = sharded()
        other = ESAM(grouped(fresh, {}, {"esam_adaptive": True}), fresh)
        own = load(fresh, other, saved)
        found[kind] = {
            "count": other.count,
            "config": other.config == optimizer.config,
            "options": options_of(other),
            "momentum": all(
                same([base.state[p]["momentum_buffer"]], [other.state[q]["momentum_buffer"]])
                for p, q in zip(model.parameters(), fresh.parameters(), strict=True)
            ),
            "warnings": own,
        }
        optimizer.zero_grad()  # without gradients, torch creates the bare optimizer's state
        bare = save(model, grouped(model, {}, {}), "bare")
        other = ESAM(grouped(fresh, {"esam_rho": 0.7}, {}), fresh)
        try:
            found[kind]["bare"] = [load(fresh, other, bare)[0], other.count, options_of(other)]
        except dcp.CheckpointException as error:
            partial = dcp.DefaultLoadPlanner(allow_partial_load=True)  # as the docs say
            (text,) = load(fresh, other, bare, planner=partial)
            found[kind]["bare"] = [f"{error} {text}", other.count, options_of(other)]
        optimizer = ESAM(sgd(model), model, ascend=Previous())
        optimizer.step(losses_of(model), *batch_of(dist.get_rank(), 0))
        other = ESAM(sgd(fresh), fresh, ascend=Previous())
        found[kind]["previous"] = [
            load(fresh, other, save(model, optimizer, "previous")),
            other.config == optimizer.config,
        ]
    return found


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
