"""ESAM in Hugging Face's Trainer, through `compute_loss`."""

import copy
import warnings

import pytest
import torch
from tests.torch.language import Sentences, alone, language_model, sentences
from tests.torch.trainers import THEIRS, RecordingScaler, both_settings, same
from torch.nn import functional as F

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch import ESAM, All

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return module


def _trainer(transformers, kind="classes", esam=None, cls=None, more=None, **arguments):
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


@pytest.mark.parametrize("kind", ["classes", "number", "several", "causal"])
def test_trainer_trains(transformers, kind):
    trainer = _trainer(transformers, kind, num_train_epochs=4)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    values = [row["loss"] for row in logged]
    assert sum(values[-2:]) < sum(values[:2])
    assert all("sharpness" in row for row in logged)


# A warning of the compiler about tensors that it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:With `torch_compile=True` and the model's own loss")
@pytest.mark.filterwarnings("ignore:The model or code that `losses` calls is compiled")
@pytest.mark.parametrize(
    "option",
    [
        *("bf16", "gradient_checkpointing"),
        pytest.param(
            "torch_compile",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not hasattr(torch.compiler, "is_exporting"),
                    reason="transformers' masks call torch.compiler.is_exporting: torch 2.7",
                ),
            ],
        ),
    ],
)
def test_other_ways_in_which_trainer_runs_a_model(transformers, option):
    """Each pass runs the model like Trainer: the weights change in the same way."""
    options = {"optim": "sgd", "max_grad_norm": 0.0, "esam": {"rho": 0.5, "select": All()}}
    if option == "torch_compile":
        options["torch_compile_backend"] = "eager"
    plain, other = (_trainer(transformers, max_steps=2, **{option: on}, **options) for on in (0, 1))
    start = torch.nn.utils.parameters_to_vector(plain.model.parameters()).detach().clone()
    ends = []
    for trainer in (plain, other):
        transformers.set_seed(0)
        trainer.train()
        ends.append(torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach())
    moved = (ends[0] - start).norm()
    # bfloat16 has 8 bits.
    assert (ends[1] - ends[0]).norm() < (0.05 if option == "bf16" else 1e-4) * moved


@pytest.mark.parametrize("own", [False, True])
def test_compiling_the_models_own_loss_warns(transformers, own):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Losses(ESAMTrainer):
        def compute_losses(self, model, inputs):
            return model(**inputs).logits.square().mean(-1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _trainer(transformers, cls=Losses if own else None, torch_compile=True)
    found = [warning for warning in caught if "each step compiles" in str(warning.message)]
    assert len(found) == (not own) and all(w.filename == __file__ for w in found)


@both_settings
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_equals_the_plain_loop(transformers, accumulate, options):
    """Everything around `optimizer.loss`: accumulation, and Trainer's updates."""
    from esam_torch.integrations.transformers import per_sample_losses

    esam = options or {"rho": 0.5, "gamma": 0.25}
    trainer = _trainer(
        *(transformers, "causal", esam),
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    twin = language_model(transformers, "causal")
    for model in (trainer.model, twin):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attn_pdrop = 0.0
    trainer.train()
    base = torch.optim.SGD(twin.parameters(), lr=1e-2)
    optimizer = ESAM(base, twin, **esam)
    batches = [
        {key: value[i : i + 8] for key, value in sentences("causal", 32).items()}
        for i in range(0, 32, 8)
    ]
    for i in range(0, 8, accumulate):
        optimizer.zero_grad()
        for batch in (2 * batches)[i : i + accumulate]:
            loss = optimizer.loss(lambda b: per_sample_losses(twin, b), batch)
            (loss / accumulate).backward()
        optimizer.step()
    same(trainer.model, twin)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_without_perturbation_it_equals_trainer(transformers, smoothing):
    """rho = 0 and all samples: the same as Trainer, with accumulation and clipping."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "optim": "sgd"}
    options["label_smoothing_factor"] = smoothing
    ours = _trainer(transformers, esam={"rho": 0.0, "select": All()}, **options)
    theirs = transformers.Trainer(
        model=language_model(transformers, "classes"),
        args=ours.args,
        train_dataset=Sentences("classes"),
    )
    # This model claims to divide its loss by the number of accumulated batches, but does not.
    # Trainer's own smoothed loss is divided.
    theirs.loss_is_scaled_for_ga = smoothing > 0.0
    for trainer in (ours, theirs):
        transformers.set_seed(0)
        trainer.train()
    same(ours.model, theirs.model, rtol=1e-4, atol=1e-5)


def test_losses_that_cannot_be_computed_per_sample_are_refused(transformers):
    def loss_by_hand(logits, labels, **_):
        return -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()

    def of_another_mean(logits, labels, vocab_size, **_):
        return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1)).exp()

    def of_the_batch(logits, labels, vocab_size, **_):
        loss = F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), reduction="sum")
        return loss / labels.numel()

    def with_class_weights(logits, labels, vocab_size, **_):
        weights = torch.linspace(1.0, 9.0, vocab_size)
        return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), weights)

    def branching(logits, labels, vocab_size, **_):
        loss = F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))
        return loss if loss > 0 else 2 * loss

    for function, words in (
        (loss_by_hand, "GPT2LMHeadModel cannot be computed per sample: it does not use"),
        (of_another_mean, "mean of the losses per sample must equal the loss of GPT2LMHeadModel"),
        (branching, "its code does not work with one loss per sample"),
        (of_the_batch, "must be a mean, or a sum that nothing changes"),
        (with_class_weights, "cross_entropy must not have class weights"),
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
def test_smoothed_losses_equal_those_of_trainer(transformers, kind):
    trainer = _trainer(transformers, kind, label_smoothing_factor=0.2)
    model, batch = trainer.model.eval(), sentences(kind)
    found = trainer.compute_losses(model, batch)
    theirs = transformers.Trainer.compute_loss(trainer, model, dict(batch))
    torch.testing.assert_close(found.mean(), theirs)
    plain = alone(model, batch)
    assert found.shape == (4,) and not torch.allclose(found, plain)
    trainer.label_smoother.epsilon = 0.0
    torch.testing.assert_close(trainer.compute_losses(model, batch), plain)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_token_weighting_it_equals_trainer(transformers, accumulate):
    """rho = 0 and all samples: the same as Trainer, with samples of different lengths."""

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
            model=language_model(transformers, "causal"), args=trainer.args
        )
        for each in (trainer, theirs):
            each.train_dataset = Ragged("causal")
            transformers.set_seed(0)
            each.train()
        return trainer.model, theirs.model

    same(*trained(True), rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        same(*trained(False), rtol=1e-4, atol=1e-6)


def test_token_weighting_needs_counted_tokens(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def compute_losses(self, model, inputs):
            return super().compute_losses(model, inputs)

    with pytest.raises(ValueError, match="`token_weighted` must be False if `compute_losses`"):
        _trainer(transformers, cls=Own, more={"token_weighted": True})
    trainer = _trainer(transformers, more={"token_weighted": True})
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(ValueError, match="`token_weighted` must be False for this model"):
        trainer.train()


def test_an_overridden_compute_loss_is_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(TypeError, match=r"instead of `compute_loss`.*Received: .* of Own"):
        _trainer(transformers, cls=Own)


def test_deepspeed_is_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Deep(ESAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(TypeError, match=r"`args.deepspeed` must be None"):
        _trainer(transformers, cls=Deep)


def test_custom_losses(transformers):
    """With `compute_losses`, `compute_loss_func`, or a Trainer that has a `compute_loss`."""
    from esam_torch.integrations.transformers import ESAMTrainer

    class Losses(ESAMTrainer):
        def compute_losses(self, model, inputs):
            logits = 2.0 * model(**inputs).logits
            return F.cross_entropy(logits, inputs["labels"], reduction="none")

    def sharper(outputs, labels, **_):
        return F.cross_entropy(2.0 * outputs.logits, labels)

    class WithLoss(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            loss = sharper(outputs, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    class Both(ESAMTrainer, WithLoss):
        pass

    trainers = [
        _trainer(transformers, cls=cls, more=more, optim="sgd", max_grad_norm=0.0)
        for cls, more in ((Losses, {}), (None, {"compute_loss_func": sharper}), (Both, {}))
    ]
    for trainer in trainers:
        transformers.set_seed(0)
        trainer.train()
    for trainer in trainers[1:]:
        same(trainer.model, trainers[0].model)


def test_custom_losses_get_no_number_of_items(transformers):
    def per_item(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = _trainer(transformers, more={"compute_loss_func": per_item})
    with pytest.raises(TypeError, match="NoneType") as caught:
        trainer.train()
    assert "`num_items_in_batch` is None here" in caught.value.__notes__[0]


def test_a_batch_of_one_sample_is_checked_too(transformers):
    def of_tokens(outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
        return losses.sum() / (num_items_in_batch or labels.numel())

    more = {"compute_loss_func": of_tokens, "token_weighted": True}
    esam = {"rho": 0.05, "gamma": 1.0}
    trainer = _trainer(transformers, "causal", esam, more=more, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="cannot be computed per sample"):
        trainer.train()


def test_sharpness_is_the_mean_since_it_was_last_logged(transformers):
    seen = []

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.append(float(optimizer.optimizer.report.sharpness))

    trainer = _trainer(transformers, logging_steps=4, more={"callbacks": [Watching()]})
    trainer.train()
    found = [row["sharpness"] for row in trainer.state.log_history if "sharpness" in row]
    assert found == pytest.approx([sum(seen[:4]) / 4, sum(seen[4:]) / 4], rel=1e-5)


def test_trainer_handles_the_scaler(transformers):
    trainer, twin = (_trainer(transformers, max_grad_norm=0.0) for _ in range(2))
    scaler = trainer.accelerator.scaler = RecordingScaler()
    for each in (trainer, twin):
        transformers.set_seed(0)
        each.train()
    assert len(scaler.seen) == trainer.optimizer.optimizer.count == 8
    assert scaler.get_scale() == 8.0  # no overflow: every update ran
    same(trainer.model, twin.model, rtol=1e-4, atol=1e-4)


def test_training_again_continues(transformers):
    trainer = _trainer(transformers, num_train_epochs=1)
    for epochs in (1, 2):
        trainer.train()
        esam = trainer.optimizer.optimizer
        assert type(esam) is ESAM and type(esam.base_optimizer) is torch.optim.AdamW
        assert esam.count == 4 * epochs


def test_a_given_esam_is_used(transformers):
    model = language_model(transformers, "classes")
    mine = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    trainer = _trainer(transformers, more={"optimizers": (mine, None), "model": model})
    trainer.train()
    assert trainer.optimizer.optimizer is mine and mine.count == 8


def test_a_given_esam_and_arguments_for_another_are_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    model = language_model(transformers, "classes")
    mine = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    given = {"optimizers": (mine, None), "model": model}
    words = r"`esam` must be None if the optimizer is an ESAM already.*Received: esam={'rho': 0.4}"
    with pytest.raises(ESAMValueError, match=words):
        _trainer(transformers, esam={"rho": 0.4}, more=given)

    class Creates(transformers.Trainer):
        def create_optimizer(self, *args):
            self.optimizer = ESAM(torch.optim.SGD(self.model.parameters(), lr=0.1), self.model)
            return self.optimizer

    class Both(ESAMTrainer, Creates):
        pass

    with pytest.raises(ESAMValueError, match=words):
        _trainer(transformers, esam={"rho": 0.4}, cls=Both).train()


def test_training_without_an_esam_is_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def create_optimizer(self, *args):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    with pytest.raises(ESAMTypeError, match=r"`return super\(\).create_optimizer\(\)`"):
        _trainer(transformers, cls=Own).train()

    class Wrapped(Own):
        def create_optimizer(self, *args):
            super().create_optimizer(*args)
            return ESAMTrainer.create_optimizer(self, *args)

    trainer = _trainer(transformers, cls=Wrapped, max_steps=2)
    trainer.train()
    assert type(trainer.optimizer.optimizer.base_optimizer) is torch.optim.SGD


@pytest.mark.parametrize(
    ("esam", "words"),
    [
        ({"rho": 0.1, "gama": 0.5}, "must be keyword arguments of ESAM: rho, .*Received: 'gama'"),
        ({"model": None}, "Received: 'model'"),
        (0.05, "`esam` must be a dictionary .*Received: esam=0.05"),
    ],
)
def test_what_esam_does_not_take_is_refused_at_once(transformers, esam, words):
    with pytest.raises(ESAMTypeError, match=words):
        _trainer(transformers, esam=esam)


def test_evaluation_is_that_of_trainer(transformers):
    trainer = _trainer(transformers, more={"eval_dataset": Sentences("classes")})
    trainer.train()
    count = trainer.optimizer.optimizer.count
    found = trainer.evaluate()["eval_loss"]
    theirs = transformers.Trainer(
        model=trainer.model, args=trainer.args, eval_dataset=Sentences("classes")
    )
    assert found == theirs.evaluate()["eval_loss"]
    assert trainer.optimizer.optimizer.count == count


def _predicted(transformers, compute_losses, **arguments):
    """Return the metrics of an evaluation with metrics, of a Trainer with these losses."""
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        pass

    Own.compute_losses = compute_losses
    seen = {}

    def metrics(given):
        seen["predictions"], seen["labels"] = map(torch.as_tensor, given)
        return {}

    more = {"eval_dataset": Sentences("classes"), "compute_metrics": metrics}
    trainer = _trainer(transformers, cls=Own, more=more, max_steps=2, **arguments)
    trainer.train()
    seen["loss"] = trainer.evaluate()["eval_loss"]
    return trainer, seen


def _weighted(logits, labels):
    weights = torch.tensor([1.0, 3.0, 9.0])
    return F.cross_entropy(logits, labels, weights, reduction="none")


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["labels", "no labels", "tuple", "outputs", "tensor"])
def test_evaluation_uses_overridden_losses(transformers, kind, smoothing):
    """The loss is the mean of `compute_losses`; predictions are the outputs of its model call."""

    def compute_losses(_, model, inputs):
        labels = inputs["labels"]
        given = {**inputs, "return_dict": kind != "tuple"}
        if kind != "labels":
            del given["labels"]
        outputs = model(**given)
        logits = outputs[0] if kind == "tuple" else outputs.logits
        losses = _weighted(logits, labels)
        if kind in ("outputs", "tensor"):
            model(**given)
            return losses, outputs if kind == "outputs" else logits
        return losses

    trainer, found = _predicted(transformers, compute_losses, label_smoothing_factor=smoothing)
    batch = sentences("classes", 32)
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    torch.testing.assert_close(found["predictions"], logits)
    assert torch.equal(found["labels"], batch["labels"])
    wanted = float(_weighted(logits, batch["labels"]).mean())
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert not trainer.model._forward_hooks


@pytest.mark.parametrize("calls", [0, 2])
def test_predictions_of_several_calls_are_refused(transformers, calls):
    def compute_losses(self, model, inputs):
        called = [model(**inputs).logits for _ in range(calls)]
        logits = called[0] if calls else self.model(**inputs).logits
        return _weighted(logits, inputs["labels"])

    if calls:
        with pytest.raises(ESAMValueError, match=r"must call `model` once.*Received: 2 calls"):
            _predicted(transformers, compute_losses)
    trainer, found = _predicted(transformers, compute_losses, prediction_loss_only=True)
    batch = sentences("classes", 32)
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    wanted = float(_weighted(logits, batch["labels"]).mean())
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)


def test_overridden_losses_may_have_labels_of_another_name(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def compute_losses(self, model, inputs):
            return _weighted(model(input_ids=inputs["input_ids"]).logits, inputs["target"])

    class Renamed(Sentences):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {"input_ids": row["input_ids"], "target": row["labels"]}

    names = {"remove_unused_columns": False, "label_names": ["target"]}
    trainer = _trainer(transformers, cls=Own, max_steps=2, **names)
    trainer.train_dataset = data = Renamed("classes")
    trainer.train()
    found = trainer.evaluate(data)["eval_loss"]
    batch = sentences("classes", 32)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits
    assert found == pytest.approx(float(_weighted(logits, batch["labels"]).mean()), rel=1e-5)


@both_settings
def test_trainer_resumes_from_its_checkpoint(transformers, tmp_path, options):
    first, second = (
        {"esam": options, "save_strategy": saved, "output_dir": str(tmp_path / name)}
        for saved, name in (("epoch", "a"), ("no", "b"))
    )
    whole = _trainer(transformers, **first)
    whole.train()
    resumed = _trainer(transformers, **second)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_several_gpus_in_one_process_are_refused(transformers, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ESAMValueError, match=r"one GPU per process.*Received: 2 GPUs"):
        _trainer(transformers, esam={"rho": 0.05})
