"""Models whose forwards write state, and the same steps by hand."""

import copy
import warnings
from collections import deque

import torch
from torch import nn
from torch.nn import functional as F


class Base(nn.Module):
    """A trained layer and a head; subclasses write state in `shift`."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.encoder(x))
        return self.head(h + self.shift(x, h))


class MomentumEncoder(Base):
    """Frozen weights that are averaged in place, as in BYOL."""

    def __init__(self):
        super().__init__()
        self.key = nn.Linear(4, 6).requires_grad_(False)

    @torch.no_grad()
    def update(self):
        for key, query in zip(self.key.parameters(), self.encoder.parameters(), strict=True):
            key.mul_(0.7).add_(query, alpha=0.3)

    def shift(self, x, h):
        self.update()
        return self.key(x)


class MomentumEncoderByData(MomentumEncoder):
    """The same, with `.data`, as in MoCo's code."""

    def update(self):
        for key, query in zip(self.key.parameters(), self.encoder.parameters(), strict=True):
            key.data = key.data * 0.7 + query.data * 0.3


class HiddenTeacher(MomentumEncoder):
    """A teacher in a list, so that it is not among the model's parameters."""

    def __init__(self):
        super().__init__()
        self.teachers = [self.key]
        del self.key

    def shift(self, x, h):
        key = self.teachers[0]
        self.__dict__["key"] = key
        self.update()
        del self.__dict__["key"]
        return key(x)


class Recurrent(Base):
    """A hidden state in an attribute that is assigned."""

    def __init__(self):
        super().__init__()
        self.state = None

    def shift(self, x, h):
        before = 0.0 if self.state is None else self.state
        self.state = (h.detach().mean(0) + before) / 2
        return before


class RecurrentInPlace(Base):
    """A hidden state in an attribute that is written in place."""

    def __init__(self):
        super().__init__()
        self.states = {"h": torch.zeros(6)}

    def shift(self, x, h):
        before = self.states["h"].clone()
        self.states["h"].mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return before


class Counter(Base):
    """A counter, and an attribute that the first forward creates."""

    calls = 0

    def shift(self, x, h):
        self.calls = self.calls + 1
        return 0.1 * self.calls


class ListQueue(Base):
    """A queue in a list."""

    def __init__(self):
        super().__init__()
        self.queue = []

    def shift(self, x, h):
        before = sum(self.queue) if self.queue else 0.0
        self.queue.append(h.detach().mean(0))
        if len(self.queue) > 3:
            del self.queue[0]
        return before


class DequeQueue(ListQueue):
    """A queue in a deque."""

    def __init__(self):
        super().__init__()
        self.queue = deque(maxlen=3)


class BufferQueue(Base):
    """A queue with a pointer, in buffers, as in MoCo."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(4, 6))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def shift(self, x, h):
        before = self.queue.sum(0)
        at = int(self.pointer)
        self.queue[at] = h.detach().mean(0)
        self.pointer[0] = (at + 1) % 4
        return before


class BufferQueueInEval(BufferQueue):
    """The same in a module in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.train(False)

    def train(self, mode=True):
        return super().train(False)


class NewBuffer(Base):
    """A buffer that each forward replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def shift(self, x, h):
        before = self.mean
        self.mean = 0.5 * before + 0.5 * h.detach().mean(0)
        return before


class Spectral(Base):
    """Power iterations in buffers."""

    def __init__(self):
        super().__init__()
        self.extra = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))

    def shift(self, x, h):
        return self.extra(x)


class OldSpectral(Spectral):
    """Power iterations, with the weight in an attribute."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.extra = nn.utils.spectral_norm(nn.Linear(4, 6))


class OwnNorm(nn.Module):
    """A BatchNorm that does not derive from torch's."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class WithOwnNorm(Base):
    """A model with `OwnNorm`, whose statistics torch writes without counting a version."""

    def __init__(self):
        super().__init__()
        self.scale = OwnNorm(6)

    def shift(self, x, h):
        return self.scale(h)


class MaxNorm(Base):
    """Trained weights that a forward clips, by `.data`."""

    def shift(self, x, h):
        self.head.weight.data = torch.renorm(self.head.weight.data, 2, 0, 0.4)
        return 0.0


MODELS = [
    MomentumEncoder,
    MomentumEncoderByData,
    HiddenTeacher,
    Recurrent,
    RecurrentInPlace,
    Counter,
    ListQueue,
    DequeQueue,
    BufferQueue,
    BufferQueueInEval,
    NewBuffer,
    Spectral,
    OldSpectral,
    WithOwnNorm,
]


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def written(model):
    """Return all values in a model, including attributes, as lists of numbers."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.detach().tolist()
        if isinstance(value, nn.Module):
            return written(value)
        if isinstance(value, list | tuple | deque):
            return [plain(v) for v in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    skipped = ("_modules", "_parameters", "_buffers")
    state = {k: plain(v) for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") or k in ("_u",)}
        state |= {f"{name}:{k}": plain(v) for k, v in own.items() if k not in skipped}
    return state


def by_hand(model, x, y, rho, gamma):
    """Return the gradients of a step, the selected samples, and a model after one forward."""
    first, second, third = (copy_of(model) for _ in range(3))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    losses = losses_of(first)(x, y)
    weights = dict(first.named_parameters())
    g = torch.autograd.grad(losses.mean(), [weights[n] for n in trained])
    length = torch.stack([t.norm() for t in g]).norm() + 1e-12
    for twin in (second, third):
        own = dict(twin.named_parameters())
        for name, t in zip(trained, g, strict=True):
            own[name].data.add_(rho * t / length)
    with torch.no_grad():
        rise = losses_of(second)(x, y) - losses.detach()
    k = max(1, round(gamma * len(x)))
    indices = torch.topk(rise, k).indices.sort().values
    if gamma == 1.0:
        indices = torch.arange(len(x))
    loss = losses_of(third)(x[indices], y[indices]).mean()
    own = dict(third.named_parameters())
    gradients = torch.autograd.grad(loss, [own[n] for n in trained])
    return dict(zip(trained, gradients, strict=True)), indices, first


def copy_of(model):
    """Return a deep copy; old-style norms keep a tensor with a graph, which cannot be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()
    return copy.deepcopy(model)


def batches(n):
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        yield (
            torch.randn(8, 4, generator=generator),
            torch.randint(3, (8,), generator=generator),
        )
