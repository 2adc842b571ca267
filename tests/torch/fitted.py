"""A small problem for `fit`."""

import torch
from tests.torch.scene import SUFFIX_PART
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esam_torch import ESAM, All, Everything, fit


def make_data(n=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )


def model_losses(model, inputs, targets):
    outputs = model(inputs)
    return F.cross_entropy(outputs, targets, reduction="none"), outputs


def make_optimizer(kind, model, lr=0.1):
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if kind == "sgd":
        return base
    if kind == "sam":
        return ESAM(base, model, perturb=Everything(), select=All())
    return ESAM(base, model, **(SUFFIX_PART if kind == "suffix-part" else {}))


def run_fit(kind="esam", epochs=3, losses=model_losses, **options):
    model = make_model()
    optimizer = make_optimizer(kind, model)
    options = {"progress": False, "device": "cpu", **options}
    if callable(options.get("scheduler")):
        options["scheduler"] = options["scheduler"](optimizer)
    loader = DataLoader(
        make_data(), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    return model, fit(model, optimizer, losses, loader, epochs=epochs, **options)


def make_batches(*bad, n=4):
    """Return batches of 10 samples; those with the given positions are NaN."""
    inputs, targets = make_data().tensors
    places = [slice(10 * i, 10 * i + 10) for i in range(n)]
    return [
        (inputs[p] * (torch.nan if i in bad else 1.0), targets[p]) for i, p in enumerate(places)
    ]


def make_skipping(model, on_nonfinite="skip"):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ESAM(base, model, on_nonfinite=on_nonfinite)


QUIETLY = {"epochs": 1, "progress": False, "device": "cpu"}


def interrupt(after):
    """Return `model_losses` with an interrupt after a number of training batches."""
    seen = []

    def losses(model, *batch):
        if model.training and torch.is_grad_enabled():
            if len(seen) == after:
                raise KeyboardInterrupt
            seen.append(len(batch[0]))
        return model_losses(model, *batch)

    return losses
