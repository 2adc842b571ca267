"""Small transformers models, and sentences for them."""

import torch
from torch.utils.data import Dataset


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


def language_model(transformers, kind):
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


def sentences(kind, n=4):
    data = Sentences(kind)
    return {key: torch.stack([data[i][key] for i in range(n)]) for key in data[0]}


def alone(model, batch):
    """Return the model's own loss for each sample alone, (b,)."""
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    return torch.stack([model(**row).loss for row in rows])
