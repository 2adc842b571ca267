"""The training loop: precisions, gradient scaling, and means over steps that are skipped."""

import pytest
import torch
from tests.torch.fitted import (
    QUIETLY,
    make_batches,
    make_data,
    make_model,
    make_optimizer,
    make_skipping,
    model_losses,
)
from torch.nn import functional as F

from esam_torch import ESAM, All, Momentum, Part, Previous, TopIncrease, TopLoss, accuracy, fit


@pytest.mark.parametrize("kind", ["sgd", "esam", "suffix-part"])
def test_accumulated_batches_are_averaged_and_clipped(kind):
    batches = [tuple(part[i : i + 10] for part in make_data().tensors) for i in range(0, 50, 10)]
    options = {"accumulate": 2, "clip_value": 0.02, "clip_norm": 0.05}
    model, twin = make_model(), make_model()
    fit(
        *(model, make_optimizer(kind, model), model_losses, batches),
        epochs=1,
        progress=False,
        device="cpu",
        **options,
    )
    optimizer = make_optimizer(kind, twin)
    for group in (batches[:2], batches[2:4], batches[4:]):
        optimizer.zero_grad()
        for batch in group:
            if kind == "sgd":
                model_losses(twin, *batch)[0].mean().backward()
            else:
                optimizer.backward(lambda *b: model_losses(twin, *b), *batch)
        for parameter in twin.parameters():
            parameter.grad /= len(group)
        torch.nn.utils.clip_grad_value_(twin.parameters(), 0.02)
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sgd", "esam", "suffix-part"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions(kind, precision):
    dtypes = set()

    def losses(model, inputs, targets):
        outputs = model(inputs)
        dtypes.add(outputs.dtype)
        return F.cross_entropy(outputs, targets, reduction="none"), outputs

    model = make_model()
    optimizer = make_optimizer(kind, model)
    batches = [make_data().tensors] * 4
    history = fit(
        *(model, optimizer, losses, batches),
        epochs=6,
        eval_loader=batches,
        precision=precision,
        clip_norm=10.0,
        progress=False,
        device="cpu",
    )
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert history["eval_loss"][-1] < 0.8 * history["eval_loss"][0]


def test_an_overflow_skips_update_and_scheduler():
    """The scaler finds it; the weights do not change, and the scheduler does not step."""
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = [p.clone() for p in model.parameters()]
    fit(
        *(model, optimizer, model_losses, [make_data().tensors]),
        epochs=1,
        precision="fp16",
        scaler=scaler,
        scheduler=scheduler,
        scheduler_step="batch",
        progress=False,
        device="cpu",
    )
    assert scaler.get_scale() == 2.0**39 and base.param_groups[0]["lr"] == 0.1
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="`precision` must be"):
        fit(model, optimizer, model_losses, [], scaler=scaler, **QUIETLY)
    optimizer = ESAM(base, model, on_nonfinite="skip")
    with pytest.raises(ValueError, match="`on_nonfinite` must be"):
        fit(model, optimizer, model_losses, [], precision="fp16", **QUIETLY)


def test_losses_of_skipped_steps_are_left_out_of_the_means():
    model, twin = make_model(), make_model()
    row = fit(
        *(model, make_skipping(model), model_losses, make_batches(1)),
        metrics={"accuracy": accuracy},
        **QUIETLY,
    ).last
    optimizer, kept, right = make_skipping(twin), [], []
    for i, batch in enumerate(make_batches(1)):
        report = optimizer.step(lambda *b: model_losses(twin, *b), *batch)
        assert report.skipped == (i == 1)
        if i != 1:
            kept += report.losses.tolist()
            right += accuracy(report.outputs, *batch).tolist()
    assert row["train_loss"] == pytest.approx(sum(kept) / len(kept), rel=1e-6)
    assert row["train_accuracy"] == pytest.approx(sum(right) / len(right))
    assert row["sample_share"] == 0.5  # without the reports of skipped steps
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ascend", [Part(0.25), Previous(), Momentum()])
@pytest.mark.parametrize("select", [All(), TopLoss(0.5), TopIncrease(0.5)])
def test_means_are_over_the_samples_that_a_step_reports(ascend, select):
    """With these directions, a pass may have seen only some of the samples in a batch."""

    def optimizer(model):
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return ESAM(base, model, ascend=ascend, select=select)

    model, twin = make_model(), make_model()
    row = fit(
        *(model, optimizer(model), model_losses, make_batches()),
        metrics={"accuracy": accuracy},
        **QUIETLY,
    ).last
    esam, seen, right = optimizer(twin), [], []

    def noted(inputs, targets):
        values, outputs = model_losses(twin, inputs, targets)
        return values, (outputs, targets)  # the targets of the same samples

    for batch in make_batches():
        report = esam.step(noted, *batch)
        seen += (report.perturbed_losses if report.losses is None else report.losses).tolist()
        right += accuracy(*report.outputs).tolist()
        assert report.batch_size == 10
    assert row["train_loss"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)
    assert row["train_accuracy"] == pytest.approx(sum(right) / len(right))
    assert row["samples_per_second"] * row["seconds"] == pytest.approx(40)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [0, 1])
def test_accumulated_batches_that_are_skipped_do_not_count(bad):
    """The mean is over the others; if all are skipped there is no update."""
    batches = [*make_batches(bad, n=2), *make_batches(0, 1, n=2)]
    model, twin = make_model(), make_model()
    options = {**QUIETLY, "accumulate": 2}
    first = make_skipping(twin)
    model_optimizer = make_skipping(model)
    fit(model, model_optimizer, model_losses, batches, **options)
    for batch in batches[:2]:
        first.backward(lambda *b: model_losses(twin, *b), *batch)
    first.step()  # with the momentum of one update, not of two
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    # Skipped batches leave no pending gradients.
    assert (
        model_optimizer.step(lambda *b: model_losses(model, *b), *make_batches()[0]).skipped
        is False
    )
