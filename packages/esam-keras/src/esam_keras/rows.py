"""Rows of a batch and of predictions, for passes on some of the samples.

The loss is always that of the whole batch, in which the other samples have weight 0. Therefore a
sample's loss is the same function in every pass, for any divisor in the loss. A `Fill` provides the
predictions for the other samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

__all__ = [
    "Fill",
    "fill_by_repeating",
    "fill_from_batch",
    "fill_from_rest",
    "first_input",
    "row_count",
    "rows",
    "rows_of_batch",
    "spread",
]

Tensor = Any

#: Predictions, and the masks of their leaves; None for a leaf without a mask.
Predicted = tuple[Any, list[Tensor | None]]

#: Returns the predictions for the whole batch, given those for some of its samples, their masks,
#: and which of their leaves have one row per sample.
Fill = Callable[[Any, list[Tensor | None], Sequence[bool]], Predicted]


def first_input(x: Any) -> Any:
    """Return the first leaf of a batch's inputs, whose rows are counted as the samples."""
    return next(leaf for leaf in tree.flatten(x) if leaf is not None)


def row_count(leaf: Any) -> int | None:
    """Return the length of a leaf's first axis; None if it is unknown, -1 if there is no axis."""
    shape: Any = getattr(leaf, "shape", ())
    return shape[0] if len(shape) > 0 else -1


def rows(structure: Any, indices: Tensor) -> Any:
    """Return the rows of all leaves of a structure; None stays None."""
    return tree.map_structure(
        lambda leaf: None if leaf is None else ops.take(leaf, indices, axis=0), structure
    )


def rows_of_batch(structure: Any, indices: Tensor, b: int | Tensor) -> Any:
    """Return the rows of the leaves that have b rows; other leaves are unchanged."""

    def take_rows(leaf: Any) -> Any:
        n = row_count(leaf)
        if n == -1 or (isinstance(b, int) and n is not None and n != b):
            return leaf
        return ops.take(leaf, indices, axis=0)

    return tree.map_structure(take_rows, structure)


def spread(indices: Tensor, values: Tensor, b: int | Tensor) -> Tensor:
    """Return (b,) numbers: the values at the indices, 0 elsewhere."""
    zeros = ops.zeros((b,), dtype=keras.config.floatx())
    places = ops.expand_dims(indices, axis=-1)
    return ops.scatter_update(zeros, places, ops.cast(values, zeros.dtype))


def fill_from_batch(
    y_pred: Any,
    masks: Sequence[Tensor | None],
    indices: Tensor,
    without_gradient: Callable[[Tensor], Tensor],
) -> Fill:
    """Return the `Fill` that inserts predictions into those of a pass on the whole batch.

    Args:
        y_pred: for the whole batch.
        masks: of its leaves.
        indices: (k,), the places of the samples.
        without_gradient: returns a tensor without its gradient.
    """

    def fill(run: Any, _: list[Tensor | None], with_rows: Sequence[bool]) -> Predicted:
        places = ops.expand_dims(indices, axis=-1)
        leaves, kept = [], []
        flat = zip(tree.flatten(y_pred), masks, tree.flatten(run), with_rows, strict=True)
        for before, mask, now, has_rows in flat:
            # An output without one prediction per sample is that of the selected samples.
            leaves.append(
                ops.scatter_update(without_gradient(before), places, now) if has_rows else now
            )
            kept.append(mask if has_rows else None)
        return tree.pack_sequence_as(y_pred, leaves), kept

    return fill


def fill_by_repeating(
    indices: Tensor, b: int | Tensor, without_gradient: Callable[[Tensor], Tensor]
) -> Fill:
    """Return the `Fill` that repeats the predictions, for samples whose predictions are unknown.

    A loss may not be finite for another sample's predictions, so these have no gradient.

    Args:
        indices: (k,), the places of the samples.
        b: the batch size.
        without_gradient: returns a tensor without its gradient.
    """

    def fill(run: Any, masks: list[Tensor | None], with_rows: Sequence[bool]) -> Predicted:
        k, places = ops.shape(indices)[0], ops.expand_dims(indices, axis=-1)
        order = ops.arange(b, dtype="int32") % k

        def repeat(leaf: Tensor) -> Tensor:
            others = without_gradient(ops.take(leaf, order, axis=0))
            return ops.scatter_update(others, places, leaf)

        def repeat_mask(mask: Tensor) -> Tensor:
            # Keras divides by the sum of the mask. The other samples' values have the factor 0;
            # with the mean mask, they count in that sum as much as these samples, whatever k is.
            mask = ops.cast(mask, keras.config.floatx())
            others = ops.zeros_like(ops.take(mask, order, axis=0)) + ops.mean(mask)
            return ops.scatter_update(others, places, mask)

        leaves = [
            repeat(leaf) if has_rows else leaf
            for leaf, has_rows in zip(tree.flatten(run), with_rows, strict=True)
        ]
        kept = [
            None if mask is None or not has_rows else repeat_mask(mask)
            for mask, has_rows in zip(masks, with_rows, strict=True)
        ]
        return tree.pack_sequence_as(run, leaves), kept

    return fill


def fill_from_rest(others: Callable[[], Predicted], part: Tensor, rest: Tensor) -> Fill:
    """Return the `Fill` that joins the predictions for a part of the batch and for the rest.

    Args:
        others: returns the predictions for the rest, with their masks; called after the part's
            forward.
        part: (n,), the places of the part's samples.
        rest: (b - n,), the places of the other samples.
    """

    def fill(run: Any, masks: list[Tensor | None], with_rows: Sequence[bool]) -> Predicted:
        y_pred, other_masks = others()
        order = ops.argsort(ops.concatenate([part, rest], axis=0))

        def join(now: Tensor, other: Tensor) -> Tensor:
            return ops.take(ops.concatenate([now, other], axis=0), order, axis=0)

        flat = zip(tree.flatten(run), tree.flatten(y_pred), with_rows, strict=True)
        leaves = [join(now, other) if has_rows else now for now, other, has_rows in flat]
        kept = [
            None if mask is None or other is None or not has_rows else join(mask, other)
            for mask, other, has_rows in zip(masks, other_masks, with_rows, strict=True)
        ]
        return tree.pack_sequence_as(run, leaves), kept

    return fill
