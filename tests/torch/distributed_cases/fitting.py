"""`fit` on two ranks that torchrun starts; see launch.py."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esam_torch import ESAM, accuracy, fit


def data(n):
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def trained(folder, kind="esam", epochs=3, **options):
    torch.manual_seed(0)
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
    # By hand, on all samples at once: what the ranks' shares must add up to.
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    found = {
        "esam": trained(folder / "esam"),
        "sgd": trained(folder / "sgd", "sgd"),
        "first": trained(folder / "resumed", epochs=1),
        "resumed": trained(folder / "resumed", resume=True),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
