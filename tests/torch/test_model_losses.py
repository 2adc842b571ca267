"""One loss per sample for transformers models: the model's own loss for each sample alone."""

import pytest
import torch
from tests.torch.language import alone, language_model, sentences
from tests.torch.trainers import THEIRS
from torch.nn import functional as F

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]


@pytest.fixture
def transformers(monkeypatch):
    module = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return module


@pytest.mark.parametrize("kind", ["classes", "number", "several", "causal"])
def test_losses_equal_the_models_own_for_each_sample(transformers, kind):
    from esam_torch.integrations.transformers import per_sample_losses

    model, batch = language_model(transformers, kind).eval(), sentences(kind)
    if kind == "causal":
        batch["labels"] = batch["labels"].clone()
        batch["labels"][2, 3:] = -100
    found = per_sample_losses(model, batch)
    torch.testing.assert_close(found, alone(model, batch))
    torch.testing.assert_close(
        found[1:3], per_sample_losses(model, {k: v[1:3] for k, v in batch.items()})
    )
    with pytest.raises(ValueError, match=r"must contain labels.*\['labels'\]"):
        per_sample_losses(model, {"input_ids": batch["input_ids"]})


def test_tokens_can_count_the_same(transformers):
    from esam_torch.integrations.transformers import per_sample_losses

    model, batch = language_model(transformers, "causal").eval(), sentences("causal")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][2, 3:] = -100
    tokens = (batch["labels"][:, 1:] != -100).sum(1).float()
    found = per_sample_losses(model, batch, items_per_sample=tokens.mean())
    torch.testing.assert_close(found.mean(), model(**batch).loss)
    torch.testing.assert_close(found, alone(model, batch) * tokens / tokens.mean())


def test_a_sample_without_labels_has_the_loss_zero(transformers):
    from esam_torch.integrations.transformers import per_sample_losses

    model, batch = language_model(transformers, "causal").eval(), sentences("causal")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = -100
    found = per_sample_losses(model, batch)
    assert found[1] == 0.0 and found.isfinite().all()


def _lora(transformers):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(
        r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    return peft.get_peft_model(language_model(transformers, "causal"), options)


def _subclass(transformers):
    class Mine(transformers.GPT2LMHeadModel):
        pass

    return Mine(language_model(transformers, "causal").config)


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
    return transformers.BartForCausalLM(config)  # this model does not shift labels


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

    model = language_model(transformers, "causal")
    model.loss_function = halved
    return model


@pytest.mark.parametrize("make", [_lora, _subclass, _bart, _experts, _own_loss_function])
def test_wrappers_subclasses_and_loss_functions(transformers, make):
    from esam_torch.integrations.transformers import per_sample_losses

    torch.manual_seed(0)
    model, batch = make(transformers).eval(), sentences("causal")
    outputs = model(**batch)
    found = per_sample_losses(model, batch)
    torch.testing.assert_close(found.mean(), outputs.loss)
    if make is _experts:
        auxiliary = 0.1 * outputs.aux_loss
        assert auxiliary > 0.01
        model.config.output_router_logits = False
        found = found - auxiliary
    torch.testing.assert_close(found, alone(model, batch))


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

    config = language_model(transformers, "classes").config
    config.num_labels, config.problem_type = outputs, kind
    model = transformers.DistilBertForSequenceClassification(config).eval()
    batch = {**sentences("classes"), "labels": labels}
    found = per_sample_losses(model, batch)
    torch.testing.assert_close(found.mean(), model(**batch).loss)
    torch.testing.assert_close(found, alone(model, batch))


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
        torch.testing.assert_close(found, alone(model, batch))
        torch.testing.assert_close(getattr(found, reduction)(), model(**batch).loss)


def test_weights_of_classes_with_soft_labels(transformers):  # noqa: ARG001 needs transformers
    """Their mean is over the samples; with hard labels it is refused."""
    from esam_torch.integrations.row_losses import RowLosses

    weights, logits, labels = torch.tensor([1.0, 2.0, 5.0]), torch.randn(4, 3), torch.rand(4, 3)
    rows = RowLosses([labels])
    with rows:
        found = rows.check(F.cross_entropy(logits, labels, weights), "a model")
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weights, reduction="none"))
    hard = labels.argmax(1)
    with RowLosses([hard]), pytest.raises(ValueError, match="must not have class weights"):
        F.cross_entropy(logits, hard, weights)


@pytest.mark.parametrize(
    "change",
    [lambda y: 1 - y, lambda y: -y, torch.log1p, torch.sqrt, lambda y: y**2, lambda y: y > 0.5],
)
def test_labels_that_a_model_changes_by_element(transformers, change):  # noqa: ARG001
    from esam_torch.integrations.row_losses import RowLosses

    outputs, labels = torch.randn(3, 4), torch.rand(3, 4)
    rows = RowLosses([labels])
    with rows:
        found = rows.check(F.mse_loss(outputs, change(labels).float()), "a model")
    wanted = F.mse_loss(outputs, change(labels).float(), reduction="none").mean(1)
    torch.testing.assert_close(found, wanted)


def test_one_sample_does_not_check_a_model(transformers):  # noqa: ARG001
    """It is always its own mean."""
    from esam_torch.integrations.transformers import per_sample_losses

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def forward(self, x, labels):
            return {"loss": F.mse_loss(self.linear(x)[:, 0], labels).sqrt()}

    torch.manual_seed(0)
    model, x, y = Root(), torch.randn(8, 4), torch.randn(8)
    per_sample_losses(model, {"x": x[:1], "labels": y[:1]})
    with pytest.raises(ValueError, match="mean of the losses per sample must equal"):
        per_sample_losses(model, {"x": x, "labels": y})


def test_labels_that_are_moved_by_name(transformers):  # noqa: ARG001
    """As reshape(input=labels, ...): a model's call, of which torch knows both forms."""
    from esam_torch.integrations.row_losses import RowLosses

    logits, labels = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    rows = RowLosses([labels])
    with rows:
        moved = torch.reshape(input=labels, shape=(-1,))
        found = rows.check(F.cross_entropy(logits.flatten(0, 1), moved), "a model")
    wanted = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    torch.testing.assert_close(found, wanted)


def test_indices_of_labels_are_moved_to_the_cpu(transformers):  # noqa: ARG001
    """Where their rows are; also in tuples, as in labels[rows, columns]."""
    from esam_torch.integrations.row_losses import RowLosses

    class Index(torch.Tensor):
        moved = 0

        def cpu(self):
            Index.moved += 1
            return self.as_subclass(torch.Tensor)

    labels, places = torch.arange(6).view(2, 3), torch.tensor([0, 1])
    with RowLosses([labels]):
        for index in (places.as_subclass(Index), (places.as_subclass(Index),) * 2):
            assert labels[index].shape in ((2, 3), (2,))
    assert Index.moved == 3


@pytest.mark.parametrize(
    ("error", "first", "later"),
    [(RuntimeError, 2, 1), (torch.OutOfMemoryError, 1, 1)],
)
def test_an_error_of_the_model_is_raised_alone(transformers, error, first, later):
    """A second forward, which tells whose error it is, runs only in the first call for a model."""
    from esam_torch.integrations.transformers import per_sample_losses

    model, batch, calls = language_model(transformers, "causal"), sentences("causal"), []

    def fails(*_, **__):
        calls.append(len(calls))
        raise error(f"call {len(calls)}")

    own = model.loss_function
    for checked, times in ((False, first), (True, later)):
        calls.clear()
        model.loss_function = fails
        with pytest.raises(error, match=r"^call 1$") as caught:
            per_sample_losses(model, batch)
        assert len(calls) == times
        assert caught.value.__cause__ is None
        context = caught.value.__context__
        while context is not None:  # a test runner's own, which it may be handling
            assert not isinstance(context, (error, ValueError))
            context = context.__context__
        if not checked:
            model.loss_function = own
            per_sample_losses(model, batch)
