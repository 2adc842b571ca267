"""The training loop: with ESAM, SAM and a base optimizer; its measurements and errors."""

import math

import pytest
import torch
from tests.torch.fitted import (
    QUIETLY,
    make_batches,
    make_data,
    make_model,
    make_optimizer,
    model_losses,
    run_fit,
)
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from esam_core import ESAMTypeError
from esam_torch import ESAM, Rows, SideBySide, Whole, accuracy, evaluate, fit
from esam_torch.fitting import ranks
from esam_torch.fitting.data import move_batch


@pytest.mark.parametrize("kind", ["sgd", "sam", "esam", "suffix-part"])
def test_one_loop_trains_with_every_kind_of_optimizer(kind):
    _, history = run_fit(
        kind, 15, eval_loader=[make_data().tensors], metrics={"accuracy": accuracy}
    )
    assert history["epoch"] == list(range(1, 16))
    assert history["train_loss"][-1] < 0.7 * history["train_loss"][0]
    assert history["eval_accuracy"][-1] > 0.8
    assert ("sharpness" in history.columns) == (kind == "esam")


@pytest.mark.parametrize("kind", ["sgd", "esam", "suffix-part"])
def test_the_loop_equals_a_hand_written_one(kind):
    model, _ = run_fit(kind, 2)
    twin = make_model()
    optimizer = make_optimizer(kind, twin)
    loader = DataLoader(
        make_data(), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            if kind == "sgd":
                model_losses(twin, *batch)[0].mean().backward()
            else:
                optimizer.backward(lambda *b: model_losses(twin, *b), *batch)
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_means_are_over_samples_and_not_batches():
    inputs, targets = make_data().tensors
    model = make_model().eval()
    found = evaluate(
        model,
        model_losses,
        [(inputs[:90], targets[:90]), (inputs[90:], targets[90:])],
        metrics={"accuracy": accuracy},
    )
    with torch.no_grad():
        outputs = model(inputs)
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-6)
    assert found["accuracy"] == (outputs.argmax(1) == targets).float().mean().item()


@pytest.mark.parametrize("options", [{}, {"device": "auto"}])
def test_evaluation_is_on_the_device_of_the_model(options):
    """As after `fit`, which leaves the model on the accelerator if there is one."""
    seen = []

    def losses(_, inputs, targets):
        seen.append((inputs.device.type, targets.device.type))
        raise KeyboardInterrupt  # on "meta", there are no numbers

    for model in (make_model().to("meta"), torch.nn.ReLU()):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, losses, [make_data().tensors], **options)
    assert seen == [("meta", "meta"), ("cpu", "cpu")]


def test_evaluation_restores_the_modes():
    model = make_model().train()
    model[1].eval()
    evaluate(model, model_losses, [make_data().tensors])
    assert model.training and model[0].training and not model[1].training


def test_schedulers_step_each_epoch_or_each_batch():
    def halving(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    _, history = run_fit(epochs=2, scheduler=halving)
    assert history["learning_rate"] == [0.1, 0.05]
    _, history = run_fit(epochs=2, scheduler=halving, scheduler_step="batch")
    assert history["learning_rate"] == [0.1, 0.1 / 2**5]


def test_schedulers_of_other_optimizers_are_refused():
    """They had no effect."""

    def of_another(_):
        return torch.optim.lr_scheduler.StepLR(make_optimizer("sgd", make_model()), 1)

    for kind in ("sgd", "esam"):
        with pytest.raises(ValueError, match="Received: a StepLR of another optimizer"):
            run_fit(kind, 1, scheduler=of_another)
    with pytest.raises(TypeError, match=r"`scheduler` must be .* Received: scheduler='cosine'"):
        run_fit(epochs=1, scheduler="cosine")


def test_schedulers_may_be_those_of_a_base_optimizer():
    model = make_model()
    one = torch.optim.SGD(model[0].parameters(), lr=0.1)
    two = torch.optim.SGD(model[3].parameters(), lr=0.1)
    optimizer = ESAM(SideBySide(one, two), model)
    for scheduled in (one, two, optimizer.base_optimizer, optimizer):
        scheduler = torch.optim.lr_scheduler.StepLR(scheduled, 1, gamma=0.5)
        fit(model, optimizer, model_losses, make_batches(), scheduler=scheduler, **QUIETLY)
    assert [one.param_groups[0]["lr"], two.param_groups[0]["lr"]] == [0.0125, 0.0125]


@pytest.mark.parametrize("inside", [False, True])
def test_samplers_are_told_the_epoch(inside):
    """Also one inside a batch sampler; it gave the same order in each epoch."""

    class Told(torch.utils.data.SequentialSampler):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    sampler = Told(make_data())
    batches = torch.utils.data.BatchSampler(sampler, 32, drop_last=False)
    options = {"batch_sampler": batches} if inside else {"batch_size": 32, "sampler": sampler}
    model = make_model()
    loader = DataLoader(make_data(), **options)
    fit(model, make_optimizer("esam", model), model_losses, loader, **{**QUIETLY, "epochs": 3})
    assert sampler.epochs == (1, 2, 3)


def test_reduce_lr_on_plateau_gets_the_evaluation_loss():
    def on_plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=10.0, threshold_mode="abs"
        )

    _, history = run_fit(epochs=3, scheduler=on_plateau, eval_loader=[make_data().tensors])
    assert history["learning_rate"] == [0.1, 0.1, 0.05]


def test_a_dictionary_is_passed_as_one_argument():
    inputs, targets = make_data().tensors

    def losses(model, batch):
        return model_losses(model, batch["inputs"], batch["targets"])

    model = make_model()
    batch = {"inputs": inputs, "targets": targets}
    history = fit(
        model,
        make_optimizer("esam", model),
        losses,
        [batch],
        epochs=1,
        progress=False,
        device="cpu",
    )
    assert len(history) == 1


@pytest.mark.parametrize("progress", [True, "rich", "tqdm", "plain"])
def test_progress_is_shown(progress, capsys):
    if isinstance(progress, str) and progress != "plain":
        pytest.importorskip(progress)
    run_fit(epochs=2, progress=progress, title="ESAM ", eval_loader=[make_data().tensors])
    shown = "".join(capsys.readouterr())
    assert "ESAM epoch 2/2" in shown and "eval_loss" in shown


def test_without_a_progress_library_there_are_lines(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run_fit(epochs=1)
    run_fit(epochs=1, progress=True)
    assert capsys.readouterr().out.startswith("epoch 1/1  train_loss")
    with pytest.raises(RuntimeError, match="pip install rich"):
        run_fit(epochs=1, progress="rich")


def test_invalid_arguments_are_refused():
    model = make_model()
    esam = make_optimizer("esam", model)
    batches = [make_data().tensors]
    with pytest.raises(TypeError, match="`model` must be"):
        fit(torch.nn.Linear, esam, model_losses, batches, epochs=1, progress=False)
    with pytest.raises(TypeError, match="`optimizer` must be"):
        fit(model, "sgd", model_losses, batches, epochs=1, progress=False)
    with pytest.raises(ValueError, match="an ESAM of another model"):
        fit(make_model(), esam, model_losses, batches, epochs=1, progress=False)
    other = make_optimizer("sgd", make_model())
    with pytest.raises(ValueError, match=r"of parameters of `model`. Received: SGD of other"):
        fit(model, other, model_losses, batches, epochs=1, progress=False)
    with pytest.raises(TypeError, match=r"losses\(model, \*batch\).*only 2 arguments"):
        fit(model, esam, lambda inputs, targets: None, batches, epochs=1, progress=False)
    with pytest.raises(ValueError, match="`epochs` must be >= 1"):
        fit(model, esam, model_losses, batches, epochs=0, progress=False)
    with pytest.raises(ValueError, match="`scheduler_step`"):
        fit(model, esam, model_losses, batches, epochs=1, scheduler_step="step", progress=False)
    with pytest.raises(ValueError, match="yield a batch"):
        fit(model, esam, model_losses, [], epochs=1, progress=False)
    with pytest.raises(ValueError, match="`progress`"):
        fit(model, esam, model_losses, batches, epochs=1, progress="loud")

    def alone(model, inputs, targets):
        return model_losses(model, inputs, targets)[0]

    with pytest.raises(ValueError, match=r"\(losses, outputs\)"):
        fit(model, esam, alone, batches, epochs=1, metrics={"a": accuracy}, progress=False)
    with pytest.raises(TypeError, match="one number per sample"):
        fit(
            *(model, make_optimizer("esam", model), model_losses, batches),
            epochs=1,
            metrics={"a": lambda o, *b: o.mean()},
            progress=False,
        )


@pytest.mark.parametrize("name", ["loss", "sharpness", "sample_share"])
def test_metrics_do_not_replace_other_numbers(name):
    """A metric "loss" was reported as the loss, and "sharpness" averaged with the sharpness."""
    metrics = {"accuracy": accuracy, name: accuracy}
    with pytest.raises(ValueError, match=f"names of `metrics` must not.*Received: '{name}'"):
        run_fit(epochs=1, metrics=metrics)
    with pytest.raises(ValueError, match=f"names of `metrics` must not.*Received: '{name}'"):
        evaluate(make_model(), model_losses, [make_data().tensors], metrics=metrics)
    for wrong in ([accuracy], {"accuracy": "accuracy"}):
        with pytest.raises(TypeError, match="`metrics` must be functions by name"):
            run_fit(epochs=1, metrics=wrong)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    _, history = run_fit(epochs=2, tensorboard=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"sharpness", "train_loss", "learning_rate"} <= set(events.Tags()["scalars"])
    written = [event.value for event in events.Scalars("sharpness")]
    assert written == pytest.approx(history["sharpness"])


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"esam-torch\[tensorboard\]"):
        run_fit(epochs=1, tensorboard=tmp_path)


def test_batches_of_other_libraries_are_moved():
    class Graphs:
        def to(self, device):
            return ("moved to", device)

    device, table = torch.device("cpu"), torch.ones(2)
    moved = move_batch({"graphs": Graphs(), "x": [table], "kind": Graphs, "n": 3}, device)
    assert moved == {"graphs": ("moved to", device), "x": [table], "kind": Graphs, "n": 3}


@pytest.mark.parametrize(
    "sampler",
    [
        torch.utils.data.WeightedRandomSampler([1.0, 2.0], 2),
        torch.utils.data.SubsetRandomSampler([0, 1]),
        torch.utils.data.RandomSampler([0, 1], replacement=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_samplers_that_do_not_know_about_ranks_are_refused(sampler, monkeypatch):
    loader = DataLoader(make_data(), batch_size=20, sampler=sampler)
    assert ranks.split(loader, training=True) is loader
    monkeypatch.setattr(ranks, "world", lambda: (0, 2))
    with pytest.raises(ESAMTypeError, match=f"Received: a {type(sampler).__name__}"):
        ranks.split(loader, training=True)


@pytest.mark.parametrize("kind", [RandomSampler, SequentialSampler])
def test_batch_samplers_that_do_not_know_about_ranks_are_refused(kind, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: (0, 2))
    data = make_data()
    shares = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    for sampler, refused in ((kind(data), True), (shares, False)):
        loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 20, drop_last=False))
        if refused:
            with pytest.raises(ESAMTypeError, match=f"Received: a {kind.__name__}"):
                ranks.split(loader, training=True)
        else:
            assert ranks.split(loader, training=True) is loader


@pytest.mark.parametrize("kind", ["esam", "base"])
def test_marked_values_in_batches(kind):
    """`Rows` and `Whole` are for ESAM; losses get the values, also in an evaluation."""
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model) if kind == "esam" else base

    def losses(model, x, y, weight):
        return F.cross_entropy(model(x), y, weight, reduction="none")

    data = [(x, Rows(y), Whole(torch.ones(3))) for x, y in make_batches()]
    history = fit(model, optimizer, losses, data, epochs=1, eval_loader=data, progress=False)
    assert history.last["eval_loss"] == evaluate(model, losses, data)["loss"]


def test_an_optimizer_that_sets_its_own_learning_rate():
    class Own(torch.optim.SGD):
        """As transformers' Adafactor, whose groups have lr=None."""

        def step(self):
            for group in self.param_groups:
                group["lr"] = 0.1
            super().step()
            for group in self.param_groups:
                group["lr"] = None

    model = make_model()
    optimizer = Own(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    history = fit(model, optimizer, model_losses, make_batches(), epochs=1, progress=False)
    assert math.isnan(history.last["learning_rate"])
