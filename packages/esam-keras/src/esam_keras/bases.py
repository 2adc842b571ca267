"""The base optimizer: its attributes, and checks. Any Keras optimizer works."""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from esam_core import ESAMRuntimeError, ESAMTypeError, ESAMValueError

__all__ = [
    *("BaseAttribute", "Setting", "refuse_attributes_of_the_base"),
    *("refuse_other_arguments", "resolve_base"),
]


class BaseAttribute:
    """An attribute of the base optimizer, for callbacks and `LossScaleOptimizer`.

    Keras's constructor assigns each before there is a base optimizer; these are ignored.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        base = vars(optimizer).get("base_optimizer")
        if base is None:
            return None
        return getattr(base, self.name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        base = vars(optimizer).get("base_optimizer")
        if base is not None:
            setattr(base, self.name, value)


class Setting:
    """A hyperparameter, which cannot be assigned: steps are drawn and compiled for its value.

    Args:
        path: its place in the config. Default: its name.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = path

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self._read = operator.attrgetter(self._path or name)

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else self._read(optimizer.config)

    def __set__(self, optimizer: Any, value: Any) -> None:
        raise ESAMRuntimeError(
            f"`{self.name}` cannot be changed: steps are drawn and compiled for its value. Compile "
            "the model again, with the same base optimizer if its state is to be kept: "
            f"ESAM(optimizer.base_optimizer, {self.name}={value!r}, ...). "
            f"Received: {self.name}={value!r}."
        )


def refuse_attributes_of_the_base(optimizer: Any, name: str, value: Any) -> None:
    """Raise if an attribute is a hyperparameter of only the base optimizer, such as momentum."""
    base = vars(optimizer).get("base_optimizer")
    if base is None or name in vars(optimizer) or hasattr(type(optimizer), name):
        return
    if name in vars(base) and name in base.get_config():
        raise ESAMRuntimeError(
            f"`{name}` is a hyperparameter of the base optimizer, not of ESAM: set "
            f"optimizer.base_optimizer.{name} = {value!r}. Received: {name}={value!r}."
        )


def refuse_other_arguments(base: Any, positional: Sequence[Any], others: Mapping[str, Any]) -> None:
    """Raise if there are other arguments, which ESAM does not have."""
    if positional:
        model = isinstance(positional[0], keras.Model)
        instead = ", and no model: pass ESAM(...) to model.compile" if model else ""
        kinds = ", ".join(type(value).__name__ for value in positional)
        raise ESAMTypeError(
            f"ESAM accepts only `base_optimizer` by position{instead}. "
            f"Received: ESAM(base_optimizer, {kinds})."
        )
    for name, value in others.items():
        message = f"`{name}` is not an argument of ESAM. Received: {name}={value!r}."
        if name == "budget":
            message += (
                " In Keras, choose before `compile`: esam_core.budget.make_plan("
                "esam_keras.unit_records(model), budget=...) returns the sampler and the selector."
            )
        kind = type(resolve_base(base))
        if name in inspect.signature(kind).parameters:
            message += (
                " Pass it to the base optimizer: "
                f"ESAM(keras.optimizers.{kind.__name__}({name}={value!r}), ...)."
            )
        raise ESAMTypeError(message)


def resolve_base(given: Any) -> keras.optimizers.Optimizer:
    """Return the base optimizer for an instance or a name that Keras knows, or raise."""
    if isinstance(given, str):
        try:
            return keras.optimizers.get(given)
        except ValueError as error:
            raise ESAMValueError(
                "`base_optimizer` must be a Keras optimizer or a name that "
                f"`keras.optimizers.get` knows. Received: base_optimizer={given!r}."
            ) from error
    if isinstance(given, type):
        raise ESAMTypeError(
            "`base_optimizer` must be an instance, such as keras.optimizers.SGD(0.1), not a "
            f"class. Received: base_optimizer={given!r}."
        )
    if not isinstance(given, keras.optimizers.Optimizer):
        raise ESAMTypeError(
            "`base_optimizer` must be a Keras optimizer such as keras.optimizers.SGD(0.1). "
            f"Received: base_optimizer={given!r}."
        )
    return given
