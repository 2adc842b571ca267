"""Blocks with side effects, hooks, and scripts that look into the prefix: as without a prefix."""

import copy
import pickle

import pytest
import torch
from tests.torch.networks import vectors
from tests.torch.replays import Chain, Layer, cross_entropies, replays_of, train
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Proportional, Suffix
from esam_torch.blocks import find_blocks

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0])


class LaysALossAside(Layer):
    """As a mixture of experts does with its balance."""

    aside = None

    def forward(self, x):
        y = super().forward(x)
        self.aside = y.square().mean(1)
        return y


def with_losses_aside(model):
    def losses(x, y):
        values = F.cross_entropy(model(x), y, reduction="none")
        for block in (model.a, model.b):
            values = values + block.aside
            block.aside = None
        return values

    return losses


class Appends(Layer):
    """Writes into a list that its model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        y = super().forward(x)
        self.seen.append(y.square().mean(1))
        return y


class SharedList(Chain):
    def __init__(self) -> None:
        super().__init__(Appends)
        self.b = Layer()
        self.seen = self.a.seen

    def forward(self, x):
        self.seen.clear()
        logits = super().forward(x)
        return logits + self.seen[0][:, None] * torch.arange(10.0)


class OwnGenerator(Layer):
    """Noise from a generator of its own, which the step does not set back."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(3)

    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape, generator=self.noise)


class Codebook(Layer):
    """A moving average in a buffer, which the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        y = super().forward(x)
        self.mean.lerp_(y.detach().mean(0), 0.5)
        return y - self.mean


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


@GAMMAS
@pytest.mark.parametrize("make", [Codebook, spectral, LaysALossAside], ids=lambda f: f.__name__)
def test_blocks_that_change_something_are_run_again(make, gamma, monkeypatch):
    torch.manual_seed(0)
    losses_of = with_losses_aside if make is LaysALossAside else cross_entropies
    options = {"gamma": gamma, "losses_of": losses_of}
    assert replays_of(Chain(make), monkeypatch, **options) == 0


@pytest.mark.parametrize(("gamma", "replays"), [(0.5, 1), (1.0, 0)])
def test_one_block_that_changes_something(gamma, replays, monkeypatch):
    """The one behind it is still left out, but for gradients that would come two ways."""
    torch.manual_seed(0)
    assert replays_of(SharedList(), monkeypatch, gamma=gamma) == replays


@GAMMAS
def test_a_generator_of_the_block_s_own(gamma):
    """It goes on from pass to pass, as without a prefix."""
    torch.manual_seed(0)
    model = Chain()
    model.b = OwnGenerator()
    train(model, gamma=gamma)
    drawn = torch.randn(1, generator=model.b.noise)
    passes = 1 + 3 * (3 if gamma < 1.0 else 2)  # the one that finds the blocks, too
    generator = torch.Generator().manual_seed(3)
    for i in range(passes):
        rows = 8 if gamma == 1.0 or i == 0 or i % 3 else 4
        torch.randn((rows, 8), generator=generator)
    assert drawn == torch.randn(1, generator=generator)


class Caches(Layer):
    """Fills a cache in its first forward, as position embeddings do."""

    cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.ones(8)
        return super().forward(x * self.cache)


@GAMMAS
def test_a_cache_is_filled_once(gamma, monkeypatch):
    torch.manual_seed(0)
    # Filled when the blocks were found, so that the first step's replays count.
    assert replays_of(Chain(Caches), monkeypatch, gamma=gamma) == 2


class SetsAnew(Layer):
    def forward(self, x):
        self.scale = 8**-0.5
        self.shape = x.shape
        return super().forward(x)


def test_a_number_set_to_what_it_was_is_no_change(monkeypatch):
    torch.manual_seed(0)
    assert replays_of(Chain(SetsAnew), monkeypatch, gamma=1.0) == 2


@pytest.mark.parametrize(("gamma", "replays"), [(0.5, 1), (1.0, 0)])
def test_hooks_inside_a_block_see_it_run(gamma, replays, monkeypatch):
    class Features(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.features: list[torch.Tensor] = []
            self.a.linear.register_forward_hook(lambda m, i, o: self.features.append(o))

        def __deepcopy__(self, memo):
            twin = Features()
            twin.load_state_dict(self.state_dict())
            return twin

        def forward(self, x):
            self.features.clear()
            return super().forward(x) + self.features[0].sum(1, keepdim=True)

    torch.manual_seed(0)
    assert replays_of(Features(), monkeypatch, gamma=gamma) == replays


class Reversed(Chain):
    """The gradient is turned round behind `a`, by a hook on its output."""

    def forward(self, x):
        hidden = self.a(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda g: -3.0 * g)
        return self.head(self.c(self.b(hidden)))


@pytest.mark.parametrize(("gamma", "replays"), [(0.5, 2), (1.0, 0)])
def test_a_hook_on_an_output_is_called_once(gamma, replays, monkeypatch):
    torch.manual_seed(0)
    assert replays_of(Reversed(), monkeypatch, gamma=gamma) == replays


@pytest.mark.parametrize(("gamma", "replays"), [(0.5, 2), (1.0, 0)])
def test_hooks_on_a_block_s_backward(gamma, replays, monkeypatch):
    class Hooked(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.calls = [0]
            self.b.register_full_backward_hook(self.triple)

        def triple(self, module, inputs, outputs):
            self.calls[0] += 1
            return tuple(3.0 * g for g in inputs)

        def __deepcopy__(self, memo):
            twin = Hooked()
            twin.load_state_dict(self.state_dict())
            return twin

    torch.manual_seed(0)
    model = Hooked()
    assert replays_of(model, monkeypatch, gamma=gamma) == replays
    assert model.calls == [3]


def test_a_closure_given_to_a_block(monkeypatch):
    class TakesAFunction(Layer):
        def forward(self, x, tell):
            y = super().forward(x)
            tell(y)
            return y

    class Closures(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.a = TakesAFunction()

        def forward(self, x):
            seen = []
            hidden = self.a(x, lambda y: seen.append(y.sum(1, keepdim=True)))
            return self.head(self.c(self.b(hidden))) + seen[0]

    torch.manual_seed(0)
    assert replays_of(Closures(), monkeypatch, gamma=0.5) == 1


def with_a_penalty_on_hidden(model):
    """The gradient with respect to what the ascent has computed without a graph."""

    def losses(x, y):
        hidden = model.a(x)
        logits = model.head(model.c(model.b(hidden)))
        values = F.cross_entropy(logits, y, reduction="none")
        if not torch.is_grad_enabled():
            return values
        (g,) = torch.autograd.grad(values.sum(), hidden, create_graph=True)
        return values + g.square().sum(1)

    return losses


class LeavesEarly(Chain):
    """No perturbed block runs in some steps."""

    early = False

    def forward(self, x):
        if self.early:
            return self.b(self.a(x))
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:From now on every pass runs the whole model")
@pytest.mark.parametrize("options", [{"gamma": 0.5}, {"select": Proportional(0.5)}], ids=str)
def test_a_penalty_on_a_hidden_gradient(options, monkeypatch):
    torch.manual_seed(0)
    options = {"losses_of": with_a_penalty_on_hidden, **options}
    assert replays_of(Chain(), monkeypatch, **options) == 0


def test_the_way_back_to_whole_passes_is_told_once():
    torch.manual_seed(0)
    model = Chain()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, perturb=Suffix("c"))
    losses = with_a_penalty_on_hidden(model)
    with pytest.warns(UserWarning, match=r"every pass runs the whole model.*require grad"):
        optimizer.step(losses, *vectors())
    optimizer.step(losses, *vectors())  # a second warning would be an error here


def test_an_error_of_the_script_s_own_is_raised():
    torch.manual_seed(0)
    model = Chain()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, perturb=Suffix("c"))
    optimizer.step(cross_entropies(model), *vectors())

    def fails(*_):
        raise RuntimeError("of the script's own")

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="of the script's own"):
        optimizer.step(fails, *vectors())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.count == 1


def test_a_step_that_leaves_before_the_cut():
    torch.manual_seed(0)
    model = LeavesEarly()
    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, perturb=Suffix("c"), gamma=0.5
    )

    def losses(x, y):
        return F.cross_entropy(model(x), y % 8, reduction="none")

    optimizer.step(losses, *vectors())
    model.early = True
    with pytest.warns(UserWarning, match="every pass runs the whole model"):
        report = optimizer.step(losses, *vectors())
    assert report.perturbation_norm == 0.0
    assert model.a.linear.weight.grad.abs().sum() > 0.0


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(8, 8))

    def forward(self, x):
        return torch.tanh(x @ self.weight.T)


class Lends(Chain):
    """`a` uses the weights of `c`, by a property of theirs."""

    def __init__(self) -> None:
        super().__init__(Transposed)

    def forward(self, x):
        return super().forward(x @ self.c.weight.data.mT)


@GAMMAS
def test_properties_of_weights_are_uses(gamma, monkeypatch):
    torch.manual_seed(0)
    model = Chain(Transposed)
    blocks = find_blocks(model, lambda: model(vectors()[0]))
    assert blocks.cost_of[id(model.b.weight)] > 0.0
    assert replays_of(model, monkeypatch, gamma=gamma) == 2
    model = Lends()
    blocks = find_blocks(model, lambda: model(vectors()[0]))
    assert blocks.block_of[id(model.c.weight)] == 0
    assert replays_of(model, monkeypatch, gamma=gamma, start="head") == 3


def test_a_look_at_a_weight_s_form_is_no_use():
    model = Chain()
    layer = model.head

    def forward():
        assert layer.weight.size(0) == len(layer.weight) == layer.weight.shape[0] == 10
        return model(vectors()[0])

    assert find_blocks(model, forward).block_of[id(layer.weight)] == 3


def test_a_penalty_of_the_weights_before_the_model_is_told():
    model = Chain()

    def forward():
        penalty = sum(p.square().sum() for p in model.parameters())
        return model(vectors()[0]).sum() + penalty

    with pytest.warns(UserWarning, match="weights of 3 blocks, 'b' among them, before"):
        find_blocks(model, forward)


class StochasticDepth(nn.Module):
    def __init__(self, runs: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.head = nn.Linear(8, 10)
        self.runs = runs

    def forward(self, x):
        for i in self.runs:
            x = self.layers[i](x)
        return self.head(x)


def test_what_did_not_run_stays_among_its_neighbours():
    model = StochasticDepth((0, 2, 3, 5))
    blocks = find_blocks(model, lambda: model(vectors()[0]))
    places = [blocks.block_of[id(layer.linear.weight)] for layer in model.layers]
    assert places == [0, 0, 1, 2, 2, 3]
    assert blocks.block_of[id(model.head.weight)] == 4


def test_a_module_that_works_by_itself_is_not_opened():
    class OwnMatrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.dropout = nn.Dropout(0.1)

        def forward(self, x):
            return self.dropout(x @ self.weight)

    model = nn.Sequential(OwnMatrix(), nn.Linear(8, 2))
    assert find_blocks(model, lambda: model(vectors()[0])).names == ("0", "1")


class MakesATeacher(Chain):
    """Copies itself in a forward, as lazily made averages of the weights do."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.calls = 0
        self.when = when
        self.teachers: list[nn.Module] = []

    def forward(self, x):
        self.calls += 1
        if self.calls == self.when:
            self.teachers.append(copy.deepcopy(self.a))
        return super().forward(x)


@pytest.mark.parametrize("when", [1, 2], ids=["found", "ascent"])
def test_a_copy_made_in_a_forward_is_free(when):
    torch.manual_seed(0)
    model = MakesATeacher(when)
    train(model, gamma=0.5)
    (teacher,) = model.teachers
    with torch.no_grad():
        teacher.linear.weight.zero_()
        teacher.linear.bias.zero_()
    assert teacher.eval()(torch.ones(2, 8)).abs().sum() == 0.0
    pickle.dumps(teacher)


@pytest.mark.filterwarnings("error")
def test_data_parallel_copies_are_not_patched():
    model = nn.DataParallel(Chain())
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, perturb=Suffix("c"))
    losses = cross_entropies(model)
    optimizer.step(losses, *vectors())
    assert optimizer._prefix is not None
    layout = optimizer._laid_out
    mask = optimizer._mask(layout.parameters)
    assert optimizer._prefix(losses, layout.blocks, layout.parameters, mask) is None


class WithStatistics(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return super().forward(self.norm(x))


def with_a_teacher_s_pass(model):
    """The same network in evaluation first, then in training, which updates what that has read."""

    def losses(x, y):
        model.eval()
        with torch.no_grad():
            soft = model(x).softmax(1)
        model.train()
        return F.cross_entropy(model(x), y, reduction="none") - (soft * model(x)).sum(1)

    return losses


@GAMMAS
def test_running_statistics_that_are_read_before_they_are_updated(gamma, monkeypatch):
    torch.manual_seed(0)
    model = Chain(WithStatistics)
    replays_of(model, monkeypatch, gamma=gamma, losses_of=with_a_teacher_s_pass)


@GAMMAS
def test_frozen_statistics_are_no_obstacle(gamma, monkeypatch):
    torch.manual_seed(0)
    model = Chain(WithStatistics)
    for block in (model.a, model.b):
        block.norm.eval()
    assert replays_of(model, monkeypatch, gamma=gamma) == 2
