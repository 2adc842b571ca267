"""State that a forward writes is, after a step, the same as after one forward.

For comparison, each pass runs on a copy of the model from the start of the step.
"""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from benchmarks.memory import LiveBytes
from tests.torch.scene import SUFFIX_PART
from tests.torch.writing import (
    MODELS,
    Base,
    ListQueue,
    MaxNorm,
    OwnNorm,
    batches,
    by_hand,
    losses_of,
    written,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from esam_core import ESAMRuntimeError, ESAMValueError
from esam_torch import ESAM, All, Everything, Momentum, Part, Previous, Random, TopLoss
from esam_torch.written import Writes


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_state_is_written_once_per_step(kind, gamma):
    """Each pass starts from the same state: gradients equal those computed by hand."""
    torch.manual_seed(0)
    model = kind()
    optimizer = ESAM(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2),
        model,
        rho=0.5,
        perturb=Everything(),
        gamma=gamma,
    )
    for x, y in batches(6):
        gradients, indices, after = by_hand(model, x, y, 0.5, gamma)
        optimizer.zero_grad()
        report = optimizer.backward(losses_of(model), x, y)
        assert report.indices is None or torch.equal(report.indices, indices)
        assert written(model) == written(after)
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, gradients[name])
        optimizer.step()


@pytest.mark.parametrize("perturbed", [True, False])
def test_trained_weights_that_a_forward_clips(perturbed):
    """Weights are as the first forward left them, even if `.data` is another tensor now."""
    torch.manual_seed(0)
    model = MaxNorm()
    groups = [
        {"params": model.encoder.parameters()},
        {"params": model.head.parameters(), "esam_perturb": perturbed},
    ]
    optimizer = ESAM(torch.optim.SGD(groups, lr=0.2), model, rho=2.0, perturb=Everything())
    for x, y in batches(4):
        after = copy.deepcopy(model)
        losses_of(after)(x, y)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model), x, y)
        for a, b in zip(model.parameters(), after.parameters(), strict=True):
            assert torch.equal(a, b)
        optimizer.step()


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("earlier", [0, 4])
def test_a_failed_step_writes_nothing(kind, call, earlier):
    torch.manual_seed(0)
    model = kind()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ESAM(torch.optim.SGD(trained, lr=0.2), model, rho=0.5, perturb=Everything())
    calls = []

    def failing(x, y):
        values = losses_of(model)(x, y)
        calls.append(len(x))
        if len(calls) == call:
            raise KeyboardInterrupt
        return values

    *some, (x, y) = batches(earlier + 1)
    for data in some:
        optimizer.step(losses_of(model), *data)
    before = written(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(failing, x, y)
    assert written(model) == before


def test_two_losses_at_once():
    """Both forwards have written, in order."""
    model = ListQueue()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    twin = copy.deepcopy(model)
    one, two = batches(2)
    (optimizer.loss(losses_of(model), *one) + optimizer.loss(losses_of(model), *two)).backward()
    losses_of(twin)(*one), losses_of(twin)(*two)
    assert written(model) == written(twin)


class LargeBase(Base):
    """A small adapter with large frozen weights that a forward may average."""

    def __init__(self, since):
        super().__init__()
        self.large = nn.Linear(1024, 1024).requires_grad_(False)
        self.since, self.calls = since, 0

    def shift(self, x, h):
        self.calls += 1
        if self.calls >= self.since:
            with torch.no_grad():
                self.large.weight.add_(1.0)
        return self.large.weight[0, 0]


class Copied(TorchDispatchMode):
    """Count the bytes that are allocated."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "view" not in func.name():
            self.bytes += result.untyped_storage().nbytes()
        return result


def test_a_large_frozen_base_is_not_copied():
    model = LargeBase(since=1000)
    large = model.large.weight.numel() * 4
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ESAM(torch.optim.SGD(trained, lr=0.1), model, rho=0.05)
    for x, y in batches(5):
        with LiveBytes() as live:
            optimizer.step(losses_of(model), x, y)
        assert live.peak < 0.1 * large


@pytest.mark.parametrize("since", [1, 5])
def test_a_warning_for_writes_without_a_copy(since):
    """From then on, the state is written once per step."""
    model = LargeBase(since)
    model.large.weight.zero_()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ESAM(torch.optim.SGD(trained, lr=0.1), model, rho=0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, (x, y) in enumerate(batches(8)):
            optimizer.step(losses_of(model), x, y)
            assert float(model.large.weight[0, 0]) == max(0, i + 2 - since)
    assert len([w for w in caught if "had not copied" in str(w.message)]) == 1


def test_one_sample_with_a_custom_batchnorm():
    """The descent pass on one sample uses the running statistics, as with torch's BatchNorm."""
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(4, 6), OwnNorm(6), nn.Tanh(), nn.Linear(6, 3))
    theirs = nn.Sequential(
        copy.deepcopy(mine[0]), nn.BatchNorm1d(6, affine=False), nn.Tanh(), copy.deepcopy(mine[3])
    )
    pairs = [
        (m, ESAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.1, gamma=0.1))
        for m in (mine, theirs)
    ]
    for x, y in batches(5):
        for model, optimizer in pairs:
            optimizer.step(losses_of(model), x, y)
            assert model[1].training
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)


def test_a_step_of_a_model_that_writes_nothing_copies_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1)
    walked, walks = [], []
    original = Writes.candidates
    monkeypatch.setattr(Writes, "candidates", lambda self: walks.append(1) or original(self))
    for number, (x, y) in enumerate(batches(9), 1):
        optimizer.step(losses_of(model), x, y)
        walked += [number] if walks else []
        walks.clear()
    assert walked == [1, 2, 3, 4, 8]


def test_statistics_of_a_model_whose_first_step_was_in_evaluation_mode():
    """Torch does not count that batch_norm has written; values are compared once in each mode."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), OwnNorm(6), nn.Linear(6, 3)), *batches(1)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for training in (False, True, True):
        model.train(training)
        twin = copy.deepcopy(model)
        twin(x)
        optimizer.step(losses_of(model), x, y)
        assert torch.equal(model[1].mean, twin[1].mean) and torch.equal(model[1].var, twin[1].var)


def test_statistics_after_a_first_step_that_failed():
    """As if the first call had a bug, mended in a notebook: values are still compared once."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), OwnNorm(6), nn.Linear(6, 3)), *batches(1)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ESAMValueError, match="one loss per sample"):
        optimizer.step(lambda x, y: losses_of(model)(x, y).mean(), x, y)
    for _ in range(3):
        twin = copy.deepcopy(model)
        twin(x)
        optimizer.step(losses_of(model), x, y)
        assert torch.equal(model[1].mean, twin[1].mean) and torch.equal(model[1].var, twin[1].var)


@pytest.mark.parametrize("select", [Random(0.5), TopLoss(0.5), All()], ids=repr)
def test_statistics_after_a_skipped_step_without_a_pass_at_theta(select):
    """The step also compares losses in evaluation mode, before any pass in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"perturb": Everything(), "select": select, "ascend": Momentum()}
    optimizer = ESAM(base, model, **options, on_nonfinite="skip")
    (first, bad, *_) = batches(3)
    optimizer.step(losses_of(model), *first)
    before = copy.deepcopy(model.state_dict())
    assert optimizer.step(losses_of(model), bad[0] * torch.nan, bad[1]).skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("evaluated", [range(5), range(7, 9)], ids=["first", "in between"])
def test_statistics_of_layers_that_were_in_evaluation_mode(evaluated):
    """As when frozen statistics are trained again: an ordinary step, without a warning."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), *batches(1)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(12):
        model[1].train(step not in evaluated)
        twin = copy.deepcopy(model)
        twin(x)
        optimizer.step(losses_of(model), x, y)  # warnings are errors
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated
def test_buffers_of_a_scripted_module():
    torch.manual_seed(0)
    inner = torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), inner, nn.Linear(6, 3)), *batches(1)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(4):
        before = {name: b.clone() for name, b in model.named_buffers()}
        with torch.no_grad():
            model(x)
        wanted = {name: b.clone() for name, b in model.named_buffers()}
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        optimizer.step(losses_of(model), x, y)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, wanted[name])


@pytest.mark.parametrize("options", [SUFFIX_PART, {"ascend": Part(0.25)}, {"ascend": Previous()}])
def test_trained_weights_that_a_forward_writes_are_not_left_perturbed(options):
    class Clamping(Base):
        def shift(self, x, h):
            with torch.no_grad():
                self.head.weight.clamp_(-0.3, 0.3)
            return 0.0 * h

    torch.manual_seed(0)
    model = Clamping()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, **{"perturb": Everything(), **options, "rho": 1.0})
    for x, y in batches(5):
        before = model.head.weight.detach().clone()
        optimizer.zero_grad()
        optimizer.loss(losses_of(model), x, y).backward()
        after = model.head.weight.detach()
        assert torch.equal(after, before) or torch.equal(after, before.clamp(-0.3, 0.3))
        optimizer.step()


def test_skipped_steps_draw_too():
    """As with torch's generators: the next step draws other numbers."""
    model, (x, y) = nn.Sequential(nn.Linear(4, 3)), *batches(1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, drawn = ESAM(base, model, on_nonfinite="skip"), []

    def losses(x, y):
        drawn.append((random.random(), float(torch.rand(()))))
        return F.cross_entropy(model(x), y, reduction="none") * float("nan")

    for _ in range(6):
        assert optimizer.step(losses, x, y).skipped
    assert len({a for a, _ in drawn}) == len({b for _, b in drawn}) == 6


@pytest.mark.parametrize("options", [{}, SUFFIX_PART, {"ascend": Previous()}])
def test_all_passes_draw_the_same_numbers_on_the_host(options):
    """As the masks of SpecAugment do, or mixup in `losses`. Afterwards as after one forward."""
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), *batches(1)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
    numpy, python = np.random.RandomState(3), random.Random(3)
    np.random.seed(3)  # noqa: NPY002 the global generator is tested
    random.seed(3)
    drawn, fail = [], False

    def losses(x, y):
        numbers = np.random.random(), np.random.normal(), random.random()  # noqa: NPY002
        drawn.append(numbers)
        if fail and len(drawn) == 2:
            raise RuntimeError("an error in the second pass")
        return drawn[-1][0] * F.cross_entropy(model(x), y, reduction="none")

    def step():
        drawn.clear()
        optimizer.step(losses, x, y)

    for _ in range(5):
        step()
        assert set(drawn) == {(numpy.random(), numpy.normal(), python.random())}
    fail = True
    if len(drawn) > 1:
        with pytest.raises(RuntimeError, match="an error in the second pass"):
            step()
    fail = False
    step()
    assert set(drawn) == {(numpy.random(), numpy.normal(), python.random())}


@pytest.mark.parametrize("step", [0, 4])  # also if it does not check everything
@pytest.mark.parametrize("name", ["teacher.weight", "center"])
def test_frozen_weights_and_buffers_that_are_written_before_the_backward_are_refused(name, step):
    """An average that is updated between the loss and its backward."""
    model = nn.ModuleDict({"student": nn.Linear(4, 3), "teacher": nn.Linear(4, 3)})
    model.register_buffer("center", torch.zeros(3))
    model.teacher.requires_grad_(False)
    base = torch.optim.SGD(model.student.parameters(), lr=0.1)
    optimizer, (x, _) = ESAM(base, model, perturb=Everything(), gamma=1.0), *batches(1)

    def losses(x):
        return (model.student(x) - model.teacher(x) + model.center).square().mean(1)

    value = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
    for _ in range(step):
        optimizer.step(losses, x)
        value.data.mul_(0.9)  # after the step, as usual
        value.mul_(0.9)
    optimizer.zero_grad()
    loss = optimizer.loss(losses, x)
    value.add_(1.0)
    with pytest.raises(ESAMRuntimeError, match=r"The model must not change between.*frozen"):
        loss.backward()
    assert optimizer.count == step and all(p.grad is None for p in model.parameters())


def test_frozen_weights_that_the_forward_of_another_loss_writes():
    """Two losses, and one backward: a forward averages, which is no change of the user's."""

    class Averaging(Base):
        def shift(self, x, h):
            with torch.no_grad():
                self.head.bias.lerp_(torch.ones(3), 0.1)
            return 0.0 * h

    torch.manual_seed(0)
    model = Averaging()
    model.head.bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ESAM(torch.optim.SGD(trained, lr=0.1), model, perturb=Everything(), gamma=1.0)
    for x, y in batches(6):
        loss = optimizer.loss(losses_of(model), x, y) + optimizer.loss(losses_of(model), x, y)
        loss.backward()
        optimizer.step()
    assert optimizer.count == 12
