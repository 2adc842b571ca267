"""ESAM in Accelerate, Lightning, Fabric and skorch: each equals a plain loop."""

import copy

import pytest
import torch
from tests.torch.trainers import (
    THEIRS,
    RecordingScaler,
    both_settings,
    data,
    esam,
    losses_of,
    network,
    same,
    trained_by_hand,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from esam_torch import ESAM, All, Everything, Previous

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]


def batches():
    return list(DataLoader(data(), batch_size=8))


# -- Accelerate ------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


@both_settings
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_equals_the_plain_loop(accelerate, accumulate, options):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    bare = network()
    mine = esam(bare, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(mine, 100)
    model, optimizer, loader, scheduler = accelerator.prepare(
        bare, mine, DataLoader(data(), batch_size=8), scheduler
    )
    norms = []
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = mine.loss(losses_of(model), inputs, targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert (mine.report.sharpness is None) == bool(options) and mine.count == 8
    assert len(norms) == 8 // accumulate and min(norms) > 0.1
    twin = network()
    same(bare, trained_by_hand(twin, esam(twin, **options), batches(), accumulate, clip=0.1))


@both_settings
def test_accelerate_in_bfloat16_and_its_checkpoints(accelerate, tmp_path, options):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    bare = network()
    mine = esam(bare, **options)
    model, optimizer = accelerator.prepare(bare, mine)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            accelerator.backward(mine.loss(losses_of(model), *data().tensors))
            optimizer.step()

    train(2)
    accelerator.save_state(tmp_path)
    train(2)
    after = copy.deepcopy(bare.state_dict())
    accelerator.load_state(tmp_path)
    assert mine.count == 2
    train(2)
    for name, tensor in bare.state_dict().items():
        assert torch.equal(tensor, after[name])


def test_accelerate_scales(accelerate):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = RecordingScaler()
    bare, twin = network(), network()
    mine = esam(bare)
    model, _ = accelerator.prepare(bare, mine)
    accelerator.backward(mine.loss(losses_of(model), *data().tensors))
    assert accelerator.scaler.seen == [float(mine.report.loss)]
    esam(twin).backward(losses_of(twin), *data().tensors)
    for a, b in zip(bare.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, 8.0 * b.grad)


# -- Lightning -------------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


def module_of(lightning, kind, **options):
    """Return a LightningModule: with the mixin, or with its own `training_step`."""
    from esam_torch.integrations.lightning import ESAMMixin

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*network(), nn.Identity())
            self.dtypes = set()
            self.automatic_optimization = kind != "manual"

        def forward(self, inputs):
            outputs = self.layers(inputs)
            self.dtypes.add(outputs.dtype)
            return outputs

        def losses(self, inputs, targets):
            return F.cross_entropy(self(inputs), targets, reduction="none")

        def configure_optimizers(self):
            self.esam = esam(self, **options)
            return [self.esam], [torch.optim.lr_scheduler.StepLR(self.esam, 100)]

    class Automatic(Module):
        def training_step(self, batch, batch_idx):
            return self.optimizers().loss(self.losses, *batch)

    class Manual(Module):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(optimizer.loss(self.losses, *batch))
            self.clip_gradients(optimizer, 0.1)
            optimizer.step()

    class Mixed(ESAMMixin, Module):
        losses = Module.losses

    return {"automatic": Automatic, "manual": Manual, "mixin": Mixed}[kind]()


def trainer_of(lightning, folder, **options):
    return lightning.Trainer(
        max_epochs=options.pop("max_epochs", 1),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@both_settings
@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [("automatic", 1), ("automatic", 2), ("manual", 1), ("mixin", 1), ("mixin", 2)],
)
def test_lightning_equals_the_plain_loop(lightning, tmp_path, kind, accumulate, options):
    module = module_of(lightning, kind, **options)
    theirs = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1}
    trainer = trainer_of(lightning, tmp_path, **({} if kind == "manual" else theirs))
    trainer.fit(module, DataLoader(data(), batch_size=8))
    assert trainer.global_step == 8 // accumulate and module.esam.count == 8
    report = module.esam.report
    if kind == "mixin":
        assert module.report is report
        logged = trainer.logged_metrics
        assert float(logged["train_loss"]) == float(report.loss)
        if options:
            assert report.sharpness is None and "sharpness" not in logged
        else:
            assert float(logged["sharpness"]) == float(report.sharpness)
    twin = network()
    optimizer = esam(twin, **options)
    same(module.layers, trained_by_hand(twin, optimizer, batches(), accumulate, clip=0.1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_in_other_precisions(lightning, tmp_path, precision):
    module = module_of(lightning, "automatic", perturb=Everything(), select=All())
    options = {"precision": precision}
    if precision == "16-mixed":
        # Lightning's fp16 plugin requires a GPU, but its scaler also works on a CPU.
        from lightning.pytorch.plugins import MixedPrecision

        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    trainer = trainer_of(lightning, tmp_path, **options)
    trainer.fit(module, DataLoader(data(), batch_size=8))
    assert module.dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    twin = network()
    trained_by_hand(twin, esam(twin, perturb=Everything(), select=All()), batches())
    ours, theirs, start = (
        nn.utils.parameters_to_vector(m.parameters()) for m in (module, twin, network())
    )
    # Passes have 8 (or 11) bits, and the weights agree to a twentieth of their change.
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


def test_lightning_scales(lightning, tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    module, scaler = module_of(lightning, "automatic"), RecordingScaler()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer_of(lightning, tmp_path, plugins=[plugin]).fit(module, DataLoader(data(), batch_size=8))
    assert len(scaler.seen) == 8 and scaler.seen[-1] == float(module.esam.report.loss)


@both_settings
@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_lightning_resumes_from_its_checkpoint(lightning, tmp_path, kind, options):
    loader = DataLoader(data(), batch_size=8)
    whole, module, again = (module_of(lightning, kind, **options) for _ in range(3))
    trainer_of(lightning, tmp_path, max_epochs=2).fit(whole, loader)
    trainer = trainer_of(lightning, tmp_path)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = trainer_of(lightning, tmp_path, max_epochs=2)
    other.fit(again, loader, ckpt_path=tmp_path / "one.ckpt")
    assert again.esam.count == whole.esam.count == 16
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lightnings_wrapper_knows_the_count(lightning, tmp_path):
    seen = []

    class Watching(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.optimizers().state_dict()["esam"]["count"])

    module = module_of(lightning, "automatic")
    trainer_of(lightning, tmp_path, callbacks=[Watching()]).fit(
        module, DataLoader(data(), batch_size=8)
    )
    assert seen == list(range(1, 9))


def test_lightnings_learning_rate_finder_sees_the_losses(lightning, tmp_path):
    from lightning.pytorch.tuner import Tuner

    def curve(module):
        module.lr = 0.1
        tuner = Tuner(trainer_of(lightning, tmp_path))
        found = tuner.lr_find(module, DataLoader(data(256), batch_size=8), num_training=24)
        return found.results["loss"]

    plain = module_of(lightning, "automatic")
    plain.training_step = lambda batch, batch_idx: plain.losses(*batch).mean()
    plain.configure_optimizers = lambda: torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    wanted = curve(plain)
    assert curve(module_of(lightning, "automatic", rho=0.0)) == pytest.approx(wanted, rel=1e-4)
    # The perturbation changes the updates, which are tiny in the first half, not the losses.
    found = curve(module_of(lightning, "automatic", rho=0.5))
    assert found[:12] == pytest.approx(wanted[:12], rel=1e-3) and found != wanted


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_lightnings_weight_averaging_keeps_batch_norm(lightning, tmp_path, rho):
    """The callback runs `training_step` to update BatchNorm's statistics."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    def trained(module):
        module.layers.append(nn.BatchNorm1d(2, momentum=None))
        module.seen = []
        module.layers[-1].register_forward_pre_hook(lambda _, x: module.seen.append(x[0].detach()))
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
        trainer = trainer_of(lightning, tmp_path, max_epochs=3, callbacks=[swa])
        trainer.fit(module, DataLoader(data(), batch_size=8))
        return module

    module = trained(module_of(lightning, "automatic", rho=rho))
    norm = module.layers[-1]
    last = torch.stack(module.seen[-8:])  # those of the averaged model, once per batch
    assert int(norm.num_batches_tracked) == 8
    torch.testing.assert_close(norm.running_mean, last.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, last.var(1).mean(0))
    if rho == 0.0:
        plain = module_of(lightning, "automatic")
        plain.training_step = lambda batch, batch_idx: plain.losses(*batch).mean()
        plain.configure_optimizers = lambda: torch.optim.SGD(
            plain.parameters(), lr=0.1, momentum=0.9
        )
        for a, b in zip(module.parameters(), trained(plain).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_mixin_logs_the_loss_of_steps_along_an_earlier_gradient(lightning, tmp_path):
    module = module_of(lightning, "mixin", select=All(), ascend=Previous())
    trainer = trainer_of(lightning, tmp_path)
    trainer.fit(module, DataLoader(data(), batch_size=8))
    report = module.esam.report
    assert module.esam.count == 8 and report.batch_size == 8 and report.sharpness is None
    assert float(trainer.logged_metrics["train_loss"]) == float(report.loss)
    assert "sharpness" not in trainer.logged_metrics


def test_the_mixin_says_what_is_missing(lightning, tmp_path):
    from esam_torch.integrations.lightning import ESAMMixin

    class Nothing(ESAMMixin, lightning.LightningModule):
        pass

    with pytest.raises(TypeError, match="must have a method `losses`"):
        Nothing().losses(torch.ones(2))
    module = module_of(lightning, "mixin")
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"must return one ESAM.*Received: LightningSGD"):
        trainer_of(lightning, tmp_path).fit(module, DataLoader(data(), batch_size=8))


@both_settings
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_equals_the_plain_loop(lightning, precision, options):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    bare, twin = network(), network()
    model, optimizer = fabric.setup(bare, esam(bare, **options))
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=8))
    for inputs, targets in loader:
        optimizer.zero_grad()
        fabric.backward(optimizer.loss(losses_of(model), inputs, targets))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
    assert optimizer.count == 8 and optimizer.state_dict()["esam"]["count"] == 8
    trained_by_hand(twin, esam(twin, **options), batches(), clip=0.1)
    if precision == "32-true":
        same(bare, twin)
    else:
        ours, theirs, start = (
            nn.utils.parameters_to_vector(m.parameters()) for m in (bare, twin, network())
        )
        assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


# -- skorch ----------------------------------------------------------------------------------------


@both_settings
def test_skorch_equals_the_plain_loop(options):
    skorch = pytest.importorskip("skorch")

    class Net(skorch.NeuralNetClassifier):
        def initialize_optimizer(self, *args, **kwargs):
            super().initialize_optimizer(*args, **kwargs)
            self.optimizer_ = ESAM(self.optimizer_, self.module_, **options)
            return self

        def train_step_single(self, batch, **fit_params):
            self.module_.train()

            def losses(inputs, targets):
                outputs = self.infer(inputs, **fit_params)
                return self.get_loss(outputs, targets, training=True), outputs

            loss = self.optimizer_.loss(losses, *batch)
            loss.backward()
            return {"loss": loss, "y_pred": self.optimizer_.report.outputs}

        def get_loss(self, y_pred, y_true, *args, training=False, **kwargs):
            values = super().get_loss(y_pred, y_true, *args, training=training, **kwargs)
            return values if training else values.mean()

    bare, twin = network(), network()
    net = Net(
        bare,
        criterion=nn.CrossEntropyLoss(reduction="none"),
        optimizer=torch.optim.SGD,
        lr=0.1,
        optimizer__momentum=0.9,
        batch_size=8,
        max_epochs=2,
        verbose=0,
    )
    inputs, targets = data().tensors
    net.fit(inputs.numpy(), targets.numpy())
    assert 0.0 < net.history[-1, "valid_loss"] < net.history[0, "valid_loss"]
    train, _ = net.train_split(torch.utils.data.TensorDataset(inputs, targets), y=targets)
    kept = list(DataLoader(train, batch_size=8))
    assert net.optimizer_.count == 2 * len(kept)
    same(net.module_, trained_by_hand(twin, esam(twin, **options), 2 * kept))
