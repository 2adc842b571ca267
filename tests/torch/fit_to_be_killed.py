"""Train with checkpoints, and kill this process after a number of batches.

python fit_to_be_killed.py FOLDER BATCHES: BATCHES = 0 trains to the end. It resumes from the last
killed run, and writes the result to FOLDER/result.pt.
"""

import os
import random
import signal
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from esam_torch import ESAM, Random, Sometimes, Suffix, fit


class Noisy(Dataset):
    """Samples with random noise from all three global generators."""

    def __len__(self):
        return 50

    def __getitem__(self, i):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return torch.sin(torch.arange(6.0) * i) + 0.1 * noise.float(), i % 3


def main(folder, batches):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = nn.Sequential(
        *(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    )
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    sampler = Sometimes(0.8, Suffix("1"))
    optimizer = ESAM(base, model, perturb=sampler, select=Random(0.5))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=100)
    loader = DataLoader(Noisy(), 8, shuffle=True)
    seen = []

    def losses(model, inputs, targets):
        if model.training and torch.is_grad_enabled():
            seen.append(len(inputs))
            if len(seen) == batches:
                os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(model(inputs), targets, reduction="none")

    history = fit(
        *(model, optimizer, losses, loader),
        epochs=4,
        eval_loader=DataLoader(Noisy(), 25),
        scheduler=scheduler,
        scheduler_step="batch",
        accumulate=2,
        clip_norm=1.0,
        folder=folder,
        resume=True,
        save_every=2,
        device="cpu",
        progress=False,
    )
    rows = [
        {k: v for k, v in row.items() if k[:7] not in ("seconds", "samples")} for row in history
    ]
    torch.save(
        {"model": model.state_dict(), "count": optimizer.count, "rows": rows}, f"{folder}/result.pt"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
