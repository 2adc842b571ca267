"""ESAM in trainers of other libraries on two ranks; see launch.py."""

import hashlib
import logging
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from launch import SHARDS_ON_CPUS, main
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

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


def agrees(model, interleaved, accumulate=1, left_out=()):
    """Return whether weights are those of one process that averages the two ranks' gradients.

    Args:
        model: the model that the ranks have trained, for one epoch.
        interleaved: whether ranks alternate samples, or batches.
        accumulate: the number of batches over which gradients are averaged.
        left_out: the batches that both ranks skip, because one had NaN.
    """
    twin = network()
    # Each rank has its own perturbation, with the same mask.
    each = [esam_of(twin, on_nonfinite="skip") for _ in range(2)]
    inputs, targets = data().tensors
    order = torch.arange(32).view(4, 4, 2) if interleaved else torch.arange(32).view(4, 2, 4).mT
    for step, indices in enumerate(order, 1):
        for esam, mine in zip(each, indices.T, strict=True):
            esam.backward(
                lambda x, y: F.cross_entropy(twin(x), y, reduction="none"),
                *(inputs[mine] * (torch.nan if step - 1 in left_out else 1.0), targets[mine]),
            )
        if step % accumulate == 0:
            for parameter in twin.parameters():
                if parameter.grad is not None:  # unless all batches were skipped
                    parameter.grad /= 2 * accumulate
            each[0].step()
            each[0].zero_grad()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)


# -- Accelerate ------------------------------------------------------------------------------------


def accelerated(accumulate, bad=(), left_out=(), **options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    bare = network()
    esam = esam_of(bare, **options)
    model, optimizer, loader = accelerator.prepare(bare, esam, DataLoader(data(bad), batch_size=4))
    assert accelerator.num_processes == 2

    def losses(inputs, targets):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(esam.loss(losses, inputs, targets))
            optimizer.step()
            optimizer.zero_grad()
    return [*bits(bare), agrees(bare, False, accumulate, left_out)]


def case_accelerate():
    skipping = {"on_nonfinite": "skip"}
    return [
        accelerated(2),
        accelerated(1, bad=(0,), left_out=(0,), **skipping),
        # The first and the last of the accumulated batches, on one rank or the other.
        accelerated(2, bad=(4,), left_out=(0,), **skipping),
        accelerated(2, bad=(8,), left_out=(1,), **skipping),
    ]


def case_accelerate_shards():
    """FSDP2: `save_state` and `load_state`, of shards and of the whole state."""
    if not SHARDS_ON_CPUS:
        return None
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    def run(kind, folder):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type=kind
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)

        def fsdp():  # Accelerate shards on accelerators only, and `prepare` sets it back
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin

        def prepared(**options):
            bare = network()
            esam = esam_of(bare, **options)
            fsdp()
            model, optimizer = accelerator.prepare(bare, esam)
            fsdp()
            return model, optimizer, esam

        def train(model, optimizer, esam, steps):
            def losses(inputs, targets):
                return F.cross_entropy(model(inputs), targets, reduction="none")

            seen = []
            inputs, targets = data().tensors
            for step in steps:
                mine = slice(4 * step, 4 * step + 4)
                optimizer.zero_grad()
                accelerator.backward(esam.loss(losses, inputs[mine], targets[mine]))
                optimizer.step()
                seen.append(list(esam.report.perturbed))
            return seen, [p.full_tensor().tolist() for p in model.parameters()]

        first = prepared(beta=0.5, seed=7)
        train(*first, range(3))
        accelerator.save_state(folder)
        wanted = train(*first, range(3, 6))
        accelerator._models.clear()
        accelerator._optimizers.clear()
        second = prepared()
        accelerator.load_state(folder)
        return [second[2].count, train(*second, range(3, 6)) == wanted]

    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders, src=0)
        found = [
            run(kind, f"{folders[0]}/{kind}") for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
        ]
        dist.barrier()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return found


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
        dist.barrier()  # before one rank removes the other's folder
    return bits(model)


# -- Lightning -------------------------------------------------------------------------------------


def lit(strategy="ddp", bad=(), accumulate=1, unused=False, **options):
    import lightning

    logging.getLogger("lightning").setLevel(logging.ERROR)

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = network()
            self.skipped = []
            if unused:
                self.other = nn.Linear(2, 2)

        def losses(self, inputs, targets):
            return F.cross_entropy(self.layers(inputs), targets, reduction="none")

        def training_step(self, batch, batch_idx):
            return self.optimizers().loss(self.losses, *batch)

        def configure_optimizers(self):
            return esam_of(self, **options)

        def on_train_batch_end(self, *_):
            self.skipped.append(self.optimizers().report.skipped)

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
        use_distributed_sampler=False,
    )
    try:
        samples = data(bad)
        sampler = DistributedSampler(samples, shuffle=False)  # Lightning's own shuffles
        trainer.fit(module, DataLoader(samples, batch_size=4, sampler=sampler))
    except (NonFiniteError, ValueError) as error:
        return [type(error).__name__, str(error)]
    assert trainer.world_size == 2
    return [*bits(module), module.skipped, agrees(module.layers, True, accumulate)]


def case_lightning():
    return lit(accumulate=2)


def case_lightning_skips():
    return lit(bad=(0,), on_nonfinite="skip")


def case_lightning_raises():
    return lit(bad=(0,), on_nonfinite="raise")


def case_lightning_with_unused_parameters():
    found = [
        lit("ddp_find_unused_parameters_true", accumulate=n, unused=unused)
        for n, unused in ((1, True), (2, True), (1, False))
    ]
    return [*found, lit()]


def case_fabric():
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    bare = network()
    model, optimizer = fabric.setup(bare, esam_of(bare))
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=4))

    def losses(inputs, targets):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    for inputs, targets in loader:
        optimizer.zero_grad()
        fabric.backward(optimizer.loss(losses, inputs, targets))
        optimizer.step()
    assert fabric.world_size == 2 and optimizer.count == 4
    return [*bits(bare), agrees(bare, True)]


if __name__ == "__main__":
    main(dict(globals()), sys.argv[1])
