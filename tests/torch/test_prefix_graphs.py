"""The prefix in odd networks: replaying must change no bit of what the literal step does."""

import copy

import pytest
import torch
from tests.torch.networks import vectors
from tests.torch.replays import Chain, Layer, cross_entropies, replays_of, train
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esam_core import ESAMTypeError
from esam_torch import TopLoss
from esam_torch import prefix as prefixes
from esam_torch.blocks import find_blocks, lends_its_memory
from esam_torch.prefix import Prefix

pytestmark = [
    # torch's own: a compiled block looks at `.grad` of its inputs, which are not leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


class ChangesItsInput(Chain):
    """`b` writes over its input, and what is behind it uses that again."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))

    def forward(self, x):
        x = self.a(x) * 1.5
        return self.head(self.c(self.b(x) + x))


class ChangesAnOutput(ChangesItsInput):
    """What `b` writes over is the output of `a` itself."""

    def forward(self, x):
        x = self.a(x)
        return self.head(self.c(self.b(x) + x))


class IntoADictionary(Layer):
    def forward(self, batch):
        batch["x"] = super().forward(batch["x"])
        return batch


class Dictionaries(Chain):
    """Blocks that hand one dictionary on and write into it."""

    def __init__(self) -> None:
        super().__init__(IntoADictionary)

    def forward(self, x):
        return self.head(self.c(self.b(self.a({"x": x})))["x"])


class Box:
    """An object that torch cannot look into."""

    def __init__(self, x) -> None:
        self.x = x


class IntoABox(Layer):
    def forward(self, box):
        box.x = super().forward(box.x)
        return box


class Boxes(Chain):
    def __init__(self) -> None:
        super().__init__(IntoABox)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(Box(x)))).x)


class OntoAList(Layer):
    def forward(self, x, seen):
        seen.append(super().forward(x))
        return seen[-1]


class Lists(Chain):
    """Blocks that leave their outputs in a list as well."""

    def __init__(self) -> None:
        super().__init__(OntoAList)

    def forward(self, x):
        seen: list[torch.Tensor] = []
        self.c(self.b(self.a(x, seen), seen), seen)
        return self.head(sum(seen))


class NewDictionary(Layer):
    def forward(self, x):
        return {"x": super().forward(x)}


class ChangedDictionary(Chain):
    """The glue behind a block puts something else into the dictionary that the block gave."""

    def __init__(self) -> None:
        super().__init__(NewDictionary)

    def forward(self, x):
        given = self.b(self.a(x)["x"])
        given["x"] = given["x"] * 3.0
        return self.head(self.c(given["x"])["x"])


class AcrossTheCut(Chain):
    """A checkpoint that holds untouched blocks and a perturbed one."""

    def region(self, x):
        return self.c(self.b(x))

    def forward(self, x):
        return self.head(checkpoint(self.region, self.a(x), use_reentrant=False))


class SharedInACheckpoint(Chain):
    """The same, with a block that runs on both sides of the cut."""

    def region(self, x):
        return self.b(self.c(self.b(x)))

    def forward(self, x):
        return self.head(checkpoint(self.region, self.a(x), use_reentrant=False))


class EachCheckpointed(Chain):
    def forward(self, x):
        for block in (self.a, self.b, self.c):
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Inference(Chain):
    """A frozen block under inference mode, whose tensors count no changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)

    def forward(self, x):
        with torch.inference_mode():
            x = self.a(x)
        return self.head(self.c(self.b(x.clone())))


class FrozenEncoder(nn.Module):
    """An encoder that hands nested tensors from layer to layer, as torch's does in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2).requires_grad_(False).eval()
        self.middle = Layer()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = x.unsqueeze(1) * torch.arange(1.0, 4.0).view(1, 3, 1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, 2] = True
        return self.head(self.middle(self.encoder(x, src_key_padding_mask=padding)[:, 0]))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize(
    ("make", "replays", "replays_with_a_graph"),
    [
        (Chain, 2, 2),
        (ChangesItsInput, 1, 1),
        (ChangesAnOutput, 0, 0),
        (Dictionaries, 0, 0),
        (Boxes, 0, 0),
        (Lists, 0, 0),
        (ChangedDictionary, 2, 2),
        (AcrossTheCut, 2, 1),
        (SharedInACheckpoint, 1, 1),
        (EachCheckpointed, 2, 0),
        (Inference, 1, 1),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_replaying_changes_no_bit(make, replays, replays_with_a_graph, gamma, monkeypatch):
    torch.manual_seed(0)
    wanted = replays if gamma < 1.0 else replays_with_a_graph
    assert replays_of(make(), monkeypatch, gamma=gamma) == wanted


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_nested_tensors_between_blocks(gamma, monkeypatch):
    torch.manual_seed(0)
    assert replays_of(FrozenEncoder(), monkeypatch, gamma=gamma, start="head") >= 1


def with_a_gradient_penalty(model):
    """Losses that hold the gradient with respect to the inputs, which runs through the prefix."""

    def losses(x, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            values = F.cross_entropy(model(x), y, reduction="none")
            (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
            return values + slope.square().sum(1)

    return losses


class Skipping(Chain):
    """The input reaches the suffix past the prefix as well."""

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x)) + x))


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"select": TopLoss(0.5)}], ids=str)
@pytest.mark.parametrize("make", [Chain, Skipping])
def test_gradients_with_respect_to_inputs(make, options, monkeypatch):
    torch.manual_seed(0)
    options = {"losses_of": with_a_gradient_penalty, **options}
    assert replays_of(make(), monkeypatch, **options) == 0


class Toggled(Chain):
    """A perturbed parameter that is used before the cut from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.behind = nn.ParameterList([torch.ones(8)])  # the last in the model
        self.calls = 0

    def forward(self, x):
        return super().forward(x * self.behind[0] if self.calls > 3 else x)


def test_a_perturbed_parameter_that_was_not_used_when_blocks_were_found(monkeypatch):
    def counted(model):
        def losses(x, y):
            model.calls += 1
            return cross_entropies(model)(x, y)

        return losses

    torch.manual_seed(0)
    model = Toggled()
    twin = copy.deepcopy(model)
    assert replays_of(twin, monkeypatch, losses_of=counted) < 2


class TwoNetworks(nn.ModuleDict):
    """A container that nobody calls."""

    def __init__(self) -> None:
        super().__init__({"body": nn.Sequential(Layer(), Layer()), "head": nn.Linear(8, 10)})


def test_networks_in_a_container_that_is_not_called(monkeypatch):
    def losses_of(model):
        return lambda x, y: F.cross_entropy(model["head"](model["body"](x)), y, reduction="none")

    torch.manual_seed(0)
    model = TwoNetworks()
    blocks = find_blocks(model, lambda: model["head"](model["body"](vectors()[0])))
    assert blocks.names == ("body.0", "body.1", "head")
    assert blocks.block_of[id(model["body"][0].linear.weight)] == 0
    assert replays_of(model, monkeypatch, losses_of=losses_of, start="head") == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_block_that_does_most_of_the_work_stays_one(wrapped, monkeypatch):
    torch.manual_seed(0)
    model = Chain()
    model.b = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
    if wrapped:
        model.b = torch.compile(model.b, backend="eager")
    else:
        model.b.compile(backend="eager")
    blocks = find_blocks(model, lambda: model(vectors()[0]))
    assert blocks.names == ("a", "b", "c", "head")
    # The prefix is not lost, and nothing warns that the model is compiled as a whole.
    made = []
    init = Prefix.__init__
    monkeypatch.setattr(
        Prefix, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
    )
    train(model)
    assert [prefix.replayed for prefix in made] == [2, 2, 2]


def test_which_compiled_blocks_may_replay_cuda_graphs():
    for options, lends in [
        ({}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"backend": "eager"}, False),  # where there is a GPU, nobody knows
    ]:
        block = nn.Linear(2, 2)
        assert lends_its_memory(torch.compile(block, **options)) is lends
        block.compile(**options)
        assert lends_its_memory(block) is lends


def test_what_a_cuda_graph_has_saved_is_not_relied_on_in_a_later_pass(monkeypatch):
    """With every sample, the descent would go through the graph that the ascent's pass left."""
    torch.manual_seed(0)
    model = Chain()
    model.b.compile(backend="eager")
    assert replays_of(model, monkeypatch, gamma=1.0) == 2
    monkeypatch.setattr(prefixes, "lends_its_memory", lambda _: True)
    torch.manual_seed(0)
    model = Chain()
    model.b.compile(backend="eager")
    assert replays_of(model, monkeypatch, gamma=1.0) == 1


def test_scripted_modules_are_refused_by_name():
    model = Chain()
    model.a = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    with pytest.raises(ESAMTypeError, match=r"'a', a module made by torch\.jit"):
        train(model)


def test_buffers_that_are_one_place_in_memory():
    """As after `expand`: nothing can be written into them, so nothing is put back."""
    model = Chain()
    model.register_buffer("mask", torch.ones(1).expand(8))
    train(model)
    assert torch.equal(model.mask, torch.ones(8))
