"""A small problem for trainers of other libraries, and the plain loop for comparison."""

import pytest
import torch
from tests.torch.language import Sentences, language_model
from tests.torch.scene import SUFFIX_PART
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from esam_torch import ESAM

#: Warnings of the libraries, which are ignored; ours stay errors.
THEIRS = (
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*num_workers.*:UserWarning",
)

#: Runs a test with the default options and with those of README.
both_settings = pytest.mark.parametrize("options", [{}, SUFFIX_PART], ids=["esam", "suffix-part"])


def data(n=64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def esam(model, **options):
    return ESAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, **options)


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def trained_by_hand(model, optimizer, batches, accumulate=1, clip=None):
    """Train in a plain loop, with micro-batches averaged, and return the model."""
    for i in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for inputs, targets in batches[i : i + accumulate]:
            optimizer.backward(losses_of(model), inputs, targets)
        for parameter in model.parameters():
            parameter.grad /= accumulate
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def same(model, twin, **tolerance):
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-5, "atol": 1e-7}))


class RecordingScaler(torch.amp.GradScaler):
    """Records the losses that it scales."""

    def __init__(self):
        super().__init__("cpu", init_scale=8.0)
        self.seen = []

    def scale(self, outputs):
        if outputs.requires_grad:  # a loss, not a query of the scale
            self.seen.append(float(outputs.detach()))
        return super().scale(outputs)


def new_trainer(transformers, kind="classes", esam=None, cls=None, more=None, **arguments):
    """Return a Trainer of a small language model, by default an ESAMTrainer."""
    from esam_torch.integrations.transformers import ESAMTrainer

    cls, more = cls or ESAMTrainer, dict(more or {})
    options = {
        "output_dir": "out",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **arguments,
    }
    return cls(
        model=more.pop("model", None) or language_model(transformers, kind),
        args=transformers.TrainingArguments(**options),
        train_dataset=Sentences(kind),
        esam=esam,
        **more,
    )
