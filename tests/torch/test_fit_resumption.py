"""Resuming `fit`: only with the settings and the batches that the run was started with."""

import re

import pytest
import torch
from tests.torch.fitted import (
    QUIETLY,
    interrupt,
    make_batches,
    make_data,
    make_model,
    model_losses,
    run_fit,
)
from torch.optim.lr_scheduler import (
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, RandomSampler

from esam_torch import ESAM, Only, SideBySide, Suffix, fit


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.1)


def side_by_side(model):
    first, *_, last = model
    return SideBySide(sgd(first), torch.optim.SGD(last.parameters(), lr=0.1))


def train(folder, epochs, make=sgd, *, esam=True, scheduler=None, losses=model_losses, **options):
    """Train in new objects, as in a new process; resume if there is a checkpoint."""
    model = make_model()
    base = make(model)
    optimizer = ESAM(base, model, **options) if esam else base
    return model, fit(
        *(model, optimizer, losses, make_batches()),
        **{**QUIETLY, "epochs": epochs},
        scheduler=None if scheduler is None else scheduler(optimizer),
        folder=folder,
        resume=True,
    )


def grouped(**options):
    return lambda model: torch.optim.SGD([{"params": model.parameters(), **options}], lr=0.1)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"rho": 0.4}, "`rho`: 0.05 in the checkpoint, 0.4 in code."),
        (
            {"perturb": Suffix(0.5)},
            {"perturb": Suffix("3")},
            "`perturb`: Suffix(start=0.5) in the checkpoint, Suffix(start='3') in code.",
        ),
        ({"perturb": Only(lambda unit: True)}, {}, "`perturb`: None in the checkpoint, Bernoulli("),
        ({"budget": 1.8}, {"budget": 2.0}, "`budget`: 1.8 in the checkpoint, 2.0 in code."),
        ({"budget": 1.8}, {}, "`budget`: 1.8 in the checkpoint, None in code."),
        (
            {"make": grouped(esam_rho=0.3)},
            {"make": grouped()},
            "`esam_rho` of parameter group 0: 0.3 in the checkpoint, None in code.",
        ),
        (
            {"esam": False},
            {"esam": False, "make": lambda model: sgd(model, lr=0.2)},
            "`lr` of parameter group 0: 0.1 in the checkpoint, 0.2 in code.",
        ),
        (
            {"scheduler": lambda o: StepLR(o, 1)},
            {"scheduler": lambda o: StepLR(o, 2)},
            "`step_size` of the scheduler: 1 in the checkpoint, 2 in code.",
        ),
        (
            {"scheduler": lambda o: StepLR(o, 1)},
            {},
            "`scheduler`: 'StepLR' in the checkpoint, None in code",
        ),
        (
            {"scheduler": lambda o: StepLR(o, 1)},
            {"scheduler": lambda o: LambdaLR(o, lambda _: 1.0)},
            "`scheduler`: 'StepLR' in the checkpoint, 'LambdaLR' in code",
        ),
        ({}, {"esam": False}, "`optimizer`: 'ESAM(SGD)' in the checkpoint, 'SGD' in code"),
        (
            {},
            {"make": adam},
            "`optimizer`: 'ESAM(SGD)' in the checkpoint, 'ESAM(Adam)' in code",
        ),
        (
            {},
            {"make": side_by_side},
            "`optimizer`: 'ESAM(SGD)' in the checkpoint, 'ESAM(SideBySide(SGD, SGD))' in code",
        ),
    ],
)
def test_changed_settings_are_refused(first, second, words, tmp_path):
    """The checkpoint would replace them; a finished run would return its old history."""
    train(tmp_path, 1, **first)
    before = (tmp_path / "last.pt").read_bytes()
    for epochs in (1, 2):
        with pytest.raises(ValueError, match=re.escape(words)) as raised:
            train(tmp_path, epochs, **second)
    assert "another `folder`, or resume=False" in str(raised.value)
    assert (tmp_path / "last.pt").read_bytes() == before
    train(tmp_path, 2, **first)  # the same settings: it resumes


@pytest.mark.parametrize("scheduler_step", ["epoch", "batch"])
@pytest.mark.parametrize("kind", ["sgd", "esam"])
def test_what_a_schedule_changes_is_no_changed_setting(kind, scheduler_step, tmp_path):
    def schedule(optimizer):
        return OneCycleLR(optimizer, 0.2, total_steps=40)

    options = {"scheduler": schedule, "scheduler_step": scheduler_step}
    _, whole = run_fit(kind, 3, **options)
    run_fit(kind, 1, folder=tmp_path, **options)
    for epochs in (2, 3):
        _, history = run_fit(kind, epochs, folder=tmp_path, resume=True, **options)
    assert history["learning_rate"] == whole["learning_rate"]
    assert history["train_loss"] == whole["train_loss"]


def test_the_same_objects_resume_after_an_interrupt(tmp_path):
    """As in a notebook: their learning rate is already that of a later update."""
    model = make_model()
    optimizer = ESAM(sgd(model), model, budget=1.8)
    scheduler = StepLR(optimizer, 1, gamma=0.9)
    options = {**QUIETLY, "epochs": 3, "scheduler": scheduler, "scheduler_step": "batch"}
    options |= {"folder": tmp_path, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        fit(model, optimizer, interrupt(13), make_batches(), **options)
    history = fit(model, optimizer, model_losses, make_batches(), **options)
    assert history["learning_rate"] == pytest.approx([0.1, 0.1 * 0.9**4, 0.1 * 0.9**8])
    # A new process is compared with the first one.
    again = train(tmp_path, 3, scheduler=lambda o: StepLR(o, 1, gamma=0.9), budget=1.8)[1]
    assert again.rows == history.rows


def loader(batch=8, data=None):
    return DataLoader(make_data(48) if data is None else data, batch)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loader": loader(16)}, "`loader.batch_size`: 8 in the checkpoint, 16 in code"),
        ({"loader": loader(16)}, "`len(loader)`: 6 in the checkpoint, 3 in code"),
        ({"loader": loader(data=make_data(47))}, "`len(loader.dataset)`: 48 in the checkpoint, 47"),
        ({"accumulate": 1}, "`accumulate`: 2 in the checkpoint, 1 in code"),
        ({"loader": iter}, "`len(loader)`: 6 in the checkpoint, None in code"),
    ],
)
def test_an_interrupted_epoch_resumes_only_with_the_same_batches(changed, words, tmp_path):
    """Others were skipped as if the checkpoint had trained on them."""

    def resume(losses=model_losses, loader=loader(), accumulate=2):  # noqa: B008
        model = make_model()
        options = {**QUIETLY, "accumulate": accumulate, "save_every": 1}
        options |= {"folder": tmp_path, "resume": True}
        return fit(model, ESAM(sgd(model), model), losses, loader, **options)

    with pytest.raises(KeyboardInterrupt):
        resume(interrupt(9))
    with pytest.raises(ValueError, match=re.escape(words)):
        resume(**changed)
    history = resume()
    assert history.last["sample_share"] == 0.5
    assert history.last["samples_per_second"] * history.last["seconds"] == pytest.approx(48)


def test_the_time_of_an_epoch_includes_that_before_an_interruption(tmp_path, monkeypatch):
    """But not that for which its batches are skipped."""
    now = [0.0]
    monkeypatch.setattr("esam_torch.fitting.loop.time.perf_counter", lambda: now[0])

    class Batches:
        def __iter__(self):
            for batch in make_batches():
                now[0] += 1.0
                yield batch

    def resume(losses, folder):
        model = make_model()
        options = {**QUIETLY, "save_every": 1, "folder": folder, "resume": True}
        return fit(model, ESAM(sgd(model), model), losses, Batches(), **options)

    assert resume(model_losses, tmp_path / "whole")["seconds"] == [4.0]
    with pytest.raises(KeyboardInterrupt):
        resume(interrupt(5), tmp_path / "again")
    assert resume(model_losses, tmp_path / "again")["seconds"] == [4.0]


def test_an_interrupted_epoch_of_fewer_batches_is_refused(tmp_path):
    """A generator has no length to compare."""

    class Batches:
        def __init__(self, n):
            self.n = n

        def __iter__(self):
            return iter(make_batches(n=self.n))

    def resume(losses, n):
        model = make_model()
        options = {**QUIETLY, "save_every": 1, "folder": tmp_path, "resume": True}
        return fit(model, ESAM(sgd(model), model), losses, Batches(n), **options)

    with pytest.raises(KeyboardInterrupt):
        resume(interrupt(5), 4)
    with pytest.raises(ValueError, match=r"the 2 updates of this epoch.*Received: batches of 1"):
        resume(model_losses, 1)
    assert len(resume(model_losses, 4)) == 1


# SequentialLR passes an epoch, and torch 2.6 warns about its own call.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_a_sequence_of_schedulers_resumes(tmp_path):
    """MultiStepLR keeps its milestones in a Counter, which a dictionary does not replace."""

    def schedule(optimizer):
        parts = [LinearLR(optimizer, 0.1, 1, 2), MultiStepLR(optimizer, [2, 3])]
        return SequentialLR(optimizer, parts, milestones=[3])

    _, whole = run_fit("esam", 6, scheduler=schedule)
    run_fit("esam", 2, scheduler=schedule, folder=tmp_path)
    _, history = run_fit("esam", 6, scheduler=schedule, folder=tmp_path, resume=True)
    assert history["learning_rate"] == whole["learning_rate"]


def test_layers_load_with_the_version_that_they_were_saved_with(tmp_path):
    versions = []

    class Versioned(torch.nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            versions.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    def run(epochs):
        torch.manual_seed(0)
        model = Versioned(6, 3)
        options = {**QUIETLY, "epochs": epochs, "folder": tmp_path, "resume": True}
        fit(model, ESAM(sgd(model), model), model_losses, make_batches(), **options)

    run(1)
    run(2)
    assert versions == [3]


def test_a_plan_that_was_printed_is_no_changed_setting(tmp_path):
    """`plan` replaces sampler and selector by those that the budget chooses."""

    def run(epochs, *, plan):
        model = make_model()
        optimizer = ESAM(sgd(model), model, budget=1.8)
        batches = make_batches()
        if plan:
            optimizer.plan(lambda *batch: model_losses(model, *batch), *batches[0])
        return fit(
            *(model, optimizer, model_losses, batches),
            **{**QUIETLY, "epochs": epochs},
            folder=tmp_path,
            resume=True,
        )

    run(1, plan=True)
    assert len(run(2, plan=False)) == 2
    assert len(run(3, plan=True)) == 3


def test_a_run_of_used_objects_resumes_in_a_new_process(tmp_path):
    model = make_model()
    optimizer = ESAM(sgd(model), model)
    scheduler = StepLR(optimizer, 1)
    for folder, epochs in (("warm-up", 1), ("run", 2)):
        fit(
            *(model, optimizer, model_losses, make_batches()),
            **{**QUIETLY, "epochs": epochs},
            scheduler=scheduler,
            folder=tmp_path / folder,
        )
    _, history = train(tmp_path / "run", 3, scheduler=lambda optimizer: StepLR(optimizer, 1))
    assert len(history) == 3


def test_the_generator_of_the_evaluation_data_is_resumed(tmp_path):
    def evaluated(generators=1):
        data = make_data()
        drawn = RandomSampler(data, replacement=True, num_samples=7)
        drawn.generator = torch.Generator().manual_seed(3) if generators else None
        return DataLoader(data, 7, sampler=drawn)

    _, whole = run_fit(epochs=3, eval_loader=evaluated())
    run_fit(epochs=1, eval_loader=evaluated(), folder=tmp_path)
    options = {"epochs": 3, "folder": tmp_path, "resume": True}
    with pytest.raises(ValueError, match=r"as many generators .* written, 2\. Received: 1\."):
        run_fit(eval_loader=evaluated(0), **options)
    _, history = run_fit(eval_loader=evaluated(), **options)
    assert history["eval_loss"] == whole["eval_loss"]
    assert len(set(history["eval_loss"])) == 3


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path):
    train(tmp_path, 1)
    state = torch.load(tmp_path / "last.pt")
    del state["ranks"][0]["samples"]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"Received: .*last\.pt, of another version"):
        train(tmp_path, 2)
