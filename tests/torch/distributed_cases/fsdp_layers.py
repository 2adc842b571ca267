"""Cases for FSDP2 with layers that are checkpointed or compiled first, as for language models."""

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fsdp import RHO, WORLD, batch_of, losses_of, plain, same, sgd, weights
from launch import main

from esam_torch import ESAM, All, Everything, Part, Previous, Suffix

SETTINGS = {
    "sam": {"perturb": Everything(), "select": All()},
    "suffix and part": {"perturb": Suffix("middle"), "gamma": 1.0, "ascend": Part(0.5)},
    "the paper's": {"gamma": 0.5},
    "previous": {"gamma": 0.5, "ascend": Previous()},
}


def prepared(*, checkpointed=False, compiled=False):
    """Return a sharded model with dropout in its middle layers."""
    model, mesh = plain(dropout=0.1), init_device_mesh("cpu", (WORLD,))
    if checkpointed:
        model.middle = checkpoint_wrapper(model.middle)
    if compiled:
        model.middle.compile(backend="eager")
    fully_shard(model.middle, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(options, **kinds):
    """Return the weights after some steps, and the texts of ESAM's warnings."""
    model = prepared(**kinds)
    torch.manual_seed(1)
    optimizer = ESAM(sgd(model), model, rho=RHO, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.step(losses_of(model), *batch_of(dist.get_rank(), step))
    return weights(model), [str(w.message) for w in caught if w.filename == __file__]


def case_layers():
    """Whether checkpointed and compiled layers are trained as plain ones are, and warnings."""
    found = {}
    for name, options in SETTINGS.items():
        expected, _ = trained(options)
        for kinds in ({"checkpointed": True}, {"compiled": True}):
            result, told = trained(options, **kinds)
            found[f"{name}, {next(iter(kinds))}"] = [same(result, expected), told]
    return found


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
