"""Variables that `losses` reads from outside, and that change before the backward."""

import functools
import types

import numpy as np
import pytest
import torch
from tests.torch.scene import Snapshot, batch, net, sgd
from torch.nn import functional as F

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_torch import ESAM, Everything, Momentum, Part, Previous, Suffix

SETTINGS = {
    "default": {},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "Suffix with Part": {"perturb": Suffix(0.5), "gamma": 1.0, "ascend": Part(0.25)},
}

factor = 1.0
loss = None
calls = 0
options = types.SimpleNamespace(factor=1.0, plain=0)


def make(model, **settings):
    return ESAM(sgd(model), model, **{"rho": 0.1, **settings})


def plain_losses(model, x, y, by=1.0):
    return by * F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_loop_variable_is_refused_by_name(settings):
    model = net(dropout=0.0)
    optimizer = make(model, **settings)
    total = 0.0
    for by in (1.0, 2.0):
        total = total + optimizer.loss(
            lambda x, y: plain_losses(model, x, y, by),  # noqa: B023
            *batch(),
        )
    before = Snapshot(model)
    with pytest.raises(ESAMRuntimeError, match=r"another value of `by`.*\(losses, \.\.\., by=by\)"):
        total.backward()
    before.check(but=("random", "buffers"))
    assert optimizer.count == 1  # the last one is right


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_way_out(settings):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer, other = make(model, **settings), make(twin, **settings)
    total = 0.0
    for by in (1.0, 2.0):
        total = total + optimizer.loss(lambda x, y, by=by: plain_losses(model, x, y, by), *batch())
    total.backward()
    one, two = (
        other.loss(lambda x, y, by: plain_losses(twin, x, y, by), *batch(), by=by)
        for by in (1.0, 2.0)
    )
    (one + two).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Task:
    def __init__(self, model):
        self.model = model
        self.by = 1.0
        self.seen = 0.0

    def losses(self, x, y):
        return plain_losses(self.model, x, y, factor)

    def __call__(self, x, y):
        return plain_losses(self.model, x, y, factor)

    def scaled(self, x, y):
        return plain_losses(self.model, x, y, self.by)


class TaskModule(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return plain_losses(self.model, x, y, factor)


FORMS = {
    "function": lambda model: lambda x, y: plain_losses(model, x, y, factor),
    "comprehension": lambda model: (
        lambda x, y: sum([plain_losses(model, x, y, factor) for _ in "ab"])
    ),
    "partial": lambda model: functools.partial(
        lambda model, x, y: plain_losses(model, x, y, factor), model
    ),
    "method": lambda model: Task(model).losses,
    "object": Task,
    "module": TaskModule,
    "decorated": lambda model: torch.enable_grad()(lambda x, y: plain_losses(model, x, y, factor)),
}


@pytest.mark.parametrize("form", FORMS)
def test_global_variables(form, monkeypatch):
    model = net(dropout=0.0)
    optimizer = make(model)
    mean = optimizer.loss(FORMS[form](model), *batch())
    monkeypatch.setitem(globals(), "factor", float("1.0"))  # another object, but the same number
    mean.backward()
    mean = optimizer.loss(FORMS[form](model), *batch())
    monkeypatch.setitem(globals(), "factor", 2.0)
    with pytest.raises(ESAMRuntimeError, match=r"another value of `factor`"):
        mean.backward()


def test_an_attribute_of_the_object_of_a_method():
    """A trainer whose attribute chooses a task, with one backward for the sum."""
    model, total = net(dropout=0.0), 0.0
    optimizer, task = make(model), Task(model)
    for task.by in (1.0, 2.0):
        total = total + optimizer.loss(task.scaled, *batch())
    with pytest.raises(ESAMRuntimeError, match=r"value of `self\.by`.*\.\.\., by=self\.by\)"):
        total.backward()


def test_an_attribute_of_a_variable(monkeypatch):
    model = net(dropout=0.0)
    mean = make(model).loss(lambda x, y: plain_losses(model, x, y, options.factor), *batch())
    monkeypatch.setattr(options, "factor", 2.0)
    with pytest.raises(ESAMRuntimeError, match=r"another value of `options\.factor`"):
        mean.backward()


def test_a_tensor_that_is_written_to():
    model, by = net(dropout=0.0), torch.ones(())
    mean = make(model).loss(lambda x, y: plain_losses(model, x, y, float(by)), *batch())
    by.fill_(2.0)
    with pytest.raises(ESAMRuntimeError, match=r"another value of `by`"):
        mean.backward()


GENERATORS = {
    "iterator": iter([1.0] * 9),
    "torch": torch.Generator(),
    "NumPy": np.random.default_rng(0),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_what_gives_each_pass_other_values_is_refused(kind):
    model, unlabelled = net(dropout=0.0), GENERATORS[kind]
    before = Snapshot(model)
    with pytest.raises(
        ESAMTypeError, match=r"`unlabelled` (can be read only once|gives each call)"
    ):
        make(model).loss(lambda x, y: plain_losses(model, x, y, id(unlabelled)), *batch())
    before.check()


def test_a_variable_that_is_deleted():
    model = net(dropout=0.0)
    by = 2.0
    mean = make(model).loss(lambda x, y: plain_losses(model, x, y, by), *batch())  # noqa: F821
    del by
    with pytest.raises(ESAMRuntimeError, match=r"no `by` any more"):
        mean.backward()


# -- no false alarms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [lambda x: x.device, lambda x: x.shape, lambda x: (len(x), -1), lambda x: np.float64(len(x))],
    ids=["device", "shape", "tuple", "NumPy's number"],
)
def test_equal_values(value):
    """Of several losses with one backward, each of which computes the same value again."""
    model, total = net(dropout=0.0), 0.0
    optimizer = make(model)
    for _ in range(2):
        same = value(batch()[0])
        total = total + optimizer.loss(
            lambda x, y: plain_losses(model, x, y, bool(same)),  # noqa: B023
            *batch(),
        )
    total.backward()
    assert optimizer.count == 2


def test_attributes_that_it_does_not_read_and_files(tmp_path):
    """A trainer that keeps the loss, and writes to a log."""
    model = net(dropout=0.0)
    optimizer, task = make(model), Task(model)
    with (tmp_path / "log").open("w") as log:

        def losses(x, y):
            log.write("a pass\n")
            return task.scaled(x, y)

        task.loss = optimizer.loss(losses, *batch())
        task.seen = 5.0
        task.loss.backward()
    assert optimizer.count == 1


def test_an_attribute_with_the_name_of_a_global_variable(monkeypatch):
    """`loss = optimizer.loss(...)` in a script whose function reads `outputs.loss`."""
    model = net(dropout=0.0)

    def losses(x, y):
        return types.SimpleNamespace(loss=plain_losses(model, x, y)).loss

    mean = make(model).loss(losses, *batch())
    monkeypatch.setitem(globals(), "loss", mean)
    mean.backward()


@pytest.mark.parametrize(
    "settings",
    [{"rho": 0.0}, {"rho": 0.0, "on_nonfinite": "skip"}]
    + [{"ascend": ascend, "gamma": 1.0} for ascend in (Previous(), Momentum())],
    ids=["base step", "checked base step", "Previous", "Momentum"],
)
def test_steps_that_call_losses_only_before_the_backward(settings):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer, other = make(model, **settings), make(twin, **settings)
    for by in (1.0, 2.0, 3.0):
        mean = optimizer.loss(lambda x, y: plain_losses(model, x, y, by), *batch())  # noqa: B023
        by = 10.0
        mean.backward()
        optimizer.step()
    for by in (1.0, 2.0, 3.0):
        other.loss(lambda x, y, by=by: plain_losses(twin, x, y, by), *batch()).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# -- variables that it assigns ---------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_variables_that_it_assigns_itself(settings):
    """Each pass reads them as the first one did; after a step they are as after that."""
    model, count, seen, held = net(dropout=0.0), 0, [], None
    optimizer = make(model, **settings)

    def losses(x, y):
        nonlocal count, held
        global calls
        seen.append((count, calls, options.plain, held))
        count, calls, held = count + 1, calls + 1, x
        options.plain += 1
        return plain_losses(model, x, y)

    before = calls, options.plain
    mean = optimizer.loss(losses, *batch())
    count = 10
    mean.backward()
    optimizer.step()
    assert len(seen) > 1 and set(seen) == {(0, *before, None)}
    assert (count, calls, options.plain) == (10, before[0] + 1, before[1] + 1)
    optimizer.step(losses, *batch())
    assert (count, calls, options.plain) == (11, before[0] + 2, before[1] + 2)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("bound", [True, False])
def test_state_of_a_trainer(bound, settings):
    """An average of the losses that scales them, kept by the object instead of by a module."""

    class Trainer(Task):
        def losses(self, x, y):
            found = plain_losses(self.model, x, y)
            self.average = 0.9 * self.average + 0.1 * self.by
            self.by += 1.0
            return found * self.average

        average = 1.0

    def around(self):
        def losses(x, y):
            found = plain_losses(self.model, x, y)
            self.average = 0.9 * self.average + 0.1 * self.by
            self.by += 1.0
            return found * self.average

        return losses

    model, twin, average = net(dropout=0.0), net(dropout=0.0), 1.0
    optimizer, other, trainer = make(model, **settings), make(twin, **settings), Trainer(model)
    for step in range(4):
        optimizer.step(trainer.losses if bound else around(trainer), *batch())
        average = 0.9 * average + 0.1 * (1.0 + step)
        other.step(lambda x, y, by=average: plain_losses(twin, x, y, by), *batch())
        assert trainer.average == average and trainer.by == 2.0 + step
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_variable_without_a_value_has_none_in_each_pass():
    model, seen, held = net(dropout=0.0), [], 0
    del held

    def losses(x, y):
        nonlocal held
        try:
            seen.append(held)
        except NameError:
            seen.append(None)
        held = len(seen)
        return plain_losses(model, x, y)

    make(model).step(losses, *batch())
    assert set(seen) == {None} and held == 1  # noqa: F821


def test_after_an_error_they_are_as_after_the_first_pass():
    model, count, seen = net(dropout=0.0), 0, []

    def losses(x, y):
        nonlocal count
        seen.append(count)
        count += 1
        return plain_losses(model, x, y) if len(seen) < 4 else 1 / 0  # two compare the losses

    with pytest.raises(ZeroDivisionError):
        make(model).step(losses, *batch())
    assert seen == [0] * 4 and count == 1
