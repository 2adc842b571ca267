"""ESAM in Hugging Face's Trainer, through `compute_loss`."""

import warnings

import pytest
import torch
from tests.torch import trainers
from tests.torch.language import Sentences, language_model, sentences
from tests.torch.trainers import THEIRS, RecordingScaler, both_settings, new_trainer, same

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch import ESAM, All

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]


@pytest.mark.parametrize("kind", ["classes", "number", "several", "causal"])
def test_trainer_trains(transformers, kind):
    trainer = new_trainer(transformers, kind, num_train_epochs=4)
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
    plain, other = (
        new_trainer(transformers, max_steps=2, **{option: on}, **options) for on in (0, 1)
    )
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
        new_trainer(transformers, cls=Losses if own else None, torch_compile=True)
    found = [warning for warning in caught if "each step compiles" in str(warning.message)]
    assert len(found) == (not own) and all(w.filename == trainers.__file__ for w in found)


@both_settings
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_equals_the_plain_loop(transformers, accumulate, options):
    """Everything around `optimizer.loss`: accumulation, and Trainer's updates."""
    from esam_torch.integrations.transformers import per_sample_losses

    esam = options or {"rho": 0.5, "gamma": 0.25}
    trainer = new_trainer(
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
    ours = new_trainer(transformers, esam={"rho": 0.0, "select": All()}, **options)
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


def test_deepspeed_is_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Deep(ESAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(TypeError, match=r"`args.deepspeed` must be None"):
        new_trainer(transformers, cls=Deep)


def test_sharpness_is_the_mean_since_it_was_last_logged(transformers):
    seen = []

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.append(float(optimizer.optimizer.report.sharpness))

    trainer = new_trainer(transformers, logging_steps=4, more={"callbacks": [Watching()]})
    trainer.train()
    found = [row["sharpness"] for row in trainer.state.log_history if "sharpness" in row]
    assert found == pytest.approx([sum(seen[:4]) / 4, sum(seen[4:]) / 4], rel=1e-5)


def test_trainer_handles_the_scaler(transformers):
    trainer, twin = (new_trainer(transformers, max_grad_norm=0.0) for _ in range(2))
    scaler = trainer.accelerator.scaler = RecordingScaler()
    for each in (trainer, twin):
        transformers.set_seed(0)
        each.train()
    assert len(scaler.seen) == trainer.optimizer.optimizer.count == 8
    assert scaler.get_scale() == 8.0  # no overflow: every update ran
    same(trainer.model, twin.model, rtol=1e-4, atol=1e-4)


def test_training_again_continues(transformers):
    trainer = new_trainer(transformers, num_train_epochs=1)
    for epochs in (1, 2):
        trainer.train()
        esam = trainer.optimizer.optimizer
        assert type(esam) is ESAM and type(esam.base_optimizer) is torch.optim.AdamW
        assert esam.count == 4 * epochs


def test_a_given_esam_is_used(transformers):
    model = language_model(transformers, "classes")
    mine = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    trainer = new_trainer(transformers, more={"optimizers": (mine, None), "model": model})
    trainer.train()
    assert trainer.optimizer.optimizer is mine and mine.count == 8


def test_a_given_esam_and_arguments_for_another_are_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    model = language_model(transformers, "classes")
    mine = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    given = {"optimizers": (mine, None), "model": model}
    words = r"`esam` must be None if the optimizer is an ESAM already.*Received: esam={'rho': 0.4}"
    with pytest.raises(ESAMValueError, match=words):
        new_trainer(transformers, esam={"rho": 0.4}, more=given)

    class Creates(transformers.Trainer):
        def create_optimizer(self, *args):
            self.optimizer = ESAM(torch.optim.SGD(self.model.parameters(), lr=0.1), self.model)
            return self.optimizer

    class Both(ESAMTrainer, Creates):
        pass

    with pytest.raises(ESAMValueError, match=words):
        new_trainer(transformers, esam={"rho": 0.4}, cls=Both).train()


def test_training_without_an_esam_is_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def create_optimizer(self, *args):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    with pytest.raises(ESAMTypeError, match=r"`return super\(\).create_optimizer\(\)`"):
        new_trainer(transformers, cls=Own).train()

    class Wrapped(Own):
        def create_optimizer(self, *args):
            super().create_optimizer(*args)
            return ESAMTrainer.create_optimizer(self, *args)

    trainer = new_trainer(transformers, cls=Wrapped, max_steps=2)
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
        new_trainer(transformers, esam=esam)


@both_settings
def test_trainer_resumes_from_its_checkpoint(transformers, tmp_path, options):
    first, second = (
        {"esam": options, "save_strategy": saved, "output_dir": str(tmp_path / name)}
        for saved, name in (("epoch", "a"), ("no", "b"))
    )
    whole = new_trainer(transformers, **first)
    whole.train()
    resumed = new_trainer(transformers, **second)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_callback_changes_rho_of_a_resumed_run(transformers, tmp_path):
    seen = []

    class SetRho(transformers.TrainerCallback):
        def on_train_begin(self, *_, optimizer=None, **__):
            for group in optimizer.param_groups:
                group["esam_rho"] = 0.1

        def on_step_end(self, *_, optimizer=None, **__):
            seen.append(float(optimizer.optimizer.report.perturbation_norm))

    options = {"esam": {"rho": 0.4, "beta": 1.0}, "output_dir": str(tmp_path)}
    new_trainer(transformers, save_strategy="epoch", **options).train()
    resumed = new_trainer(transformers, save_strategy="no", **options)
    resumed.add_callback(SetRho())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen and seen == pytest.approx([0.1] * len(seen), rel=1e-3)


def test_several_gpus_in_one_process_are_refused(transformers, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ESAMValueError, match=r"one GPU per process.*Received: 2 GPUs"):
        new_trainer(transformers, esam={"rho": 0.05})
