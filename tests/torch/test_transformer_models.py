"""Transformers with embeddings: dictionaries, tied weights, sparse gradients."""

import copy

import pytest
import torch
from tests.torch.by_hand import check
from tests.torch.scene import same, sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Only, SideBySide, Suffix


class Encoder(nn.Module):
    """Token ids, an attention mask, optional segment ids; embeddings tied to the head."""

    def __init__(self, tied=True, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, sparse=sparse)
        self.segments = nn.Embedding(2, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.decoder = nn.Linear(8, 11)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask, segments=None):
        x = self.embedding(input_ids)
        if segments is not None:
            x = x + self.segments(segments)
        x = self.layer(x, src_key_padding_mask=attention_mask == 0)
        return self.decoder(self.norm(x))


def tokens(b=6, length=5):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(11, (b, length), generator=generator)
    mask = torch.ones(b, length, dtype=torch.long)
    mask[1, 3:] = 0
    labels = torch.randint(11, (b, length), generator=generator).masked_fill(mask == 0, -100)
    segments = torch.randint(2, (b, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "segments": segments, "labels": labels}


def token_losses(model):
    """Return the mean loss of the tokens of each sequence."""

    def losses(data):
        inputs = {key: value for key, value in data.items() if key != "labels"}
        values = F.cross_entropy(model(**inputs).transpose(1, 2), data["labels"], reduction="none")
        return values.sum(1) / (data["labels"] != -100).sum(1)

    return losses


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformer_with_a_dictionary(tied, adaptive):
    model = check(lambda: Encoder(tied), token_losses, (tokens(),), adaptive=adaptive)
    assert (model.decoder.weight is model.embedding.weight) == tied


def test_tied_weights_are_one_unit():
    model = Encoder()
    optimizer = ESAM(sgd(model), model, perturb=Everything())
    report = optimizer.step(token_losses(model), tokens())
    assert "embedding.weight" in report.perturbed and "decoder.weight" not in report.perturbed
    assert report.weight_share == 1.0
    only = ESAM(sgd(model), model, perturb=Only("embedding"))
    assert only.step(token_losses(model), tokens()).perturbed == (
        "embedding.weight",
        "segments.weight",
    )


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_sparse_embeddings(adaptive):
    """The descent gradient stays sparse, as SparseAdam needs; epsilon is dense."""
    data = (tokens(),)
    model = check(lambda: Encoder(tied=False, sparse=True), token_losses, data, adaptive=adaptive)
    assert model.embedding.weight.grad.is_sparse


def test_sparse_adam_with_another_optimizer():
    torch.manual_seed(0)
    model = Encoder(tied=False, sparse=True)
    dense = [p for n, p in model.named_parameters() if n != "embedding.weight"]
    base = SideBySide(
        torch.optim.SparseAdam([model.embedding.weight], lr=0.01), torch.optim.Adam(dense, lr=0.01)
    )
    optimizer = ESAM(base, model, rho=0.1, beta=0.6, on_nonfinite="skip")
    seen = [float(optimizer.step(token_losses(model), tokens()).loss) for _ in range(20)]
    assert seen[-1] < seen[0]
    optimizer.backward(token_losses(model), tokens())
    optimizer.backward(token_losses(model), tokens())  # onto a sparse gradient
    before = model.embedding.weight.grad.to_dense().clone()

    def fails(data):
        values = token_losses(model)(data)
        if len(values) < 6:
            values.register_hook(lambda _: 1 / 0)
        return values

    with pytest.raises(ZeroDivisionError):
        optimizer.backward(fails, tokens())
    assert torch.equal(model.embedding.weight.grad.to_dense(), before)


def test_suffix_of_a_transformer_with_a_dictionary():
    """Blocks and a dictionary together give the same result as a mask without blocks."""
    torch.manual_seed(0)
    model = Encoder(tied=False)
    twin = copy.deepcopy(model)
    cut = ESAM(sgd(model), model, rho=0.2, perturb=Suffix("norm"))
    whole = ESAM(sgd(twin), twin, rho=0.2, perturb=Only(lambda u: u.name[:4] in ("norm", "deco")))
    for seed in range(3):
        torch.manual_seed(seed)
        a = cut.step(token_losses(model), tokens())
        torch.manual_seed(seed)
        b = whole.step(token_losses(twin), tokens())
        assert a.perturbed == b.perturbed
        same(model.state_dict(), twin.state_dict(), f"step {seed}")
