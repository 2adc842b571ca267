"""ESAMTrainer: losses of its own, smoothing, and token weighting."""

import copy

import pytest
import torch
from tests.torch.language import Sentences, alone, language_model, sentences
from tests.torch.trainers import THEIRS, new_trainer, same
from torch.nn import functional as F

from esam_torch import All

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]


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
        trainer = new_trainer(transformers, "causal")
        trainer.model.loss_function = function
        before = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(ValueError, match=f"{words}.*`ESAMTrainer`, override `compute_losses`"):
            trainer.train()
        assert trainer.model.training
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_the_first_check_changes_nothing(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Unchecked(ESAMTrainer):
        def compute_losses(self, *args):
            return super().compute_losses(*args)

    trainers = [new_trainer(transformers, "causal", cls=cls) for cls in (None, Unchecked)]
    for trainer in trainers:  # GPT2 has dropout by default
        transformers.set_seed(0)
        trainer.train()
    first, second = (list(t.model.parameters()) for t in trainers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["classes", "causal"])
def test_smoothed_losses_equal_those_of_trainer(transformers, kind):
    trainer = new_trainer(transformers, kind, label_smoothing_factor=0.2)
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
        trainer = new_trainer(
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
        new_trainer(transformers, cls=Own, more={"token_weighted": True})
    trainer = new_trainer(transformers, more={"token_weighted": True})
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(ValueError, match="`token_weighted` must be False for this model"):
        trainer.train()


def test_an_overridden_compute_loss_is_refused(transformers):
    from esam_torch.integrations.transformers import ESAMTrainer

    class Own(ESAMTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(TypeError, match=r"instead of `compute_loss`.*Received: .* of Own"):
        new_trainer(transformers, cls=Own)


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
        new_trainer(transformers, cls=cls, more=more, optim="sgd", max_grad_norm=0.0)
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

    trainer = new_trainer(transformers, more={"compute_loss_func": per_item})
    with pytest.raises(TypeError, match="NoneType") as caught:
        trainer.train()
    assert "`num_items_in_batch` is None here" in caught.value.__notes__[0]


def test_a_batch_of_one_sample_is_checked_too(transformers):
    def of_tokens(outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
        return losses.sum() / (num_items_in_batch or labels.numel())

    more = {"compute_loss_func": of_tokens, "token_weighted": True}
    esam = {"rho": 0.05, "gamma": 1.0}
    trainer = new_trainer(transformers, "causal", esam, more=more, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="cannot be computed per sample"):
        trainer.train()
