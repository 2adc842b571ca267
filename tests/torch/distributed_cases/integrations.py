"""ESAM in other people's trainers on two ranks; see launch.py."""

import hashlib
import logging
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from launch import main
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from esam_core import NonFiniteError
from esam_torch import ESAM

warnings.simplefilter("ignore")


def data(bad=()):
    """Return 32 samples; with batches of 4, two ranks take four each."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    inputs[list(bad)] = torch.nan
    return TensorDataset(inputs, targets)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def esam_of(model, **options):
    return ESAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, **options)


def bits(model):
    """Return the weights' hash and whether they are finite."""
    found = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    return [hashlib.sha256(found.numpy().tobytes()).hexdigest(), bool(found.isfinite().all())]


# -- Accelerate ------------------------------------------------------------------------------------


def accelerated(accumulate, bad=(), **options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from esam_torch.integrations.accelerate import backward

    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    bare = network()
    model, optimizer, loader = accelerator.prepare(
        bare, esam_of(bare, **options), DataLoader(data(bad), batch_size=4)
    )
    assert accelerator.num_processes == 2

    def losses(inputs, targets):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    for inputs, targets in loader:
        with accelerator.accumulate(model):
            backward(accelerator, model, optimizer, losses, inputs, targets)
            optimizer.step()
            optimizer.zero_grad()
    return bits(bare)


def case_accelerate():
    found = accelerated(2)
    try:
        accelerated(2, on_nonfinite="skip")
    except ValueError as error:
        return [found, accelerated(1, bad=(0,), on_nonfinite="skip"), str(error)]


# -- Hugging Face's Trainer ------------------------------------------------------------------------


class Sentences(Dataset):
    tokens = torch.randint(5, 40, (32, 7), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i, 0] % 3}


def case_trainer():
    import transformers

    from esam_torch.integrations.transformers import ESAMTrainer

    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=40, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3
    )
    model = transformers.DistilBertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            gradient_accumulation_steps=2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = ESAMTrainer(model=model, args=arguments, train_dataset=Sentences())
        assert arguments.world_size == 2
        trainer.train()
        assert trainer.optimizer.optimizer.count == 4
        dist.barrier()  # before one of the ranks takes the other's folder away
    return bits(model)


# -- Lightning -------------------------------------------------------------------------------------


def lit(strategy="ddp", bad=(), accumulate=1, unused=False, **options):
    import lightning

    from esam_torch.integrations.lightning import ESAMMixin

    logging.getLogger("lightning").setLevel(logging.ERROR)

    class Classifier(ESAMMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = network()
            self.skipped = []
            if unused:
                self.other = nn.Linear(2, 2)

        def losses(self, inputs, targets):
            return F.cross_entropy(self.layers(inputs), targets, reduction="none")

        def configure_optimizers(self):
            return esam_of(self, **options)

        def on_train_batch_end(self, *_):
            self.skipped.append(self.report.skipped)

    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )
    try:
        trainer.fit(module, DataLoader(data(bad), batch_size=4))
    except (NonFiniteError, ValueError) as error:
        return [type(error).__name__, str(error)]
    assert trainer.world_size == 2
    return [*bits(module), module.skipped]


def case_lightning():
    return lit(accumulate=2)


def case_lightning_skips():
    return lit(bad=(0,), on_nonfinite="skip")


def case_lightning_raises():
    return lit(bad=(0,), on_nonfinite="raise")


def case_lightning_refuses_to_skip_what_it_accumulates():
    return lit(accumulate=2, on_nonfinite="skip")


def case_lightning_with_unused_parameters():
    found = [
        lit("ddp_find_unused_parameters_true", accumulate=n, unused=unused)
        for n, unused in ((1, True), (2, True), (1, False))
    ]
    return [*found, lit()]


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
