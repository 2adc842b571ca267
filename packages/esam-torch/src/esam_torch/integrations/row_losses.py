"""One loss per sample from code that returns the mean loss of a batch."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from esam_core import ESAMValueError

__all__ = ["RowLosses"]

#: Loss functions that return a value per element of their target.
_ELEMENTWISE = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.huber_loss,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
)

#: Functions that only move, repeat or drop elements.
_MOVES = (
    *("__getitem__", "chunk", "expand", "expand_as", "flatten", "flip", "gather", "index_select"),
    *("masked_select", "movedim", "narrow", "permute", "ravel", "repeat", "repeat_interleave"),
    *("reshape", "reshape_as", "roll", "select", "split", "squeeze", "swapaxes", "t"),
    *("take_along_dim", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"),
)

#: Functions that combine elements of several tensors.
_JOINS = ("cat", "concat", "hstack", "stack", "vstack")

#: Functions that change each element independently.
_CHANGES = (
    *("add", "bfloat16", "bool", "clamp", "clamp_max", "clamp_min", "clip", "clone", "contiguous"),
    *("cpu", "cuda", "detach", "div", "double", "float", "half", "int", "long", "masked_fill"),
    *("mul", "nan_to_num", "sub", "to", "type", "type_as", "where"),
    *("abs", "bitwise_not", "ceil", "eq", "exp", "expm1", "floor", "floor_divide", "ge", "gt"),
    *("le", "log", "log10", "log1p", "log2", "logical_not", "lt", "ne", "neg", "pow"),
    *("reciprocal", "remainder", "round", "rsub", "sigmoid", "sign", "sqrt", "square", "tanh"),
    *("true_divide", "__floordiv__", "__pow__", "__rdiv__", "__rfloordiv__", "__rpow__"),
    *("__rsub__", "__rtruediv__"),
)

#: Loss functions whose mean is divided by the class weights, if they have any.
_CLASSES = (F.cross_entropy, F.nll_loss)

Parts = tuple[Tensor, Tensor, Tensor]

_NO_SAMPLE = -1  # the row of elements that do not come from the labels: padding


class RowLosses(TorchFunctionMode):
    """While active, torch's loss functions return one mean per sample instead of one per batch.

    The target tells which sample an element of a loss belongs to: targets are tracked from the
    labels through all operations that reshape, shift, pad or select them. A mean over a batch
    becomes a tensor with one mean per sample. All later operations (adding a router's loss,
    averaging the losses of start and end positions) apply to each sample's mean.

    Args:
        labels: the tensors that the targets are made from, with one row per sample.
        items_per_sample: None (default): a sample's loss is the mean over its own elements. A
            number: the sum over its elements divided by this number.
        batch_size: None (default): a sum over the batch becomes the sum over each sample. A number,
            the size of the whole batch if this is a part of it: the sum over each sample times this
            number, whose mean over the whole batch is the sum.
        checking: also return the numbers with which `check` compares the losses with the loss of
            the batch. Default False.

    Raises:
        ESAMValueError: labels do not have the same number of rows, it is unknown to which samples
            the elements of a loss function's target belong, or a loss function has class weights.
    """

    def __init__(
        self,
        labels: Iterable[Tensor],
        *,
        items_per_sample: float | Tensor | None = None,
        batch_size: int | None = None,
        checking: bool = False,
    ) -> None:
        super().__init__()
        tensors = list(labels)
        sizes = {len(x) if x.dim() else 0 for x in tensors}
        if len(sizes) != 1 or 0 in sizes:
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors) or "none"
            raise ESAMValueError(
                "Labels must be tensors with one row per sample. Received: labels of shapes "
                f"{shapes}."
            )
        (self.samples,) = sizes
        self._batch_size = batch_size or 1
        self._items = items_per_sample
        self.checking = checking
        self._summed: Tensor | None = None
        # Each tracked tensor, with the rows of its elements. The tensors are kept alive, so that no
        # id is reused.
        self._followed: dict[int, tuple[Tensor, Tensor]] = {}
        for x in tensors:
            rows = (
                torch.arange(self.samples, device="cpu")
                .view(-1, *[1] * (x.dim() - 1))
                .expand(x.shape)
            )
            self._followed[id(x)] = (x, rows)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        split = _SPLIT.get(function)
        if split is not None:
            return self._by_row(function, split, args, kwargs)
        result = function(*args, **kwargs)
        if any(self._follows(x) for x in (*args, *kwargs.values())):
            results = result if isinstance(result, tuple | list) else [result]
            rows = self._rows_of_result(function, args, kwargs, result)
            for x, its in zip(results, rows, strict=False):  # empty if they are unknown
                self._followed[id(x)] = (x, its)
        return result

    # -- targets ----------------------------------------------------------------------------------

    def _follows(self, x: Any) -> bool:
        """Return whether a value is or contains a tracked tensor."""
        if isinstance(x, list | tuple):
            return any(self._follows(item) for item in x)
        return id(x) in self._followed

    def _rows(self, x: Any) -> Tensor:
        """Return the rows of a tensor's elements."""
        found = self._followed.get(id(x))
        return torch.full(x.shape, _NO_SAMPLE, device="cpu") if found is None else found[1]

    def _rows_of_result(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Sequence[Tensor]:
        """Return the rows of a function's result on tracked tensors; empty if they are unknown."""
        name, named = function.__name__, dict(kwargs)
        moved = args[0] if args else named.pop("input", None)
        if name in _CHANGES:
            rows = next(self._rows(x) for x in (*args, *kwargs.values()) if self._follows(x))
            same = isinstance(result, Tensor) and rows.shape == result.shape
            return [rows] if same else ()
        if name in _JOINS:
            tensors = args[0] if args else kwargs.pop("tensors")
            found = function([self._rows(x) for x in tensors], *args[1:], **kwargs)
        elif name == "pad" and (*args[2:], kwargs.get("mode", "constant"))[0] == "constant":
            found = function(
                self._rows(args[0]), (*args[1:], kwargs.get("pad"))[0], value=_NO_SAMPLE
            )
        elif name in _MOVES and self._follows(moved):
            # Rows do not have the labels' strides, which only views need.
            function = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}.get(name, function)
            others = [_on_cpu(x) for x in args[1:]]
            found = function(
                self._rows(moved), *others, **{k: _on_cpu(x) for k, x in named.items()}
            )
        else:
            return ()
        return found if isinstance(found, tuple | list) else [found]

    # -- losses -----------------------------------------------------------------------------------

    def _by_row(self, function: Any, split: Any, args: Any, kwargs: Any) -> Tensor:
        """Return a loss function's value for each sample, (b,), or its own value.

        It is its own value if it has no reduction or does not depend on the labels.
        """
        call = inspect.signature(function).bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        target = options["targets" if function is F.ctc_loss else "target"]
        reduction = options["reduction"]
        legacy = options.get("size_average") is not None or options.get("reduce") is not None
        if not self._follows(target) or legacy or reduction not in ("mean", "sum"):
            own: Tensor = function(*args, **kwargs)
            return own
        by_class = function in _CLASSES and not target.is_floating_point()
        if reduction == "mean" and options.get("weight") is not None and by_class:
            raise ESAMValueError(
                f"{function.__name__} must not have class weights with reduction='mean': the mean "
                "is divided by the weights of all samples in the batch. Received: `weight`."
            )
        options["reduction"] = "none"
        values: Tensor = function(*call.args, **call.kwargs)
        values, counts, rows = split(values, self._rows(target), options, reduction)
        if values.shape != rows.shape:
            raise ESAMValueError(
                f"{function.__name__} must return one value per label. Received: values of "
                f"shape {tuple(values.shape)} for labels of shape {tuple(target.shape)}."
            )
        sums, counts = self._sum_rows(values, rows), self._sum_rows(counts.expand_as(values), rows)
        return self.means(sums, counts, lambda: function(*args, **kwargs), reduction)

    def means(
        self,
        sums: Tensor,
        counts: Tensor,
        own: Callable[[], Tensor],
        reduction: str = "mean",
    ) -> Tensor:
        """Return the replacement of a mean over a batch: (b,), or (2 b + 1,) if `checking`.

        Args:
            sums: each sample's sum over its elements, (b,).
            counts: each sample's number of elements, (b,).
            own: returns the original mean, or the sum.
            reduction: "mean" or "sum".
        """
        if reduction == "sum":
            each, parts = sums * self._batch_size, sums * self.samples
        else:
            # A sample without any counted element has the loss 0.
            divisors = torch.where(counts == 0, 1, counts) if self._items is None else self._items
            each, parts = sums / divisors, sums * (self.samples / counts.sum())
        if not self.checking:
            return each
        found = torch.cat([each, parts, own()[None]])
        if reduction == "sum":
            self._summed = found.detach()
        return found

    def check(self, found: Any, name: str) -> Tensor:
        """Check a loss computed while this was active, and return one loss per sample, (b,).

        Args:
            found: the returned loss.
            name: the name of the model or function, for errors.

        Raises:
            ESAMValueError: it is not one loss per sample, or its mean is not the loss of the batch.
        """
        b = self.samples
        if isinstance(found, Tensor) and found.dim() == 0 and b == 1 and self._items is None:
            return found[None]  # the loss of a single sample
        if not isinstance(found, Tensor) or found.shape != (2 * b + 1 if self.checking else b,):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
            raise ESAMValueError(
                f"The loss of {name} cannot be computed per sample: it does not use torch's loss "
                f"functions on the labels. Received: a loss of {what} for {b} samples."
            )
        if not self.checking:
            return found
        # All operations on the means were applied to each sample's mean, to the parts that add up
        # to the batch's mean, and to the batch's mean itself.
        each, mean, own = found[:b], found[b : 2 * b].detach().mean(), found[2 * b].detach()
        # The same numbers, added in another order: 1e-4 is enough for a million of them in float32.
        # A mean in half precision is rounded to the dtype's spacing.
        tolerance = max(1e-4, 4 * torch.finfo(own.dtype).eps)
        if self._summed is not None and not torch.allclose(
            found.detach(), self._summed.to(found.dtype), rtol=tolerance, equal_nan=True
        ):
            raise ESAMValueError(
                f"The loss of {name} must be a mean, or a sum that nothing changes: it is unknown "
                "whether it is divided by a number that depends on the batch. Received: a sum that "
                "is divided or added to."
            )
        if not torch.allclose(mean, own, rtol=tolerance, atol=1e-6, equal_nan=True):
            raise ESAMValueError(
                f"The mean of the losses per sample must equal the loss of {name}. "
                f"Received: {float(mean):.6g} and {float(own):.6g}."
            )
        return each

    def _sum_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return the sum of each sample's values, (b,)."""
        b, values, rows = self.samples, values.reshape(-1), rows.reshape(-1)
        if len(rows) % b == 0:
            blocks = rows.view(b, -1)
            in_order = (blocks == torch.arange(b, device="cpu")[:, None]) | (blocks == _NO_SAMPLE)
            if bool(in_order.all()):
                return values.view(b, -1).sum(1)
        # Elements that belong to no sample are padding: row b is dropped.
        places = torch.where(rows == _NO_SAMPLE, b, rows).to(values.device)
        return values.new_zeros(b + 1).index_add(0, places, values)[:b]


def _split_elements(values: Tensor, rows: Tensor, *_: Any) -> Parts:
    """Return (values, their weights in the mean, rows), with equal weights."""
    return values, values.new_ones(()), rows


def _split_classes(values: Tensor, rows: Tensor, options: Any, *_: Any) -> Parts:
    """Return the same for cross-entropy, with ignored classes."""
    target = options["target"]
    if target.is_floating_point():  # class probabilities, with classes in dimension 1
        return values, values.new_ones(()), rows.select(1 if rows.dim() > 1 else 0, 0)
    return values, (target != options["ignore_index"]).to(values.dtype), rows


def _split_sequences(values: Tensor, _: Tensor, options: Any, reduction: str) -> Parts:
    """Return the same for CTC: one value per sequence; a mean is over values per label."""
    if reduction == "mean":
        lengths = torch.as_tensor(options["target_lengths"], device=values.device)
        values = values / lengths.clamp_min(1)
    return values, values.new_ones(()), torch.arange(len(values), device="cpu")


_SPLIT: dict[Any, Callable[..., Parts]] = {
    **dict.fromkeys(_ELEMENTWISE, _split_elements),
    F.cross_entropy: _split_classes,
    F.nll_loss: _split_classes,
    F.ctc_loss: _split_sequences,
}


def _on_cpu(x: Any) -> Any:
    """Return an argument with its tensors on the CPU, where the rows are; also in index tuples."""
    if isinstance(x, tuple | list):
        moved = [_on_cpu(item) for item in x]
        return tuple(moved) if isinstance(x, tuple) else moved
    return x.cpu() if isinstance(x, Tensor) else x
