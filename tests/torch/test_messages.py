"""Errors with advice, for scripts of other implementations and for common mistakes."""

import copy

import pytest
import torch
from pytorch_optimizer import Lookahead
from tests.torch.scene import Snapshot, batch, losses_of, net, sgd
from torch import nn
from torch.nn import functional as F

from esam_core import ESAMRuntimeError, ESAMTypeError, ESAMValueError
from esam_torch import ESAM, Everything, SideBySide
from esam_torch.batch import Samples


def make(model=None, **options):
    model = net() if model is None else model
    return model, ESAM(sgd(model), model, **{"rho": 0.1, "perturb": Everything(), **options})


def refuses(optimizer, losses, *args, error=ESAMValueError, match, model):
    """Require that a step raises and changes nothing; return the message."""
    before, count = Snapshot(model, optimizer), optimizer.count
    with pytest.raises(error, match=match) as raised:
        optimizer.step(losses, *args)
    before.check()
    assert optimizer.count == count
    return str(raised.value)


# -- losses of another shape ---------------------------------------------------------------------


def test_segmentation():
    model = nn.Conv2d(3, 2, 1)
    _, optimizer = make(model)
    data = torch.randn(4, 3, 5, 5), torch.randint(2, (4, 5, 5))
    message = refuses(
        optimizer,
        lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
        *data,
        match=r"shape \(b,\).*\.flatten\(1\)\.mean\(1\).*Received: shape \(4, 5, 5\)",
        model=model,
    )
    assert "reduction" not in message  # which is correct in the script
    optimizer.step(
        lambda x, y: F.cross_entropy(model(x), y, reduction="none").flatten(1).mean(1), *data
    )


def test_regression():
    model = nn.Linear(4, 1)
    _, optimizer = make(model)
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    message = refuses(
        optimizer,
        lambda x, y: F.mse_loss(model(x), y, reduction="none"),
        x,
        y,
        match=r"\.flatten\(1\)\.mean\(1\).*Received: shape \(8, 1\)",
        model=model,
    )
    assert "reduction" not in message and "squeeze" not in message


def test_regression_that_broadcasts():
    model = nn.Linear(4, 1)
    _, optimizer = make(model)
    refuses(
        optimizer,
        lambda x, y: (model(x) - y).square(),
        torch.randn(8, 4),
        torch.randn(8),
        match=r"\(b, 1\) and targets of shape \(b,\).*\.squeeze\(1\).*Received: shape \(8, 8\)",
        model=model,
    )


def test_a_list_of_losses():
    model, optimizer = make()
    refuses(
        optimizer,
        lambda x, y: list(losses_of(model)(x, y)),
        *batch(),
        error=ESAMTypeError,
        match=r"torch\.stack\(losses\).*Received: list",
        model=model,
    )


def test_a_dictionary_with_a_loss():
    model, optimizer = make()
    refuses(
        optimizer,
        lambda x, y: {"loss": losses_of(model)(x, y).mean()},
        *batch(),
        error=ESAMTypeError,
        match=r"own `loss` is a mean.*Received: dict",
        model=model,
    )


# -- closures, as LBFGS and other implementations take them ----------------------------------------

TWO_LINES = r"two lines: losses = lambda inputs, targets: .*optimizer\.step\(losses, inputs, targ"


@pytest.mark.parametrize("number", [False, True], ids=["tensor", "number"])
def test_a_closure(number):
    model, optimizer = make()
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item() if number else loss

    weights = copy.deepcopy(list(model.parameters()))
    with pytest.raises(
        ESAMTypeError, match=r"loss = optimizer\.loss\(losses, .*loss\.backward\(\);"
    ):
        optimizer.step(closure)
    with pytest.raises(
        (ESAMValueError, ESAMTypeError), match=rf"{TWO_LINES}.*Received: (sh|float)"
    ):
        optimizer.backward(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_a_closure_without_an_esam_loss_warns():
    model = net()
    optimizer = ESAM(sgd(model), model)

    def closure():
        losses_of(model)(*batch()).mean().backward()

    with pytest.warns(UserWarning, match=r"step\(\) without a backward of optimizer.loss"):
        optimizer.step(closure)


def test_a_mean_with_a_batch_is_not_taken_for_a_closure():
    model, optimizer = make()
    message = refuses(
        optimizer,
        lambda x, y: F.cross_entropy(model(x), y),
        *batch(),
        match=r'reduction="none".*Received: shape \(\)',
        model=model,
    )
    assert "two lines" not in message


# -- construction --------------------------------------------------------------------------------


def test_the_constructor_of_other_implementations():
    model = net()
    with pytest.raises(
        ESAMTypeError,
        match=r"base = torch\.optim\.SGD\(model\.parameters\(\), \.\.\.\), then ESAM\(base, model",
    ):
        ESAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    with pytest.raises(ESAMTypeError, match=r"torch\.optim\.Adam\(model"):
        ESAM(model.parameters(), torch.optim.Adam)
    for first, second in ((model.parameters(), sgd(model)), (model, sgd(model))):
        with pytest.raises(ESAMTypeError, match=r"ESAM\(base_optimizer, model, rho=\.\.\.\)"):
            ESAM(first, second)


def test_a_misspelt_keyword_is_pythons_error():
    model = net()
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'lr'"):
        ESAM(sgd(model), model, lr=0.1)
    with pytest.raises(TypeError, match=r"__init__\(\) missing"):
        ESAM(sgd(model))
    assert isinstance(copy.deepcopy(ESAM(base_optimizer=sgd(model), model=model)), ESAM)


def test_a_loss_with_its_own_parameters():
    model, temperature = net(), nn.Parameter(torch.ones(1))
    with pytest.raises(ESAMValueError, match=r"shapes \(1,\).*ModuleList\(\[model, loss\]\)"):
        ESAM(torch.optim.SGD([*model.parameters(), temperature], lr=0.1), model)
    both = nn.ModuleList([model, nn.ParameterList([temperature])])
    optimizer = ESAM(torch.optim.SGD(both.parameters(), lr=0.1), both, perturb=Everything())

    def losses(x, y):
        return F.cross_entropy(model(x) / temperature, y, reduction="none")

    report = optimizer.step(losses, *batch())
    assert "1.0" in report.perturbed and temperature.item() != 1.0


def test_no_module_at_all():
    w = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ESAMTypeError, match=r"ParameterList\(\[\.\.\.\]\).*Received: Tensor\.$"):
        ESAM(torch.optim.SGD([w], lr=0.1), w)


# -- ESAM in something in ESAM -------------------------------------------------------------------


def test_an_esam_inside_the_base_is_refused():
    model, optimizer = make()
    with pytest.raises(ESAMTypeError, match=r"ESAM inside Lookahead is sharpness-aware itself"):
        ESAM(Lookahead(optimizer), model)
    with pytest.raises(ESAMTypeError, match=r"ESAM is sharpness-aware"):
        SideBySide(sgd(model), optimizer)
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ESAMTypeError, match=r"LBFGS inside Lookahead evaluates the loss"):
        ESAM(Lookahead(lbfgs), model)


def test_wrappers_of_plain_optimizers_are_bases():
    model, _ = make()
    ESAM(Lookahead(sgd(model)), model).step(losses_of(model), *batch())


# -- computed outside `losses` -------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["an argument", "in the closure"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_features_computed_outside(gamma, given):
    model = nn.ModuleDict({"encoder": nn.Linear(4, 6), "head": nn.Linear(6, 3)})
    _, optimizer = make(model, gamma=gamma, select=None)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    features = model["encoder"](x).tanh()

    def losses(y, *arguments):
        (inputs,) = arguments or (features[: len(y)],)
        return F.cross_entropy(model["head"](inputs), y, reduction="none")

    arguments = (features,) if given else ()
    message = refuses(
        optimizer,
        losses,
        y,
        *arguments,
        error=ESAMRuntimeError,
        match=r"Compute it inside `losses`, or detach it",
        model=model,
    )
    assert "retain_graph" not in message
    optimizer.step(losses, y, features.detach())


def test_errors_of_a_second_backward_within_losses_are_not_changed():
    model, optimizer = make()

    def losses(x, y):
        values = losses_of(model)(x, y)
        torch.autograd.grad(values.sum(), model.head.weight)
        torch.autograd.grad(values.sum(), model.head.weight)
        return values

    refuses(optimizer, losses, *batch(), error=RuntimeError, match="retain_graph", model=model)


def test_notes_are_written_only_for_errors(monkeypatch):
    """A note needs a traversal of the batch, which successful steps must not pay for."""
    monkeypatch.setattr(Samples, "note", lambda *_: pytest.fail("written without an error"))
    model = torch.nn.Linear(4, 3)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.5)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    report = optimizer.step(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
    assert len(report.indices) == 4


# -- the arguments of `losses` -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_as_one_list(kind, grad):
    """As a DataLoader yields it."""
    model, optimizer = make()
    given = kind(batch())
    match = rf"optimizer\.loss\(losses, \*batch\)\. Received: a {kind.__name__} of 2\."
    with torch.set_grad_enabled(grad), pytest.raises(ESAMTypeError, match=match):
        optimizer.loss(losses_of(model), given)
    optimizer.loss(lambda pair: losses_of(model)(*pair), given)  # a function of one list
    with pytest.raises(ESAMTypeError, match=match):
        optimizer.loss(lambda x, y, *, args: losses_of(model)(x, y), given, args=1)


def test_a_plan_without_a_checkpoint():
    _, optimizer = make()
    with pytest.raises(ESAMRuntimeError, match="needs `budget`") as raised:
        optimizer.plan()
    assert "checkpoint" not in str(raised.value)
