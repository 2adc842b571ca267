"""Support of ESAM in `compile`: the only place where this package changes Keras's classes.

A Keras optimizer sees only gradients, so ESAM's second pass must run in the model's training step.
`install` wraps `compile` once. If the optimizer is an `ESAM`, the compiled model *instance* gets
our step; if not, the instance gets its own step back. No class is replaced and no subclass is
needed.

- The wrapped class is the one that *defines* `compile`. Keras compares `type(model).compile` with
  that of this class to decide whether it may compile a loaded model again. A wrapper on
  `keras.Model` would make every `load_model` in the process drop its optimizer.
- `make_train_function` is replaced in the instance: Keras's version traces `train_step` once, with
  one mask.
- `train_step` is wrapped on the class, so that `super().train_step(...)` reaches it too.
- Attributes are set in the instance's `__dict__`, because Keras tracks attributes that are set
  normally.
"""

import functools
import inspect
from typing import Any

import keras

from esam_core import ESAMTypeError, ESAMValueError
from esam_keras import compat
from esam_keras.methods import has_own
from esam_keras.optimizer import ESAM, find_esam
from esam_keras.training import ATTRIBUTE, Training, train_step

__all__ = ["install"]

#: The entries that we set in a compiled model's `__dict__`.
OURS = (ATTRIBUTE, "make_train_function", "reset_metrics", "train_on_batch")


def install() -> None:
    """Wrap `compile` and `train_step` on the classes that define them, once per process."""
    if hasattr(keras.Model.compile, "esam_keras_original"):
        return
    _wrap_compile(_owner("compile"))
    _wrap_train_step(_owner("train_step"))
    compat.teach_monitors({"sharpness": "min", "sample_share": "min"}, Training.logs_of)


def _owner(name: str) -> Any:
    """Return the Keras class that defines a method of models."""
    return next(c for c in keras.Model.__mro__ if name in vars(c))


def _wrap_train_step(owner: Any) -> None:
    """Let `super().train_step(...)` run our step in a model that is compiled with an ESAM."""
    original = vars(owner)["train_step"]

    @functools.wraps(original)
    def wrapper(self: Any, *arguments: Any) -> Any:
        if ATTRIBUTE in vars(self):
            return train_step(self, *arguments)
        return original(self, *arguments)

    owner.train_step = wrapper


def _wrap_compile(owner: Any) -> None:
    """Let `compile` give a model our step, or its own step back, depending on the optimizer."""
    original = vars(owner)["compile"]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compile(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: A001
        bound = signature.bind(self, *args, **kwargs)
        esam = find_esam(bound.arguments.get("optimizer"))
        if esam is not None:
            _check(self, esam, bound.arguments)
        before = vars(self).get(ATTRIBUTE)
        try:
            original(*bound.args, **bound.kwargs)
        except BaseException:
            # Keras sets the optimizer first: then our step must not run with another one.
            if before is not None and find_esam(self.optimizer) is not before.esam:
                _detach(self)
                self.train_function = None
            raise
        _detach(self)
        # Read it from the model: a subclass may set its optimizer in its own way.
        esam = find_esam(self.optimizer)
        if esam is not None:
            _check_scaler(self.optimizer, esam)
            _attach(self, esam)

    compile.esam_keras_original = original  # type: ignore[attr-defined]
    owner.compile = compile


def _check(model: Any, esam: ESAM, arguments: dict[str, Any]) -> None:
    """Raise if this model cannot train with ESAM, and prevent Keras from scaling losses twice."""
    training = Training(model, esam)
    training.backend.refuse(model)
    if type(model).make_train_function is not keras.Model.make_train_function:
        raise ESAMTypeError(
            "A model with its own `make_train_function` cannot be compiled with ESAM, which needs "
            "its own to draw a mask for every step. Override `train_step` instead, and call "
            f"`esam_keras.train_step` in it. Received: {type(model).__name__}."
        )
    if (
        arguments.get("loss") is None
        and not has_own(model, "compute_loss")
        and esam.config.rho > 0.0
        and esam.config.uses_subsets
    ):
        raise ESAMValueError(
            "`loss` must be given: ESAM needs one loss per sample. Received: loss=None. A model "
            "whose losses come from `add_loss` has no losses per sample and needs gamma=1.0, "
            "without ascend=Part(...)."
        )
    if isinstance(esam.base_optimizer, keras.optimizers.LossScaleOptimizer):
        if isinstance(arguments["optimizer"], keras.optimizers.LossScaleOptimizer):
            raise ESAMTypeError(
                "A `LossScaleOptimizer` must be either around ESAM or inside it, not both. "
                f"Received: optimizer={arguments['optimizer']!r}."
            )
        arguments["auto_scale_loss"] = False


def _check_scaler(optimizer: Any, esam: ESAM) -> None:
    """Raise if overflows would be hidden from a loss scaler, which must see them to adapt."""
    scalers = (optimizer, esam.base_optimizer)
    scaled = any(isinstance(each, keras.optimizers.LossScaleOptimizer) for each in scalers)
    if scaled and esam.config.on_nonfinite != "propagate":
        raise ESAMValueError(
            "`on_nonfinite` must be 'propagate' with a `LossScaleOptimizer`, which skips steps "
            "with an overflow itself, and then reduces its scale. "
            f"Received: on_nonfinite={esam.config.on_nonfinite!r}."
        )


def _attach(model: Any, esam: ESAM) -> None:
    """Give a model instance our step."""
    training = Training(model, esam)
    esam.keep_gradients_of(training.find_kept)
    mine = vars(model)
    mine[ATTRIBUTE] = training
    mine["make_train_function"] = functools.partial(_make_train_function, model)
    mine["reset_metrics"] = functools.partial(_reset_metrics, model)
    mine["train_on_batch"] = functools.partial(_train_on_batch, model)


def _detach(model: Any) -> None:
    """Give a model instance its own methods back."""
    for name in OURS:
        vars(model).pop(name, None)


def _make_train_function(model: Any, force: bool = False) -> Any:
    """Create the function that `fit` calls, if there is none or `force` is set."""
    if model.train_function is None or force:
        training = Training.of(model)
        model.train_function = training.backend.make_train_function(training)
    return model.train_function


def _reset_metrics(model: Any) -> None:
    """Reset the metrics, and ESAM's means with them."""
    type(model).reset_metrics(model)
    Training.of(model).esam.reset_logs()


def _train_on_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Train on a batch; ESAM's logs are only in dicts, so that lists keep their length."""
    signature = inspect.signature(type(model).train_on_batch)
    bound = signature.bind(model, *args, **kwargs)
    options = bound.arguments
    if "return_dict" not in signature.parameters:  # an override may pass it on in its **kwargs
        parameters = signature.parameters.values()
        rest = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        options = options.setdefault(rest[0], {}) if rest else {}
    as_dict = options.get("return_dict", False)
    options["return_dict"] = True
    logs = type(model).train_on_batch(*bound.args, **bound.kwargs)
    if as_dict or not isinstance(logs, dict):
        return logs
    own = Training.of(model).own_logs
    return compat.flat_metrics(model, {name: v for name, v in logs.items() if name not in own})
