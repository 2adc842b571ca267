"""torch.compile, whole and block by block, and CUDA graphs."""

import contextlib
import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from functorch.compile import make_boxed_func, nop
from tests.torch import reruns
from tests.torch.devices import needs_cuda
from tests.torch.reruns import make, run
from tests.torch.scene import batch, losses_of, net, same
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from esam_torch import (
    Bernoulli,
    Everything,
    Momentum,
    Previous,
    RandomSuffix,
    Suffix,
    TopIncrease,
    TopLoss,
)
from esam_torch.compat import COMPILED_MODELS_SEE_REQUIRES_GRAD

# A warning of torch: a compiled block reads `.grad` of its inputs, which are not leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Counting:
    """A compiler that counts its graphs and runs them eagerly."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


PERTURBED = {
    "paper": Bernoulli(0.6),
    "weights": Bernoulli(0.5, unit="weight"),
    "all": Everything(),
}


@contextlib.contextmanager
def expect_warning(expected=True):
    """There are too many random masks to compile: they are multiplied in."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    warned = [w for w in caught if "too many masks to compile" in str(w.message)]
    assert len(warned) == (1 if expected else 0)
    assert all(w.filename == reruns.__file__ for w in warned)  # at the user's line


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("perturb", PERTURBED)
def test_the_whole_model(perturb, gamma):
    """The same results as eager, and one graph per kind of pass, not per mask.

    The kinds are: whole batch with gradients, whole batch without, selected samples (with symbolic
    sizes).
    """
    options = {"perturb": PERTURBED[perturb], "gamma": gamma}
    eager, whole = net(), net()
    wanted = run(make(eager, **options), 8)
    compiler = Counting()
    compiled = torch.compile(whole, backend=compiler)
    with expect_warning(perturb == "paper"):
        found = run(make(compiled, **options), 8)
    same(found, wanted, "reports")
    same(whole.state_dict(), eager.state_dict(), "weights")
    bound = 1 if gamma == 1.0 else 4
    assert compiler.graphs <= bound
    before = compiler.graphs
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        expect_warning(perturb == "paper"),
    ):
        run(make(compiled, **options), 4)
    assert compiler.graphs == before


@pytest.mark.parametrize(
    "options",
    [{"norm": "full"}, {"ascend": Momentum()}, {"ascend": Previous()}],
    ids=["norm", "momentum", "previous"],
)
def test_no_warning_if_nothing_could_be_pruned(options):
    """The ascent needs all gradients, or there is none: fewer masks would save nothing."""
    compiled = torch.compile(net(), backend="eager")
    with expect_warning(False):
        run(make(compiled, **options), 6)


def test_the_whole_model_compiled_in_place():
    eager, whole = net(), net()
    wanted = run(make(eager), 4)
    compiler = Counting()
    whole.compile(backend=compiler)
    with expect_warning():
        found = run(make(whole), 4)
    same(found, wanted, "reports")
    same(whole.state_dict(), eager.state_dict(), "weights")
    assert 1 <= compiler.graphs <= 4


class Stem(nn.Module):
    """The first block. (torch does not compile frames of its own layers, so we define blocks.)"""

    def __init__(self, model):
        super().__init__()
        self.conv, self.norm = model.conv, model.norm

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))).mean((2, 3))


class Head(nn.Module):
    """The last block."""

    def __init__(self, model):
        super().__init__()
        self.dropout, self.hidden, self.head = model.dropout, model.hidden, model.head

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.dropout(x))))


def in_blocks():
    """Return the same network as two blocks."""
    model = net()
    return nn.Sequential(OrderedDict(stem=Stem(model), head=Head(model)))


@pytest.mark.parametrize(
    "perturb", [Bernoulli(0.6), Suffix("head"), RandomSuffix(("stem", "head"))], ids=repr
)
def test_block_by_block(perturb):
    """Blocks are compiled separately, with one more graph per mask if there are few masks."""
    eager, blocks = in_blocks(), in_blocks()
    wanted = run(make(eager, perturb=perturb, blocks=("stem", "head")), 6)
    compiler = Counting()
    for block in blocks:
        block.compile(backend=compiler)
    optimizer = make(blocks, perturb=perturb, blocks=("stem", "head"))
    with expect_warning(isinstance(perturb, Bernoulli)):
        same(run(optimizer, 6), wanted, "reports")
    same(blocks.state_dict(), eager.state_dict(), "weights")
    assert 1 <= compiler.graphs <= 4 * len(blocks)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(optimizer, 6)


class Deep(nn.Module):
    """Four convolutions and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        for conv in self.convs:
            x = torch.tanh(conv(x))
        return self.head(x.mean((2, 3)))


class Backwards:
    """A compiler that counts the gradients of convolutions' weights in its backward graphs."""

    def __init__(self):
        self.found = []

    def backward(self, graph, inputs):
        nodes = [n for n in graph.graph.nodes if "convolution_backward" in str(n.target)]
        self.found.append(sum(n.args[-1][1] for n in nodes))
        return make_boxed_func(graph.forward)

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=nop, bw_compiler=self.backward)(graph, inputs)


@pytest.mark.skipif(
    not COMPILED_MODELS_SEE_REQUIRES_GRAD,
    reason="torch before 2.13: its guards ignore requires_grad",
)
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
@pytest.mark.parametrize(
    ("perturb", "wanted"),
    [
        (Suffix("convs.2"), {4, 2}),
        (Suffix("head"), {4, 0}),
        (RandomSuffix(("convs.2", "convs.3", "head")), {4, 2, 1, 0}),
    ],
    ids=repr,
)
def test_the_graph_of_the_ascent_is_pruned(perturb, wanted, in_place):
    """Each mask has its own graph, which computes no gradients of other weights."""
    eager, whole = Deep(), Deep()
    options = {"perturb": perturb, "gamma": 1.0}
    expected = run(make(eager, **options), 12)
    compiler = Backwards()
    if in_place:
        whole.compile(backend=compiler)
        compiled = whole
    else:
        compiled = torch.compile(whole, backend=compiler)
    optimizer = make(compiled, **options)
    same(run(optimizer, 12), expected, "reports")
    same(whole.state_dict(), eager.state_dict(), "weights")
    assert set(compiler.found) == wanted and len(compiler.found) == len(wanted)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(optimizer, 12)


def test_losses_that_are_never_compiled():
    model = net()
    optimizer = make(model)
    with expect_warning(False):
        run(optimizer, 1, losses=torch.compiler.disable(losses_of(model)))


def test_uneven_last_batches():
    """A second batch size needs one more graph per pass; further sizes do not."""
    eager, whole = net(), net()
    compiler = Counting()
    compiled = make(torch.compile(whole, backend=compiler), beta=1.0)
    plain = make(eager, beta=1.0)
    for b in (8, 8, 5, 7, 11, 6):
        same(run(compiled, 1, b=b), run(plain, 1, b=b), f"b = {b}")
    assert compiler.graphs <= 6
    with torch.compiler.set_stance("fail_on_recompile"):
        for b in (9, 12, 10):
            run(compiled, 1, b=b)


def test_losses_compiled_with_the_model():
    """Many scripts compile the loss function."""
    eager, whole = net(), net()
    wanted = run(make(eager), 4)
    compiler = Counting()
    with expect_warning():
        found = run(make(whole), 4, losses=torch.compile(losses_of(whole), backend=compiler))
    same(found, wanted, "reports")
    assert compiler.graphs <= 4


# A warning of torch: inductor still uses deprecated functions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
# Warnings with torch 2.6: its own, and ours that the ascent saves nothing.
@pytest.mark.filterwarnings("ignore:Skipping serialization of")
@pytest.mark.filterwarnings("ignore:.*torch before 2.13 does not recompile")
@pytest.mark.slow
def test_inductor():
    """The default compiler, on a model without dropout (which has its own random numbers)."""
    eager, whole = net(dropout=0.0), net(dropout=0.0)
    options = {"perturb": Suffix("hidden")}
    wanted = run(make(eager, **options), 4)
    found = run(make(torch.compile(whole), **options), 4)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-5)
        assert a[2].tolist() == b[2].tolist()
    for p, q in zip(whole.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


class Replayed(torch.autograd.Function):
    """Returns memory that the next call overwrites, like a replayed CUDA graph."""

    memory = torch.zeros(16)

    @staticmethod
    def forward(ctx, x):
        result = Replayed.memory[: len(x)]
        result.copy_(x)
        return result.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


@pytest.mark.parametrize("select", [TopIncrease(0.5), TopLoss(0.5), TopIncrease(1.0)], ids=repr)
def test_losses_that_the_next_pass_overwrites(select):
    model, plain = net(), net()
    wanted = run(make(plain, gamma=None, select=select), 3)
    replayed = lambda x, y: Replayed.apply(losses_of(model)(x, y))  # noqa: E731
    same(run(make(model, gamma=None, select=select), 3, losses=replayed), wanted, "reports")
    same(model.state_dict(), plain.state_dict(), "weights")


# -- CUDA --------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("select", [None, TopLoss(0.5)], ids=repr)
def test_cuda_graphs(select):
    """mode="reduce-overhead" replays CUDA graphs, which overwrite their earlier results."""
    eager, whole = net(dropout=0.0).cuda(), net(dropout=0.0).cuda()
    options = {"select": select, "gamma": None if select else 0.5}
    compiled = torch.compile(whole, mode="reduce-overhead")
    ours, plain = make(compiled, **options), make(eager, **options)
    for seed in range(6):
        data = tuple(t.cuda() for t in batch(seed=seed))
        found = ours.step(losses_of(compiled), *data)
        wanted = plain.step(losses_of(eager), *data)
        assert torch.allclose(found.losses, wanted.losses, atol=1e-4)
        assert found.indices.tolist() == wanted.indices.tolist()
    for p, q in zip(whole.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_a_deep_copy_of_a_compiled_model_is_independent():
    whole = net()
    optimizer = make(torch.compile(whole, backend=Counting()), beta=1.0)
    run(optimizer, 1)
    assert copy.deepcopy(whole).state_dict().keys() == whole.state_dict().keys()
