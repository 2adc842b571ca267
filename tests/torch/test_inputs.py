"""What all passes of a step read: the batch, its containers, the weights and the modes."""

import copy
import dataclasses
from collections import UserDict, deque

import pytest
import torch
from tests.torch.batches import SharedStore
from tests.torch.scene import batch, losses_of, net
from torch.nn import functional as F

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_torch import ESAM, Everything, Part, Random, Rows, Suffix, Whole

KINDS = {
    "all": {"gamma": 1.0},
    "selected": {"gamma": 0.5},
    "selected at random": {"select": Random(0.5)},
    "ascent on a part": {"gamma": 0.5, "ascend": Part(0.5)},
}


def make(model, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ESAM(optimizer, model, **{"rho": 0.1, "perturb": Everything(), **settings})


def normalising(model):
    return lambda x, y: F.cross_entropy(model(x.sub_(0.5).div_(0.25)), y, reduction="none")


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_batch_that_each_pass_changes_is_refused(settings):
    model = net(dropout=0.0)
    optimizer, (x, y) = make(model, **settings), batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ESAMRuntimeError, match=r"must not change its batch in place.*x\.sub\(mean\)"
    ):
        optimizer.step(normalising(model), x, y)
    assert optimizer.count == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("perturb", [Everything(), Suffix("head")])
def test_a_base_step_has_one_pass_and_may_write(perturb):
    """The batch is written to once, although a sampler of suffixes runs an extra forward first."""
    model, plain = net(dropout=0.0), net(dropout=0.0)
    optimizer, (x, y) = make(model, rho=0.0, perturb=perturb), batch()
    loss = normalising(plain)(x.clone(), y).mean()
    assert torch.equal(optimizer.step(normalising(model), x, y).losses.mean(), loss)
    assert torch.equal(x, batch()[0].sub(0.5).div(0.25))


def test_samples_taken_out_of_the_batch_are_copies():
    """The ascent pass writes to a copy of its samples; only the descent writes to the batch."""
    model, plain = net(dropout=0.0), net(dropout=0.0)
    settings = {"gamma": 1.0, "ascend": Part(0.5)}
    x, y = batch()
    make(model, **settings).step(normalising(model), x.clone(), y)
    make(plain, **settings).step(
        lambda x, y: F.cross_entropy(plain(x.sub(0.5).div(0.25)), y, reduction="none"), x, y
    )
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_writing_the_same_values_again_is_allowed(settings):
    model, plain = net(dropout=0.0), net(dropout=0.0)
    optimizer, other = make(model, **settings), make(plain, **settings)
    x, y = batch()
    x[1, 1, 2] = float("nan")

    def cleaning(x, y):
        x[x.isnan()] = 0.0
        x[:, 0] = x[:, 0].clamp(-1.0, 1.0)
        return F.cross_entropy(model(x), y, reduction="none")

    cleaned = x.nan_to_num(0.0)
    cleaned[:, 0] = cleaned[:, 0].clamp(-1.0, 1.0)
    optimizer.step(cleaning, x, y)
    other.step(lambda x, y: F.cross_entropy(plain(x), y, reduction="none"), cleaned, y)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


# -- containers ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def tensordict(x, y):
    return pytest.importorskip("tensordict").TensorDict({"x": x, "y": y}, batch_size=len(x))


HOLDERS = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "UserDict": (lambda x, y: UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "dataclass": (Pair, lambda b: (b.x, b.y)),
    "marked": (lambda x, y: [Rows(x), Rows(y)], tuple),
    "list in a dict": (lambda x, y: {"both": [x, y]}, lambda b: b["both"]),
    "TensorDict": (tensordict, lambda b: (b["x"], b["y"])),
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", HOLDERS)
def test_a_tensor_in_any_container_that_each_pass_changes_is_refused(kind, settings):
    model, (build, read) = net(dropout=0.0), HOLDERS[kind]

    def losses(b):
        x, y = read(b)
        return F.cross_entropy(model(x.mul_(2.0)), y, reduction="none")

    with pytest.raises(ESAMRuntimeError, match=r"must not change its batch in place"):
        make(model, **settings).step(losses, build(*batch()))


def test_a_tensor_in_a_queue_that_each_pass_changes_is_refused():
    """A queue cannot be split by sample, but steps on the whole batch take it."""
    model = net(dropout=0.0)

    def losses(queue):
        x, y = queue
        return F.cross_entropy(model(x.mul_(2.0)), y, reduction="none")

    with pytest.raises(ESAMRuntimeError, match=r"must not change its batch in place"):
        make(model, gamma=1.0).step(losses, deque(batch()))


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["dict", "UserDict", "dataclass", "TensorDict"])
def test_a_pass_may_put_other_values_into_its_containers(kind, settings):
    """Each pass has its own containers, and finds what the user has put into them."""
    model, plain, (build, _) = net(dropout=0.0), net(dropout=0.0), HOLDERS[kind]

    def doubling(b):
        if kind == "dataclass":
            b.x = b.x * 2.0
            return F.cross_entropy(model(b.x), b.y, reduction="none")
        b["x"] = b["x"] * 2.0
        return F.cross_entropy(model(b["x"]), b["y"], reduction="none")

    x, y = batch()
    optimizer, other = make(model, **settings), make(plain, **settings)
    given = build(x, y)
    optimizer.step(doubling, given)
    other.step(lambda x, y: F.cross_entropy(plain(x * 2.0), y, reduction="none"), x, y)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(given.x if kind == "dataclass" else given["x"], x)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["samples", "marked"])
def test_a_pass_may_put_other_values_into_containers_in_lists_and_marks(kind, settings):
    """One dictionary per sample, and one for all samples."""
    model, plain, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()

    def doubling(samples, factor):
        if kind == "samples":
            for sample in samples:
                sample["x"] = sample["x"] * 2.0
        else:
            factor["by"] = factor["by"] * 2.0
        inputs = torch.stack([sample["x"] for sample in samples]) * factor["by"]
        targets = torch.stack([sample["y"] for sample in samples])
        return F.cross_entropy(model(inputs), targets, reduction="none")

    optimizer, other = make(model, **settings), make(plain, **settings)
    samples = [{"x": row, "y": label} for row, label in zip(x, y, strict=True)]
    optimizer.step(doubling, samples, Whole({"by": torch.ones(())}))
    other.step(lambda x, y: F.cross_entropy(plain(x * 2.0), y, reduction="none"), x, y)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(sample["x"].equal(row) for sample, row in zip(samples, x, strict=True))


# -- between a loss and its backward ---------------------------------------------------------------


REFILLS = {
    "dict": (HOLDERS["dict"][0], lambda b, x: b.update(x=x)),
    "UserDict": (HOLDERS["UserDict"][0], lambda b, x: b.update(x=x)),
    "dataclass": (Pair, lambda b, x: setattr(b, "x", x)),
    "marked": (lambda x, y: Rows({"x": x, "y": y}), lambda b, x: b.value.update(x=x)),
    "list in a dict": (HOLDERS["list in a dict"][0], lambda b, x: b["both"].insert(0, x)),
    "TensorDict": (tensordict, lambda b, x: b.set("x", x)),
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", REFILLS)
def test_a_container_may_be_refilled_between_loss_and_backward(kind, settings):
    """A loop that reuses its dictionary, with one backward for the sum of two losses."""
    model, twin, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()
    build, refill = REFILLS[kind]
    read = HOLDERS.get("dict" if kind == "marked" else kind)[1]

    def losses(b):
        x, y = read(b)[:2]
        return F.cross_entropy(model(x), y, reduction="none")

    optimizer, other = make(model, **settings), make(twin, **settings)
    given = build(x, y)
    loss = optimizer.loss(losses, given)
    refill(given, x + 1.0)
    loss.backward()
    other.loss(losses_of(twin), x, y).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    "build", [deque, lambda b: SharedStore(dict(enumerate(b)))], ids=["queue", "store"]
)
def test_a_container_without_copies_that_is_refilled_is_refused(build):
    model, (x, y) = net(dropout=0.0), batch()
    before = copy.deepcopy(model.state_dict())
    optimizer, given = make(model, gamma=1.0), build((x, y))
    loss = optimizer.loss(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="none"), given)
    given[0] = x + 1.0
    with pytest.raises(ESAMRuntimeError, match=r"The batch must not.*a batch with other tensors"):
        loss.backward()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) and value.grad is None


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("what", "marked"), [("batch", False), ("batch", True), ("weights", False)]
)
def test_what_is_written_between_loss_and_backward_is_refused(what, marked, settings):
    model, (x, y) = net(dropout=0.0), batch()
    optimizer = make(model, **settings)
    loss = optimizer.loss(losses_of(model), Rows(x) if marked else x, y)
    with torch.no_grad():
        (x if what == "batch" else next(model.parameters())).add_(1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ESAMRuntimeError, match=rf"The {what} must not change between optimizer"):
        loss.backward()
    assert optimizer.count == 0 and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or "running" in name or "tracked" in name


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_all_passes_have_the_modes_of_the_first(settings):
    """An evaluation between a loss and its backward, and a model that is left in that mode."""
    model, twin, (x, y) = net(), net(), batch()
    for module, mode in ((model, False), (twin, True)):
        torch.manual_seed(3)
        loss = make(module, **settings).loss(losses_of(module), x, y)
        module.train(mode)
        loss.backward()
        assert all(m.training is mode for m in module.modules())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_parameter_that_was_frozen_after_the_loss_stays_frozen():
    model, (x, y) = net(dropout=0.0), batch()
    optimizer = make(model, perturb=Suffix("head"))
    loss = optimizer.loss(losses_of(model), x, y)
    first = next(model.parameters())
    first.requires_grad_(False)
    loss.backward()
    assert not first.requires_grad and all(p.requires_grad for p in [*model.parameters()][1:])


@pytest.mark.parametrize("rows", [3, 8])
def test_a_trained_parameter_is_not_an_argument(rows):
    """It would be left out of the perturbation, or be split by sample."""
    model = net(dropout=0.0)
    model.scale = torch.nn.Parameter(torch.ones(rows, 1))
    with pytest.raises(ESAMRuntimeError, match=r"take trained parameters from the model"):
        make(model, gamma=0.5).loss(lambda x, y, s: x, *batch(), model.scale)
    own = torch.nn.Parameter(torch.ones(len(batch()[0]), 1, 1, 1))  # of another optimizer

    def losses(x, y, scale):
        return F.cross_entropy(model(x * scale), y, reduction="none")

    with pytest.raises(ESAMTypeError, match=r"one row per sample, or a parameter for all"):
        make(model, gamma=0.5).loss(losses, *batch(), own).backward()
