"""Errors and interrupts inside a step change nothing, and training can continue."""

import sys
from pathlib import Path

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, same, sgd

import esam_torch.step
import esam_torch.task
from esam_core import Proportional
from esam_torch import ESAM, Every, Everything, Part, Previous, Suffix
from esam_torch.batch import Samples
from esam_torch.forwards import Forward
from esam_torch.guards import Weights
from esam_torch.task import Task
from esam_torch.written import Writes


class BrokenError(Exception):
    """An error that nothing else raises."""


def make(seed=0, **kwargs):
    model = net(seed)
    options = {"rho": 0.3, "perturb": Everything(), "gamma": 0.5, **kwargs}
    return model, ESAM(sgd(model), model, **options)


ERRORS = [
    BrokenError("in a pass"),
    KeyboardInterrupt(),
    torch.OutOfMemoryError("simulated"),
    SystemExit(),
]
PASSES = {"ascent": 1, "selection": 2, "descent": 3}


def once(function, error, *, call=1, after=True):
    """Return the function with an error raised before or after one of its calls."""
    calls = []  # a number would be the same in each pass

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == call and not after:
            raise error
        result = function(*args, **kwargs)
        if len(calls) == call:
            raise error
        return result

    return wrapped


def check_fault(model, optimizer, losses, error):
    """Fail in a second micro-batch with existing gradients, then continue training normally."""
    smooth, twin = make()
    torch.manual_seed(7)
    optimizer.backward(losses_of(model), *batch(seed=3))
    before, count = Snapshot(model, optimizer), optimizer.count
    tensors = [p.grad for p in model.parameters()]
    with pytest.raises(type(error)) as raised:
        optimizer.backward(losses, *batch(seed=4))
    assert raised.value is error
    before.check()
    assert optimizer.count == count
    assert all(p.grad is g for p, g in zip(model.parameters(), tensors, strict=True))
    optimizer.backward(losses_of(model), *batch(seed=4))
    optimizer.step()
    random = torch.get_rng_state()

    torch.manual_seed(7)
    for seed in (3, 4):
        twin.backward(losses_of(smooth), *batch(seed=seed))
    twin.step()
    assert torch.equal(random, torch.get_rng_state())
    same(model.state_dict(), smooth.state_dict(), "after going on")


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", PASSES)
def test_in_the_forward_of_a_pass(where, error):
    model, optimizer = make()
    losses = once(losses_of(model), error, call=PASSES[where])
    check_fault(model, optimizer, losses, error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("which", [1, 2], ids=["ascent", "descent"])
def test_in_the_backward_of_a_pass(which, error):
    """The error comes when half of the gradients are computed."""
    model, optimizer = make()
    passes = []

    def losses(x, y):
        features = torch.relu(model.norm(model.conv(x))).mean((2, 3))
        if torch.is_grad_enabled():
            passes.append(len(x))
            if len(passes) == which:
                features.register_hook(raise_it)
        logits = model.head(torch.tanh(model.hidden(model.dropout(features))))
        return torch.nn.functional.cross_entropy(logits, y, reduction="none")

    def raise_it(_):
        raise error

    check_fault(model, optimizer, losses, error)


#: All stages of a step, and where their functions are.
STAGES = {
    "guarding": (Forward, "__init__"),
    "finding writes": (Forward, "note"),
    "keeping writes": (Writes, "keep"),
    "ascent gradient": (esam_torch.step, "dense_shards"),
    "perturbation": (esam_torch.task, "perturb"),
    "copying": (Weights, "__init__"),
    "climbing": (Weights, "add"),
    "selection": (Task, "select"),
    "taking samples": (Samples, "take"),
    "restoring": (Weights, "restore"),
    "report": (esam_torch.task, "StepReport"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_between_the_passes(stage, after, monkeypatch):
    """An interrupt just before or just after each stage."""
    model, optimizer = make()
    holder, name = STAGES[stage]
    error = KeyboardInterrupt()
    original = getattr(holder, name)
    armed = []

    def losses(x, y):
        if not armed:
            armed.append(True)
            monkeypatch.setattr(holder, name, once(original, error, after=after))
        return losses_of(model)(x, y)

    if stage == "guarding":  # runs before the first call of `losses`
        monkeypatch.setattr(holder, name, once(original, error, call=2, after=after))
        armed.append(True)
    check_fault(model, optimizer, losses, error)


def test_while_the_weights_are_half_perturbed(monkeypatch):
    model, optimizer = make()

    def half(self, perturbations):
        half_way = len(self._weights) // 2
        with torch.no_grad():
            torch._foreach_add_(self._weights[:half_way], list(perturbations)[:half_way])
        raise torch.OutOfMemoryError("simulated")

    before = Snapshot(model, optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(Weights, "add", half)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.backward(losses_of(model), *batch())
    before.check()


@pytest.mark.parametrize("call", [1, 2, 5, 6], ids=["watching", *PASSES])
def test_with_a_suffix(call):
    """The ascent pass computes only some gradients, and the first step watches one more forward.

    The third and fourth call compare the losses; their errors end no step.
    """
    model, optimizer = make(perturb=Suffix("head"))
    error = BrokenError("in a pass")
    before = Snapshot(model, optimizer)
    with pytest.raises(BrokenError):
        optimizer.backward(once(losses_of(model), error, call=call), *batch())
    before.check()
    assert all("forward" not in vars(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    optimizer.step(losses_of(model), *batch())


def test_parameters_outside_the_optimizer():
    """They get gradients, as in any backward, and keep existing ones if a pass fails."""
    model = net()
    base = torch.optim.SGD(model.head.parameters(), lr=0.1)
    optimizer = ESAM(base, model, rho=0.1, perturb=Everything(), gamma=0.5)
    optimizer.backward(losses_of(model), *batch())
    assert model.conv.weight.grad is not None
    before = Snapshot(model)
    error = BrokenError("in the descent")
    with pytest.raises(BrokenError):
        optimizer.backward(once(losses_of(model), error, call=3), *batch())
    before.check()


def test_a_failed_step_with_losses_can_be_repeated():
    model, optimizer = make()
    smooth, twin = make()
    for error in ERRORS:
        with pytest.raises(type(error)):
            # The second and third call compare the losses in the first step, and hide errors.
            optimizer.step(once(losses_of(model), error, call=4), *batch())
    torch.manual_seed(0)
    optimizer.step(losses_of(model), *batch())
    torch.manual_seed(0)
    twin.step(losses_of(smooth), *batch())
    same(model.state_dict(), smooth.state_dict(), "after the step")


def test_out_of_memory_with_scores():
    """The usual reaction to an out-of-memory error: a smaller batch."""
    model, optimizer = make(gamma=None, select=Proportional(0.5, score="increase"))
    losses = losses_of(model)

    def limited(x, y):
        values = losses(x, y)
        if len(x) > 4 and optimizer_is_at_the_peak():
            raise torch.OutOfMemoryError("simulated")
        return values

    start = model.head.weight.detach().clone()

    def optimizer_is_at_the_peak():
        return not torch.equal(model.head.weight, start)

    before = Snapshot(model)
    x, y = batch()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(limited, x, y)
    before.check()
    optimizer.step(limited, x[:4], y[:4])


class InterruptAtLine:
    """Raises a KeyboardInterrupt at the n-th line that esam_torch or contextlib runs."""

    package = str(Path(esam_torch.step.__file__).parent)

    def __init__(self, n: int, *, only: str = "") -> None:
        self.n = n
        self.only = only
        self.line: tuple[str, int] | None = None

    def __enter__(self):
        self.traced_before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.traced_before)

    def __call__(self, frame, event, _):
        name = frame.f_code.co_filename
        if not name.startswith(self.package) and not name.endswith("contextlib.py"):
            return None
        if event == "line" and name.endswith(self.only):
            self.n -= 1
            if self.n == 0:
                self.line = Path(name).name, frame.f_lineno
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize(
    ("options", "only", "every"),
    [
        ({"perturb": Suffix("hidden"), "gamma": 0.5}, "", 37),
        ({"perturb": Suffix("hidden"), "gamma": 0.5}, "contextlib.py", 1),
        ({"perturb": Suffix("hidden"), "gamma": 1.0}, "", 37),
        ({"perturb": Everything(), "gamma": 0.5}, "", 37),
        ({"perturb": Everything(), "gamma": 0.5, "ascend": Part(0.5)}, "", 41),
        ({"perturb": Everything(), "gamma": 0.5, "ascend": Previous()}, "", 41),
        ({"perturb": Everything(), "gamma": 0.01}, "guards.py", 2),
    ],
    ids=[
        *("suffix", "suffix, in and out of contexts", "suffix, whole batch", "everything"),
        *("a part", "the previous gradient", "a single sample, guards"),
    ],
)
def test_an_interrupt_at_any_line(options, only, every):
    """Nothing stays patched, and the state is either that before or that after the call."""
    lines = 0
    for n in range(1, 10_000, every):
        model, optimizer = make(**options)
        optimizer.step(losses_of(model), *batch(seed=3))  # finds the blocks, once
        count, before = optimizer.count, Snapshot(model, optimizer)
        clean = {name: set(vars(m)) for name, m in model.named_modules()}
        losses, (x, y) = losses_of(model), batch(seed=4)
        with InterruptAtLine(n, only=only) as interrupt:
            try:
                optimizer.backward(losses, x, y)
            except KeyboardInterrupt:
                lines += 1
        if interrupt.line is None:
            break
        # After the last line of the step itself, nothing is undone any more.
        ended = optimizer.count == count + 1
        assert ended or optimizer.count == count, interrupt.line
        before.check(but=("gradients", "buffers", "random", "optimizer") if ended else ())
        assert torch.backends.mha.get_fastpath_enabled(), interrupt.line
        for name, module in model.named_modules():
            assert set(vars(module)) == clean[name], (name, interrupt.line)
            assert not module._forward_hooks and not module._forward_pre_hooks, interrupt.line
    assert lines >= 20


@pytest.mark.parametrize(
    "options", [{"perturb": Every(2, Suffix(0.5))}, {"ascend": Previous()}, {"rho": 0.0}], ids=str
)
def test_in_the_backward_of_a_base_step(options):
    """A step that perturbs nothing can be repeated too, as with a smaller batch."""
    model, failing = net(), [True]
    optimizer = ESAM(sgd(model), model, **options)
    if isinstance(options.get("perturb"), Every):
        optimizer.step(losses_of(model), *batch())
    before = Snapshot(model, optimizer)

    def losses(x, y):
        found = losses_of(model)(x, y)
        found.register_hook(lambda _: _raise() if failing else None)
        return found

    with pytest.raises(BrokenError):
        optimizer.backward(losses, *batch())
    before.check()
    failing.clear()
    optimizer.step(losses, *batch(4))


def _raise():
    raise BrokenError
