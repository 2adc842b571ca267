"""Batches for tests of samples."""

import collections

import torch
from torch import nn


def table(n, *shape):
    """Return a tensor whose rows differ in their first number."""
    rows = torch.arange(float(n)).reshape(-1, *[1] * len(shape))
    return rows.expand(n, *shape).clone()


class Holder:
    """A user-defined class that contains a tensor."""

    def __init__(self, x):
        self.x = x


class SharedStore(collections.abc.MutableMapping):
    """A mapping whose copies write to the same dictionary."""

    def __init__(self, items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def packed(b=5):
    return nn.utils.rnn.pack_sequence([torch.ones(b - i, 2) for i in range(b)])
