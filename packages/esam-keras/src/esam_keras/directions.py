"""Ascent directions from earlier steps: the gradient of the last update, or the first moment.

Both are variables of optimizers, so a saved optimizer contains them. Like all variables, they have
the values of the current Keras scope.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import keras
from keras import ops

from esam_core import Direction, ESAMValueError, Momentum, Previous
from esam_keras import compat
from esam_keras.perturbation import widen
from esam_keras.units import is_stored

__all__ = ["Earlier", "Given", "check_moment", "earlier_direction", "update_inputs"]

Tensor = Any


class Earlier(Protocol):
    """A source of ascent directions from earlier steps."""

    def exists(self) -> Tensor:
        """Return whether there is a direction, as a boolean; there is none before an update."""
        ...

    def keeps(self, variable: Any) -> bool:
        """Return whether there will be a direction for a variable."""
        ...

    def direction(self, variables: Sequence[Any]) -> list[Tensor | None]:
        """Return the direction, with its sign, for each variable; None if it has none."""
        ...

    def after(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[tuple[Any, Tensor]]:
        """Return the variables that an update changes, with their new values.

        Args:
            gradients: for the base optimizer; None if a variable has none.
            variables: the model's, in the same order.
        """
        ...


def earlier_direction(
    ascend: Direction,
    optimizer: keras.optimizers.Optimizer,
    base: keras.optimizers.Optimizer,
    variables: Sequence[Any],
    kept: Sequence[bool],
) -> Earlier | None:
    """Return the source of the direction; None if the step computes it in an ascent pass.

    Args:
        ascend: the value of `ascend=`.
        optimizer: the optimizer to which the variables for kept gradients are added.
        base: the base optimizer, built.
        variables: the model's trainable variables.
        kept: for each, whether `Previous` keeps its gradient.

    Raises:
        ESAMValueError: with `ascend=Momentum()`, the base optimizer has no first moment.
    """
    if isinstance(ascend, Previous):
        chosen = [v for v, keep in zip(variables, kept, strict=True) if keep]
        return _PreviousGradient(ascend.sign, optimizer, base, chosen)
    if isinstance(ascend, Momentum):
        check_moment(base)
        return _FirstMoment(ascend.sign, base)
    return None


# -- Momentum --------------------------------------------------------------------------------------


def check_moment(base: keras.optimizers.Optimizer) -> None:
    """Raise if a base optimizer has no known first moment, which `Momentum` needs.

    Raises:
        ESAMValueError: there is none; the message names the optimizer.
    """
    for name in filter(None, map(_without_moment, _each(base))):
        raise ESAMValueError(
            "`ascend=Momentum()` needs a base optimizer whose first moment ESAM knows: SGD with "
            f"momentum > 0, or {', '.join(list(compat.MOMENTS)[1:])} and their subclasses. "
            f"`ascend=Previous()` works with every base optimizer. Received: {name}."
        )


def _without_moment(optimizer: Any) -> str | None:
    """Return the name of an optimizer that has no known first moment; None if it has one."""
    name, attribute = type(optimizer).__name__, compat.moments_name(optimizer)
    if attribute is None:
        return name
    if isinstance(optimizer, keras.optimizers.SGD) and not optimizer.momentum:
        return "SGD with momentum=0"
    if optimizer.built and not isinstance(getattr(optimizer, attribute, None), list):
        return f"{name} of Keras {keras.__version__}"
    return None


def _each(base: Any) -> list[Any]:
    """Return the optimizers that run the updates."""
    if isinstance(base, keras.optimizers.LossScaleOptimizer):
        return _each(base.inner_optimizer)
    return list(base.optimizers) if _is_several(base) else [base]


def _is_several(optimizer: Any) -> bool:
    """Return whether an optimizer is a `MultiOptimizer`, which delegates to others."""
    return isinstance(optimizer, getattr(keras.optimizers, "MultiOptimizer", ()))


class _FirstMoment:
    """The first moments of a base optimizer. They need no extra memory."""

    def __init__(self, sign: int, base: Any) -> None:
        self._sign = sign
        self._base = base

    def exists(self) -> Tensor:
        updates = [ops.cast(optimizer.iterations, "int32") for optimizer in _each(self._base)]
        return ops.any(ops.stack(updates) > 0)

    def keeps(self, variable: Any) -> bool:
        return True  # the base optimizer has a moment for every variable that it trains

    def direction(self, variables: Sequence[Any]) -> list[Tensor | None]:
        base = self._base
        if isinstance(base, keras.optimizers.LossScaleOptimizer):
            base = base.inner_optimizer
        several, factors = _is_several(base), dict[int, Tensor]()
        found: list[Tensor | None] = []
        for variable in variables:
            own = compat.optimizer_of(base, variable) if several else base
            moment = compat.first_moment(own, variable)
            if id(own) not in factors:
                factors[id(own)] = self._factor(own)
            found.append(None if moment is None else _times(factors[id(own)], moment))
        return found

    def after(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[tuple[Any, Tensor]]:
        return []

    def _factor(self, optimizer: Any) -> Tensor:
        """Return the factor that turns a moment into a gradient with the direction's sign.

        SGD's moment is a sum of -lr g. It is divided by the current learning rate.
        """
        if not isinstance(optimizer, keras.optimizers.SGD):
            return float(self._sign)
        rate = ops.convert_to_tensor(optimizer.learning_rate)
        return -self._sign / ops.where(rate == 0, ops.ones_like(rate), rate)


def _times(factor: Tensor, variable: Any) -> Tensor:
    """Return a variable's value times a factor."""
    value = widen(ops.convert_to_tensor(variable))
    return value if isinstance(factor, float) and factor == 1.0 else _cast(factor, value) * value


def _cast(factor: Tensor, like: Tensor) -> Tensor:
    """Return a factor in the dtype of a tensor; Python numbers stay as they are."""
    return factor if isinstance(factor, float) else ops.cast(factor, like.dtype)


# -- Previous --------------------------------------------------------------------------------------


class _PreviousGradient:
    """One copy of the gradient of the last update, in variables of the optimizer.

    Args:
        sign: 1 or -1.
        optimizer: the optimizer to which the variables are added.
        base: the base optimizer.
        variables: the model's variables whose gradients are kept.
    """

    def __init__(self, sign: int, optimizer: Any, base: Any, variables: Sequence[Any]) -> None:
        self._sign = float(sign)
        self._base = base
        self._known = optimizer.add_variable((), dtype="float32", name="previous_is_known")
        self._gradients = {
            id(v): optimizer.add_variable_from_reference(v, name="previous_gradient")
            for v in variables
        }

    def exists(self) -> Tensor:
        return ops.convert_to_tensor(self._known) > 0

    def keeps(self, variable: Any) -> bool:
        return id(variable) in self._gradients

    def direction(self, variables: Sequence[Any]) -> list[Tensor | None]:
        kept = [self._gradients.get(id(variable)) for variable in variables]
        return [None if gradient is None else _times(self._sign, gradient) for gradient in kept]

    def after(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[tuple[Any, Tensor]]:
        given = update_inputs(self._base, gradients, variables)
        if all(one.gradient is None for one in given):
            return []
        by_variable = {id(v): one for v, one in zip(variables, given, strict=True)}
        known = ops.convert_to_tensor(self._known)
        changed = [(self._known, _any_updates(given, known))]
        for place, kept in self._gradients.items():
            one = by_variable.get(place, Given(None, True))
            new = (
                ops.zeros_like(kept) if one.gradient is None else ops.cast(one.gradient, kept.dtype)
            )
            if one.updates is not True:
                new = ops.where(one.updates, new, ops.convert_to_tensor(kept))
            changed.append((kept, new))
        return changed


def _any_updates(given: Sequence["Given"], known: Tensor) -> Tensor:
    """Return 1 if any variable is updated, else the previous value."""
    if any(one.updates is True for one in given):
        return ops.ones_like(known)
    made = ops.stack([ops.cast(one.updates, known.dtype) for one in given])
    return ops.maximum(known, ops.max(made))


class Given(NamedTuple):
    """The input of an optimizer's update rule for one variable.

    Args:
        gradient: the variable's gradient, or None.
        updates: True if the update always happens, else a boolean tensor.
    """

    gradient: Tensor | None
    updates: Any


def update_inputs(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> list[Given]:
    """Return the inputs of an optimizer's update rule for some gradients.

    They are unscaled, averaged with the accumulated gradients, and clipped. Call this before the
    optimizer, which changes the accumulated gradients.

    Args:
        optimizer: any of Keras's, built.
        gradients: one for each variable, or None.
        variables: the variables that the optimizer was built with, or some of them.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scale = optimizer.dynamic_scale
        finite = optimizer.check_finite(gradients)
        inner = update_inputs(
            optimizer.inner_optimizer, [_unscale(g, scale) for g in gradients], variables
        )
        return [Given(g, _both(finite, updates)) for g, updates in inner]
    result = [Given(None, True)] * len(variables)
    for own, places in _shares(optimizer, gradients, variables).values():
        found, updates = _given_to_one(
            own, [gradients[place] for place in places], [variables[place] for place in places]
        )
        for place, gradient in zip(places, found, strict=True):
            result[place] = Given(gradient, updates)
    return result


def _shares(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> dict[int, tuple[Any, list[int]]]:
    """Return, by id, each optimizer that runs updates and the indices of its variables.

    Variables without a gradient, or whose gradient is stored as their value, are excluded.
    """
    several = _is_several(optimizer)
    shares: dict[int, tuple[Any, list[int]]] = {}
    for place, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
        if gradient is None or is_stored(variable):
            continue
        own = compat.optimizer_of(optimizer, variable) if several else optimizer
        shares.setdefault(id(own), (own, []))[1].append(place)
    return shares


def _given_to_one(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> tuple[list[Tensor], Any]:
    """Return the gradients for an optimizer's update rule, and whether it is applied."""
    found = [_unscale(g, optimizer.loss_scale_factor) for g in gradients]
    updates: Any = True
    steps = optimizer.gradient_accumulation_steps
    if steps:
        so_far = compat.accumulated_gradients(optimizer, variables)
        found = [(g + before) / steps for g, before in zip(found, so_far, strict=True)]
        calls = ops.convert_to_tensor(compat.own_variables(optimizer)[0])
        updates = ops.equal((calls + 1) % steps, 0)
    return [ops.convert_to_tensor(g) for g in compat.clip_gradients(optimizer, found)], updates


def _unscale(gradient: Any, scale: Any) -> Any:
    """Return a gradient without a scale."""
    return gradient if gradient is None or scale is None else gradient / scale


def _both(first: Any, second: Any) -> Any:
    """Return whether both are true; each is a tensor or True."""
    return first if second is True else ops.logical_and(first, second)
