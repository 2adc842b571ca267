"""Invalid input: a clear error, and no changes."""

from types import MappingProxyType

import pytest
import torch
from tests.torch.refusals import make, refuses
from tests.torch.scene import Snapshot, batch, losses_of, net, sgd
from torch import nn
from torch.nn import functional as F

from esam_core import ESAMRuntimeError, ESAMTypeError, ESAMValueError, NonFiniteError
from esam_torch import ESAM, Between, Everything, Rows, TopIncrease, TopLoss, Whole

# -- what `losses` returns ---------------------------------------------------------------------

RETURNED = {
    "a mean": (
        lambda model, x, y: F.cross_entropy(model(x), y),
        ESAMValueError,
        r"shape \(b,\).*reduction=\"none\".*Received: shape \(\)",
    ),
    "a table": (
        lambda model, x, y: F.cross_entropy(model(x), y, reduction="none")[:, None],
        ESAMValueError,
        r"Received: shape \(8, 1\)",
    ),
    "integers": (lambda model, x, y: (model(x).argmax(1) != y).long(), ESAMTypeError, "int64"),
    "booleans": (lambda model, x, y: model(x).argmax(1) != y, ESAMTypeError, "torch.bool"),
    "complex": (lambda model, x, y: model(x)[:, 0].to(torch.complex64), ESAMTypeError, "complex64"),
    "nothing": (lambda model, x, y: None, ESAMTypeError, "Received: NoneType"),
    "a float": (lambda model, x, y: 1.0, ESAMTypeError, "Received: float"),
    "an empty tuple": (lambda model, x, y: (), ESAMTypeError, "empty tuple"),
    "a list": (lambda model, x, y: [1.0] * 8, ESAMTypeError, "Received: list"),
    "without a graph": (
        lambda model, x, y: F.cross_entropy(model(x), y, reduction="none").detach(),
        ESAMValueError,
        "without a graph",
    ),
}


@pytest.mark.parametrize("select", [TopIncrease(0.5), TopLoss(0.5), TopIncrease(1.0)], ids=repr)
@pytest.mark.parametrize("what", RETURNED)
def test_what_losses_return(what, select):
    returned, error, match = RETURNED[what]
    model, optimizer = make(gamma=None, select=select)
    losses = lambda x, y: returned(model, x, y)  # noqa: E731
    if what in ("too few", "too many") and select.gamma == 1.0:  # the batch is not split
        optimizer.backward(losses, *batch())
        return
    refuses(optimizer, losses, *batch(), error=error, match=match)


@pytest.mark.parametrize("select", [TopIncrease(0.5), TopLoss(0.5)], ids=repr)
@pytest.mark.parametrize(
    ("change", "b"), [(lambda v: v[1:], 7), (lambda v: v.repeat(3), 24)], ids=["few", "many"]
)
def test_another_number_of_losses_than_of_samples(change, b, select):
    model, optimizer = make(gamma=None, select=select)
    match = rf"Received: {b} losses.*shape \(8, 2, 6, 6\)\), batch\[1\] \(Tensor of shape \(8,\)"
    refuses(optimizer, lambda x, y: change(losses_of(model)(x, y)), *batch(), match=match)


@pytest.mark.parametrize("perturb", [Everything(), Between(0, 0)], ids=["climbs", "base step"])
def test_empty_batch(perturb):
    model, optimizer = make(net(dropout=0.0), beta=None, perturb=perturb)
    model.norm = nn.Identity()  # BatchNorm has its own error for empty batches
    optimizer = ESAM(torch.optim.SGD(model.parameters()), model, perturb=perturb)
    x, y = batch()
    refuses(optimizer, losses_of(model), x[:0], y[:0], match=r"must not be empty")


def test_losses_and_batch_of_different_lengths():
    model, optimizer = make(beta=None, perturb=Everything())
    x, y = batch()

    def some(x, y):
        return losses_of(model)(x, y)[:5]

    refuses(optimizer, some, x, y, match=r"Received: 5 losses")
    optimizer = ESAM(sgd(model), model, rho=0.0)  # does not split the batch
    optimizer.backward(some, x, y)


def test_losses_that_are_not_a_function():
    model, optimizer = make()
    values = losses_of(model)(*batch())
    refuses(optimizer, values, error=ESAMTypeError, match=r"`losses` must be a function.*Tensor")
    with pytest.raises(ESAMTypeError, match=r"`losses` must be a function.*Tensor"):
        optimizer.step(values)


def test_a_refused_step_keeps_stale_gradients():
    model, optimizer = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMTypeError):
        optimizer.step(0.5, *batch())
    before.check()


def test_selected_losses_of_another_length():
    model, optimizer = make()
    first = batch()

    def closes_over_the_labels(x):
        return F.cross_entropy(model(x).repeat(2, 1)[:8], first[1], reduction="none")

    refuses(optimizer, closes_over_the_labels, first[0], match=r"Received: 8 losses for 4 samples")


def test_nothing_to_select_from():
    model, optimizer = make()
    x, y = batch()
    losses = losses_of(model)
    refuses(optimizer, lambda: losses(x, y), match=r"in the batch: nothing")
    refuses(optimizer, losses, Whole(x), Whole(y), match=r"in the batch:.*marked")
    # With all samples in the descent pass nothing is sliced.
    everything = ESAM(sgd(model), model, rho=0.1, gamma=1.0)
    assert everything.backward(lambda: losses(x, y)).losses.shape == (8,)


def test_packed_sequences_are_refused_by_name():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1)
    x, lengths = torch.randn(6, 5, 3), torch.tensor([5, 4, 4, 3, 2, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)

    def losses(packed):
        return model(packed)[1][0][0].square().mean(1)

    refuses(optimizer, losses, packed, error=ESAMTypeError, match=r"PackedSequence.*padded")


def test_nested_tensors_are_refused_by_name():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1)
    nested = torch.nested.nested_tensor([torch.randn(n, 3) for n in (2, 5, 1)], layout=torch.jagged)

    def losses(nested):
        return torch.stack([row.square().mean() for row in model(nested).unbind()])

    refuses(optimizer, losses, nested, error=ESAMTypeError, match=r"NestedTensor.*padded")


def test_batches_are_not_changed():
    model, optimizer = make()
    x, y = batch()
    kept = (x.clone(), y.clone())
    inner = {"x": x, "more": [y, MappingProxyType({"y": y})]}
    optimizer.backward(lambda d: losses_of(model)(d["x"], d["more"][1]["y"]), inner)
    assert inner["x"] is x and inner["more"][0] is y
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


# -- calls in the wrong order -----------------------------------------------------------------


def test_step_with_losses_and_pending_gradients():
    model, optimizer = make()
    optimizer.backward(losses_of(model), *batch())
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMRuntimeError, match=r"are pending"):
        optimizer.step(losses_of(model), *batch())
    before.check()
    optimizer.zero_grad()
    optimizer.step(losses_of(model), *batch())


def test_a_batch_without_losses():
    _, optimizer = make()
    with pytest.raises(ESAMTypeError, match=r"needs `losses`"):
        optimizer.step(None, *batch())


def test_a_step_without_a_backward_warns_once():
    _, optimizer = make()
    with pytest.warns(UserWarning, match=r"without a backward"):
        optimizer.step()
    optimizer.step()  # warnings are errors here


# -- values that are not finite ----------------------------------------------------------------

POISON = [float("nan"), float("inf")]


def bad_batch(where, value):
    """Return a batch with one bad sample, which `TopLoss` and `TopIncrease` select."""
    x, y = batch()
    x[where] = value
    return x, y


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("perturb", [Everything(), Between(0, 0)], ids=["climbs", "base step"])
class TestNonFinite:
    """All three modes, in steps with and without a perturbation."""

    def make(self, perturb, mode):
        model = net()
        model.norm.eval()  # otherwise a bad sample would spoil the statistics of all
        return model, ESAM(sgd(model), model, rho=0.1, perturb=perturb, on_nonfinite=mode)

    def test_propagate(self, perturb, value):
        model, optimizer = self.make(perturb, "propagate")
        before = Snapshot(model, optimizer)
        report = optimizer.backward(losses_of(model), *bad_batch(3, value))
        before.check(but=("gradients", "random", "optimizer"))
        assert any(not p.grad.isfinite().all() for p in model.parameters())
        if perturb == Everything():
            assert float(report.perturbation_norm) == 0.0

    def test_skip(self, perturb, value):
        model, optimizer = self.make(perturb, "skip")
        twin = self.make(perturb, "skip")
        losses = losses_of(model)
        torch.manual_seed(5)
        optimizer.backward(losses, *batch(seed=2))  # a gradient that must be kept
        kept = Snapshot(model)
        report = optimizer.backward(losses, *bad_batch(3, value))
        kept.check(but=("random",))
        assert report.skipped and report.losses.shape == (8,)
        optimizer.step()
        updates = []
        optimizer.base_optimizer.register_step_post_hook(lambda *_: updates.append(1))
        report = optimizer.step(losses, *bad_batch(3, value))
        assert report.skipped and not updates
        assert optimizer.count == 3
        torch.manual_seed(5)
        twin[1].backward(losses_of(twin[0]), *batch(seed=2))
        twin[1].step()
        for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
            assert torch.equal(p, q)  # the skipped step has no momentum

    def test_raise(self, perturb, value):
        model, optimizer = self.make(perturb, "raise")
        match = 'not finite.*on_nonfinite="skip"'
        refuses(
            optimizer, losses_of(model), *bad_batch(3, value), error=NonFiniteError, match=match
        )
        with pytest.raises(FloatingPointError):
            optimizer.step(losses_of(model), *bad_batch(3, value))
        assert not optimizer.step(losses_of(model), *batch()).skipped


@pytest.mark.parametrize("mode", ["propagate", "skip", "raise"])
def test_losses_that_overflow_only_after_the_perturbation(mode):
    """Infinite losses at theta + epsilon with finite gradients are detected."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        rho=1.0,
        beta=1.0,
        gamma=0.5,
        on_nonfinite=mode,
    )
    calls = []

    def losses(x):
        calls.append(len(x))
        values = model(x)[:, 0]
        # At theta + epsilon one rejected sample has the loss -inf, with no effect on the gradient.
        return values - torch.tensor([torch.inf, 0, 0, 0]) if len(calls) == 2 else values

    x = Rows(torch.ones(4, 2))
    if mode == "raise":
        with pytest.raises(NonFiniteError):
            optimizer.backward(losses, x)
        assert model.weight.grad is None
    else:
        report = optimizer.backward(losses, x)
        assert report.skipped == (mode == "skip")
        assert model.weight.grad is None if mode == "skip" else model.weight.grad.isnan().all()
    assert torch.equal(model.weight, torch.full((1, 2), 0.5))


def test_an_inner_gradient_without_a_graph_is_explained():
    model = net()
    optimizer = ESAM(sgd(model), model, rho=0.1)

    def losses(x, y):
        values = losses_of(model)(x, y)
        (g,) = torch.autograd.grad(values.sum(), model.conv.weight, create_graph=True)
        return values + g.square().sum()

    with pytest.raises(RuntimeError, match="does not require grad") as raised:
        optimizer.step(losses, *batch())
    assert "under torch.enable_grad()" in raised.value.__notes__[0]


def test_a_note_lists_how_values_were_read():
    model = net()
    optimizer = ESAM(sgd(model), model, rho=0.1, gamma=0.5)
    x, y = batch()

    with pytest.raises(ValueError, match="batch_size") as raised:
        optimizer.step(losses_of(model), x, Whole(y))
    assert "on 4 of 8 samples" in raised.value.__notes__[0]
    assert "Split by sample: batch[0] (Tensor of" in raised.value.__notes__[0]
    assert "Passed whole: batch[1] (Tensor of shape (8,), marked)" in raised.value.__notes__[0]


BAD_LOSSES = {
    "scalar": lambda values: values.mean(),
    "column": lambda values: values[:, None],
    "short": lambda values: values[:3],
    "integer": lambda values: values.long(),
}


@pytest.mark.parametrize("spoil", BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_refused_step_keeps_gradients(spoil):
    model = net()
    optimizer = ESAM(sgd(model), model, rho=0.1, gamma=0.5)
    optimizer.step(losses_of(model), *batch())
    before = Snapshot(model, optimizer)
    tensors = [p.grad for p in model.parameters()]
    with pytest.raises((ESAMValueError, ESAMTypeError)):
        optimizer.step(lambda x, y: spoil(losses_of(model)(x, y)), *batch())
    before.check()
    assert all(p.grad is g for p, g in zip(model.parameters(), tensors, strict=True))
