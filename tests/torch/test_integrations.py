"""ESAM inside Accelerate, Hugging Face's Trainer and Lightning, on small models of theirs."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from esam_torch import ESAM, All, Everything

CASES = Path(__file__).parent / "distributed_cases"
sys.path.insert(0, str(CASES))

from launch import launch, value  # noqa: E402

pytestmark = [
    # Of the libraries' own making; ours stay errors.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*:UserWarning"),
]


def _data(n=64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def _esam(model, **options):
    return ESAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, **options)


def _by_hand(model, optimizer, batches, accumulate=1, clip=None):
    """Train in a plain loop, with micro-batches averaged."""
    for i in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        group = batches[i : i + accumulate]
        for inputs, targets in group:
            optimizer.backward(
                lambda x, y: F.cross_entropy(model(x), y, reduction="none"), inputs, targets
            )
        for parameter in model.parameters():
            parameter.grad /= accumulate
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def _same(model, twin, **tolerance):
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-5, "atol": 1e-7}))


class RecordingScaler(torch.amp.GradScaler):
    """Keeps what it is asked to scale: the losses of the ascent and of the descent."""

    def __init__(self):
        super().__init__("cpu", init_scale=8.0)
        self.seen = []

    def scale(self, outputs):
        if outputs.requires_grad:  # a loss, and no look at the scale
            self.seen.append(float(outputs.detach()))
        return super().scale(outputs)


# -- Accelerate ------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_is_the_plain_loop(accelerate, accumulate):
    from esam_torch.integrations.accelerate import backward

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    bare = _model()
    esam = _esam(bare)
    scheduler = torch.optim.lr_scheduler.StepLR(esam, 100)
    model, optimizer, loader, scheduler = accelerator.prepare(
        bare, esam, DataLoader(_data(), batch_size=8), scheduler
    )

    def losses(inputs, targets):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    norms = []
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            report = backward(accelerator, model, optimizer, losses, inputs, targets)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert report.sharpness is not None and esam.count == 8
    assert len(norms) == 8 // accumulate and min(norms) > 0.1
    twin = _model()
    batches = list(DataLoader(_data(), batch_size=8))
    _same(bare, _by_hand(twin, _esam(twin), batches, accumulate, clip=0.1))


def test_accelerate_in_bfloat16_and_its_checkpoints(accelerate, tmp_path):
    from esam_torch.integrations.accelerate import backward

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    bare = _model()
    esam = _esam(bare)
    model, optimizer = accelerator.prepare(bare, esam)
    inputs, targets = _data().tensors
    for step in range(4):
        optimizer.zero_grad()
        backward(
            *(accelerator, model, optimizer),
            lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
            *(inputs, targets),
        )
        optimizer.step()
        if step == 1:
            accelerator.save_state(tmp_path)
    after = copy.deepcopy(bare.state_dict())
    accelerator.load_state(tmp_path)
    assert esam.count == 2
    for _ in range(2):
        optimizer.zero_grad()
        backward(
            *(accelerator, model, optimizer),
            lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
            *(inputs, targets),
        )
        optimizer.step()
    for name, tensor in bare.state_dict().items():
        assert torch.equal(tensor, after[name])


def test_accelerate_scales_ascent_and_descent(accelerate):
    from esam_torch.integrations.accelerate import backward

    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = RecordingScaler()
    bare, twin = _model(), _model()
    model, optimizer = accelerator.prepare(bare, _esam(bare))
    report = backward(
        *(accelerator, model, optimizer),
        lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
        *_data().tensors,
    )
    first, second = accelerator.scaler.seen
    assert first == float(report.loss) and second > first
    _esam(twin).backward(
        lambda x, y: F.cross_entropy(twin(x), y, reduction="none"), *_data().tensors
    )
    for a, b in zip(bare.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, 8.0 * b.grad)


def test_another_optimizer_is_refused(accelerate):
    from esam_torch.integrations.accelerate import backward

    accelerator = accelerate.Accelerator(cpu=True)
    model = _model()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="must hold an ESAM"):
        backward(accelerator, model, optimizer, lambda x: x, torch.ones(2))


# -- Hugging Face's Trainer ------------------------------------------------------------------------


class Sentences(Dataset):
    def __init__(self, kind, n=32):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(5, 40, (n, 7), generator=generator)
        self.kind = kind

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        tokens = self.tokens[i]
        row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        label = {
            "classes": tokens[0] % 3,
            "number": tokens[0] / 10,
            "several": (tokens[:3] > 20).float(),
            "causal": tokens,
        }
        return row | {"labels": label[self.kind]}


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return module


def _language_model(transformers, kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "dropout": 0.0, "attention_dropout": 0.0}
    if kind == "causal":
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.DistilBertConfig(
        **sizes,
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=16,
        num_labels=1 if kind == "number" else 3,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _trainer(transformers, kind="classes", esam=None, cls=None, more=None, **arguments):
    from esam_torch.integrations.transformers import ESAMTrainer

    cls = cls or ESAMTrainer
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
        model=_language_model(transformers, kind),
        args=transformers.TrainingArguments(**options),
        train_dataset=Sentences(kind),
        esam=esam,
        **(more or {}),
    )


@pytest.mark.parametrize("kind", ["classes", "number", "several", "causal"])
def test_trainer_trains(transformers, kind):
    trainer = _trainer(transformers, kind, num_train_epochs=4)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    values = [row["loss"] for row in logged]
    assert sum(values[-2:]) < sum(values[:2])
    assert all("sharpness" in row for row in logged)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_trainer_without_perturbation_is_the_trainer(transformers, smoothing):
    """rho = 0 and all samples: what Trainer itself does, with accumulation and clipping."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "optim": "sgd"}
    options["label_smoothing_factor"] = smoothing
    ours = _trainer(transformers, esam={"rho": 0.0, "select": All()}, **options)
    theirs = transformers.Trainer(
        model=_language_model(transformers, "classes"),
        args=ours.args,
        train_dataset=Sentences("classes"),
    )
    # This model says that it divides its loss by the number of accumulated batches, and does not;
    # the Trainer's own smoothed loss is divided.
    theirs.loss_is_scaled_for_ga = smoothing > 0.0
    for trainer in (ours, theirs):
        transformers.set_seed(0)
        trainer.train()
    _same(ours.model, theirs.model, rtol=1e-4, atol=1e-5)


def _batch(kind, n=4):
    data = Sentences(kind)
    return {key: torch.stack([data[i][key] for i in range(n)]) for key in data[0]}


def _alone(model, batch):
    """Return the model's own loss of a batch of each sample alone, (b,)."""
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    return torch.stack([model(**row).loss for row in rows])


@pytest.mark.parametrize("kind", ["classes", "number", "several", "causal"])
def test_losses_are_the_models_own_of_each_sample(transformers, kind):
    from esam_torch.integrations.transformers import per_sample_losses

    model, batch = _language_model(transformers, kind).eval(), _batch(kind)
    if kind == "causal":
        batch["labels"] = batch["labels"].clone()
        batch["labels"][2, 3:] = -100
    found = per_sample_losses(model, batch)
    torch.testing.assert_close(found, _alone(model, batch))
    torch.testing.assert_close(
        found[1:3], per_sample_losses(model, {k: v[1:3] for k, v in batch.items()})
    )
    with pytest.raises(ValueError, match=r"must hold labels.*\['labels'\]"):
        per_sample_losses(model, {"input_ids": batch["input_ids"]})


def test_tokens_count_the_same_on_demand(transformers):
    from esam_torch.integrations.transformers import per_sample_losses

    model, batch = _language_model(transformers, "causal").eval(), _batch("causal")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][2, 3:] = -100
    tokens = (batch["labels"][:, 1:] != -100).sum(1).float()
    found = per_sample_losses(model, batch, items_per_sample=tokens.mean())
    torch.testing.assert_close(found.mean(), model(**batch).loss)
    torch.testing.assert_close(found, _alone(model, batch) * tokens / tokens.mean())


def test_a_sample_without_labels_has_the_loss_zero(transformers):
    from esam_torch.integrations.transformers import per_sample_losses

    model, batch = _language_model(transformers, "causal").eval(), _batch("causal")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = -100
    found = per_sample_losses(model, batch)
    assert found[1] == 0.0 and found.isfinite().all()


def _lora(transformers):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(
        r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    return peft.get_peft_model(_language_model(transformers, "causal"), options)


def _subclass(transformers):
    class Mine(transformers.GPT2LMHeadModel):
        pass

    return Mine(_language_model(transformers, "causal").config)


def _bart(transformers):
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    return transformers.BartForCausalLM(config)  # whose labels are not shifted


def _experts(transformers):
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    return transformers.MixtralForCausalLM(config)


def _own_loss_function(transformers):
    def halved(logits, labels, vocab_size, **_):
        return 0.5 * F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))

    model = _language_model(transformers, "causal")
    model.loss_function = halved
    return model


@pytest.mark.parametrize("make", [_lora, _subclass, _bart, _experts, _own_loss_function])
def test_whatever_is_around_a_model_or_in_its_loss_is_kept(transformers, make):
    from esam_torch.integrations.transformers import per_sample_losses

    torch.manual_seed(0)
    model, batch = make(transformers).eval(), _batch("causal")
    outputs = model(**batch)
    found = per_sample_losses(model, batch)
    torch.testing.assert_close(found.mean(), outputs.loss)
    if make is _experts:
        auxiliary = 0.1 * outputs.aux_loss
        assert auxiliary > 0.01
        model.config.output_router_logits = False
        found = found - auxiliary
    torch.testing.assert_close(found, _alone(model, batch))


@pytest.mark.parametrize(
    ("kind", "labels", "outputs"),
    [
        ("regression", torch.randn(4, 3), 3),
        ("regression", torch.randn(4), 1),
        ("multi_label_classification", torch.ones(4, 1), 1),
        ("single_label_classification", torch.arange(4) % 2, 2),
    ],
)
def test_problem_types_are_followed(transformers, kind, labels, outputs):
    from esam_torch.integrations.transformers import per_sample_losses

    config = _language_model(transformers, "classes").config
    config.num_labels, config.problem_type = outputs, kind
    model = transformers.DistilBertForSequenceClassification(config).eval()
    batch = {**_batch("classes"), "labels": labels}
    found = per_sample_losses(model, batch)
    torch.testing.assert_close(found.mean(), model(**batch).loss)
    torch.testing.assert_close(found, _alone(model, batch))


def test_sums_of_a_batch_stay_sums(transformers):
    from esam_torch.integrations.transformers import per_sample_losses

    config = transformers.Wav2Vec2Config(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8],
        conv_kernel=[10],
        conv_stride=[5],
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    labels = torch.randint(1, 20, (4, 6))
    labels[1, 3:] = -100
    batch = {"input_values": torch.randn(4, 400), "labels": labels}
    for reduction in ("sum", "mean"):
        config.ctc_loss_reduction = reduction
        model = transformers.Wav2Vec2ForCTC(config).eval()
        found = per_sample_losses(model, batch)
        torch.testing.assert_close(found, _alone(model, batch))
        torch.testing.assert_close(getattr(found, reduction)(), model(**batch).loss)


def test_losses_that_cannot_be_taken_per_sample_are_refused(transformers):
    def loss_by_hand(logits, labels, **_):
        return -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()

    def of_another_mean(logits, labels, vocab_size, **_):
        return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1)).exp()

    def branching(logits, labels, vocab_size, **_):
        loss = F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))
        return loss if loss > 0 else 2 * loss

    for function, words in (
        (loss_by_hand, "GPT2LMHeadModel cannot be taken per sample: it is not made of"),
        (of_another_mean, "mean of the losses per sample must be the loss of GPT2LMHeadModel"),
        (branching, "its code does not work with one loss per sample"),
    ):
        trainer = _trainer(transformers, "causal")
        trainer.model.loss_function = function
        before = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(ValueError, match=f"{words}.*`ESAMTrainer.compute_losses`"):
            trainer.train()
        assert trainer.model.training
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_the_first_check_changes_nothing(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Unchecked(ESAMTrainer):
        def compute_losses(self, *args):
            return super().compute_losses(*args)

    trainers = [_trainer(transformers, "causal", cls=cls) for cls in (None, Unchecked)]
    for trainer in trainers:  # GPT2 has dropout by default
        transformers.set_seed(0)
        trainer.train()
    first, second = (list(t.model.parameters()) for t in trainers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["classes", "causal"])
def test_smoothed_losses_are_those_of_the_trainer(transformers, kind):
    trainer = _trainer(transformers, kind, label_smoothing_factor=0.2)
    model, batch = trainer.model.eval(), _batch(kind)
    found = trainer.compute_losses(model, batch)
    theirs = transformers.Trainer.compute_loss(trainer, model, dict(batch))
    torch.testing.assert_close(found.mean(), theirs)
    plain = _alone(model, batch)
    assert found.shape == (4,) and not torch.allclose(found, plain)
    trainer.label_smoother.epsilon = 0.0
    torch.testing.assert_close(trainer.compute_losses(model, batch), plain)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_tokens_weighted_trainer_is_the_trainer(transformers, accumulate):
    """rho = 0 and all samples: what Trainer itself does with samples of several lengths."""

    class Ragged(Sentences):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            labels = row["labels"].clone()
            labels[: i % 6] = -100
            return {**row, "labels": labels}

    def trained(token_weighted):
        options = {"gradient_accumulation_steps": accumulate, "optim": "sgd"}
        trainer = _trainer(
            *(transformers, "causal", {"rho": 0.0, "select": All()}),
            more={"token_weighted": token_weighted},
            **options,
        )
        theirs = transformers.Trainer(
            model=_language_model(transformers, "causal"), args=trainer.args
        )
        for each in (trainer, theirs):
            each.train_dataset = Ragged("causal")
            transformers.set_seed(0)
            each.train()
        return trainer.model, theirs.model

    _same(*trained(True), rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        _same(*trained(False), rtol=1e-4, atol=1e-6)


def test_tokens_are_weighted_where_they_are_counted(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def compute_losses(self, model, inputs):
            return super().compute_losses(model, inputs)

    with pytest.raises(ValueError, match="`token_weighted` must be False where `compute_losses`"):
        _trainer(transformers, cls=Own, more={"token_weighted": True})
    trainer = _trainer(transformers, more={"token_weighted": True})
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(ValueError, match="`token_weighted` must be False for this model"):
        trainer.train()


def test_losses_that_would_not_be_trained_with_are_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(TypeError, match=r"in place of `compute_loss`.*Received: .* of Own"):
        _trainer(transformers, cls=Own)


def test_losses_of_ones_own_are_trained_with(transformers):
    """By `compute_losses`, by `compute_loss_func`, by a Trainer with a `compute_loss`."""
    from esam_torch.integrations.transformers import ESAMTrainer

    weights = torch.tensor([1.0, 2.0, 4.0])

    class Losses(ESAMTrainer):
        def compute_losses(self, model, inputs):
            logits = model(**inputs).logits
            return F.cross_entropy(logits, inputs["labels"], weights, reduction="none")

    def weighted(outputs, labels, **_):
        return F.cross_entropy(outputs.logits, labels, weights, reduction="sum") / len(labels)

    class WithLoss(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            loss = weighted(outputs, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    class Both(ESAMTrainer, WithLoss):
        pass

    trainers = [
        _trainer(transformers, cls=Losses, optim="sgd"),
        _trainer(transformers, more={"compute_loss_func": weighted}, optim="sgd"),
        _trainer(transformers, cls=Both, optim="sgd"),
    ]
    for trainer in trainers:
        transformers.set_seed(0)
        trainer.train()
    for trainer in trainers[1:]:
        _same(trainer.model, trainers[0].model)


def test_sharpness_is_the_mean_since_it_was_last_logged(transformers):
    kept = []

    from esam_torch.integrations.transformers import ESAMTrainer

    class Watching(ESAMTrainer):
        def training_step(self, *args, **kwargs):
            before = float(self._means._sums.get("sharpness", 0.0))
            loss = super().training_step(*args, **kwargs)
            kept.append(float(self._means._sums["sharpness"]) - before)
            return loss

    trainer = _trainer(transformers, cls=Watching, logging_steps=4)
    trainer.train()
    found = [row["sharpness"] for row in trainer.state.log_history if "sharpness" in row]
    assert found == pytest.approx([sum(kept[:4]) / 4, sum(kept[4:]) / 4], rel=1e-5)
    never = _trainer(transformers, logging_strategy="no")
    never.train()
    means = never._means
    assert means._counts["sharpness"] == 8 and means._sums["sharpness"].numel() == 1  # a sum


def test_trainer_scales_ascent_and_descent(transformers):
    trainer, twin = (_trainer(transformers, max_grad_norm=0.0) for _ in range(2))
    scaler = trainer.accelerator.scaler = RecordingScaler()
    for each in (trainer, twin):
        transformers.set_seed(0)
        each.train()
    assert len(scaler.seen) == 2 * trainer.optimizer.optimizer.count == 2 * 8
    assert scaler.get_scale() == 8.0  # no overflow: every update was made
    _same(trainer.model, twin.model, rtol=1e-4, atol=1e-4)


def test_trainer_goes_on_from_its_checkpoint(transformers, tmp_path):
    whole = _trainer(transformers, save_strategy="epoch", output_dir=str(tmp_path / "a"))
    whole.train()
    resumed = _trainer(transformers, save_strategy="no", output_dir=str(tmp_path / "b"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# -- Lightning -------------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


def _classifier(lightning, **options):
    from esam_torch.integrations.lightning import ESAMMixin

    class Classifier(ESAMMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = _model()
            self.dtypes = set()

        def forward(self, inputs):
            outputs = self.layers(inputs)
            self.dtypes.add(outputs.dtype)
            return outputs

        def losses(self, inputs, targets):
            return F.cross_entropy(self(inputs), targets, reduction="none")

        def configure_optimizers(self):
            self.esam = _esam(self, **options)
            return [self.esam], [torch.optim.lr_scheduler.StepLR(self.esam, 100)]

    return Classifier()


def _lightning_trainer(lightning, folder, **options):
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_is_the_plain_loop(lightning, tmp_path, accumulate):
    module = _classifier(lightning)
    trainer = _lightning_trainer(
        lightning, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=0.1
    )
    trainer.fit(module, DataLoader(_data(), batch_size=8))
    assert trainer.global_step == 8 // accumulate and module.esam.count == 8
    assert float(trainer.logged_metrics["sharpness"]) == float(module.report.sharpness)
    assert float(trainer.logged_metrics["train_loss"]) == float(module.report.loss)
    twin = _model()
    batches = list(DataLoader(_data(), batch_size=8))
    _same(module.layers, _by_hand(twin, _esam(twin), batches, accumulate, clip=0.1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_in_other_precisions(lightning, tmp_path, precision):
    module = _classifier(lightning, perturb=Everything())
    trainer = _lightning_trainer(lightning, tmp_path, gradient_clip_val=0.1)
    if precision == "16-mixed":
        # Lightning's own plugin for fp16 wants a GPU by name; its scaler works on a CPU as well.
        from lightning.pytorch.plugins import MixedPrecision

        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        trainer = _lightning_trainer(lightning, tmp_path, plugins=[plugin], gradient_clip_val=0.1)
    else:
        trainer = _lightning_trainer(
            lightning, tmp_path, precision=precision, gradient_clip_val=0.1
        )
    trainer.fit(module, DataLoader(_data(), batch_size=8))
    assert module.dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    twin = _model()
    batches = list(DataLoader(_data(), batch_size=8))
    _by_hand(twin, _esam(twin, perturb=Everything()), batches, clip=0.1)
    _same(module.layers, twin, rtol=0.0, atol=0.1)


def test_lightning_scales_ascent_and_descent(lightning, tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    module, scaler = _classifier(lightning), RecordingScaler()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    _lightning_trainer(lightning, tmp_path, plugins=[plugin]).fit(
        module, DataLoader(_data(), batch_size=8)
    )
    ones, ascents = scaler.seen[::2], scaler.seen[1::2]
    assert ones == [1.0] * 8  # the loss that Lightning gets, and whose scale the descent's has
    assert len(ascents) == 8 and ascents[-1] == float(module.report.loss)


def test_lightning_goes_on_from_its_checkpoint(lightning, tmp_path):
    loader = DataLoader(_data(), batch_size=8)
    whole, module, again = (_classifier(lightning) for _ in range(3))
    _lightning_trainer(lightning, tmp_path, max_epochs=2).fit(whole, loader)
    trainer = _lightning_trainer(lightning, tmp_path)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = _lightning_trainer(lightning, tmp_path, max_epochs=2)
    other.fit(again, loader, ckpt_path=tmp_path / "one.ckpt")
    assert again.esam.count == whole.esam.count == 16
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lightning_says_what_is_missing(lightning):
    from esam_torch.integrations.lightning import ESAMMixin

    class Nothing(ESAMMixin, lightning.LightningModule):
        pass

    with pytest.raises(TypeError, match="must have a method `losses`"):
        Nothing().losses(torch.ones(2))


def test_lightning_names_a_training_step_that_was_left_in_place(lightning, tmp_path):
    class Left(type(_classifier(lightning))):
        def training_step(self, batch, batch_idx):
            return self.losses(*batch).mean()

    with pytest.raises(TypeError, match=r"`training_step` must be ESAMMixin's.*`losses`.*Left"):
        _lightning_trainer(lightning, tmp_path).fit(Left(), DataLoader(_data(), batch_size=8))


# -- two ranks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    for name in ("accelerate", "transformers", "lightning"):
        pytest.importorskip(name)
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed")
    # One start for all three: most of its time is imports of the libraries.
    results = launch(CASES / "integrations.py", tmp_path_factory.mktemp("ranks"))

    def case(name):
        first, second = value(results, name)
        assert first == second  # the weights' bits, on both ranks
        return first

    return case


@pytest.mark.slow
def test_ranks_train_one_model_in_accelerate_and_trainer(ranks):
    accumulated, skipping, refused = ranks("accelerate")
    assert accumulated[1] and skipping[1]
    assert '`on_nonfinite` must be "propagate" or "raise" where several' in refused
    assert ranks("trainer")[1]


@pytest.mark.slow
def test_ranks_train_one_model_in_lightning(ranks):
    assert ranks("lightning")[1:] == [True, [False] * 4]
    # NaN on one rank alone: both leave the batch out, or both raise.
    _, finite, skipped = ranks("lightning_skips")
    assert finite and sum(skipped) == 1
    name, message = ranks("lightning_raises")
    assert name == "NonFiniteError"
    name, message = ranks("lightning_refuses_to_skip_what_it_accumulates")
    assert name == "ESAMValueError" and "`on_nonfinite` must be" in message


@pytest.mark.slow
def test_ranks_find_unused_parameters_in_lightning(ranks):
    *unused, none, plain = ranks("lightning_with_unused_parameters")
    assert all(found[1:] == [True, [False] * 4] for found in unused)
    assert none == plain
