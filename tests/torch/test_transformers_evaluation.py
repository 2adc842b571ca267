"""ESAMTrainer: evaluation and prediction."""

import pytest
import torch
from tests.torch.language import Sentences, sentences
from tests.torch.trainers import THEIRS, new_trainer
from torch.nn import functional as F

from esam_core import ESAMValueError

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]


def test_evaluation_is_that_of_trainer(transformers):
    trainer = new_trainer(transformers, more={"eval_dataset": Sentences("classes")})
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
    trainer = new_trainer(transformers, cls=Own, more=more, max_steps=2, **arguments)
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
    trainer = new_trainer(transformers, cls=Own, max_steps=2, **names)
    trainer.train_dataset = data = Renamed("classes")
    trainer.train()
    found = trainer.evaluate(data)["eval_loss"]
    batch = sentences("classes", 32)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits
    assert found == pytest.approx(float(_weighted(logits, batch["labels"]).mean()), rel=1e-5)
