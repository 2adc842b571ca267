"""The optimizer: any Keras optimizer, and what the training step needs to know beside it."""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Never

import keras

from esam_core import (
    ESAMConfig,
    ESAMRuntimeError,
    ESAMTypeError,
    ESAMValueError,
    Sampler,
    Selector,
    StepReport,
)
from esam_core.config import OnNonfinite
from esam_core.perturbation import Norm
from esam_core.validation import flag
from esam_keras import compat

__all__ = ["ESAM", "OfAStep", "applying", "find_esam"]

#: The sums from which the logged means are made, in the order of the variables.
LOG_SUMS = ("sharpness_total", "sharpness_count", "share_total", "share_count")


class OfAStep(list[Any]):
    """Variables, or their values, that `apply` gets with the descent gradients of an ESAM step.

    A loss scaler hands them on as they are. Gradients that come with any other list are refused:
    they were not made by ESAM's two passes.
    """


#: Whether a step's update is being made: on JAX a loss scaler returns the values that it was given
#: from a branch of a condition, where both branches must return plain lists.
_APPLYING: ContextVar[bool] = ContextVar("esam_keras_applying", default=False)


@contextlib.contextmanager
def applying() -> Iterator[None]:
    """Let `stateless_apply` know, while this lasts, that the gradients are an ESAM step's."""
    token = _APPLYING.set(True)
    try:
        yield
    finally:
        _APPLYING.reset(token)


class _OfTheBase:
    """An attribute that is the base optimizer's, for callbacks and `LossScaleOptimizer`.

    Keras's constructor assigns each before there is a base; those assignments are dropped.
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


@keras.saving.register_keras_serializable(package="esam_keras")
class ESAM(keras.optimizers.Optimizer):
    """Efficient sharpness-aware minimisation around any Keras optimizer.

    Give it to `model.compile` and train as ever. A Keras optimizer sees only gradients, and the
    second pass needs model, loss and batch: the training step therefore lives in the model, and
    `compile` puts it there.

    Source: Du et al., ICLR 2022 (arXiv 2110.03141), algorithm 1. What it leaves open is
    decided in the documentation; the defaults are those of `esam_core.ESAMConfig`.

    Args:
        base_optimizer: an instance, or a name that Keras knows, such as "sgd".
        rho: radius of the perturbation, >= 0; 0 is the base optimizer. Default 0.05.
        beta: share of the variables that are perturbed, in (0, 1]: short for
            `perturb=Bernoulli(beta)`. Default 0.6.
        gamma: share of the batch in the second gradient, in (0, 1]: short for
            `select=TopIncrease(gamma)`. Default 0.5.
        perturb: a sampler of masks, instead of `beta`.
        select: a selector of samples, instead of `gamma`.
        adaptive: scale the perturbation with the weights (ASAM). Default False.
        norm: "masked" (default), "estimated", "full" or "none".
        norm_eps: added to the gradient's norm, > 0. Default 1e-12.
        seed: of masks and random selections, in [0, 2**63). Default 0.
        on_nonfinite: "propagate" (default), "skip" or "raise": see `esam_core.config`.
        logs: whether "sharpness" and "sample_share" appear in the logs. Default True.
        name: of the optimizer. Default "esam".

    Raises:
        ESAMTypeError, ESAMValueError: naming the argument, what must hold, and what came.

    Example:
        >>> import keras, numpy as np
        >>> from esam_keras import ESAM
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.05, beta=0.6, gamma=0.5), "mse")
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
        >>> sorted(history.history)
        ['loss', 'sample_share', 'sharpness']
    """

    gradient_accumulation_steps = _OfTheBase()
    loss_scale_factor = _OfTheBase()
    weight_decay = _OfTheBase()
    clipnorm = _OfTheBase()
    clipvalue = _OfTheBase()
    global_clipnorm = _OfTheBase()
    use_ema = _OfTheBase()
    ema_momentum = _OfTheBase()
    ema_overwrite_frequency = _OfTheBase()

    def __init__(
        self,
        base_optimizer: keras.optimizers.Optimizer | str,
        *,
        rho: float = 0.05,
        beta: float | None = None,
        gamma: float | None = None,
        perturb: Sampler | None = None,
        select: Selector | None = None,
        adaptive: bool = False,
        norm: Norm = "masked",
        norm_eps: float = 1e-12,
        seed: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        logs: bool = True,
        name: str = "esam",
        **others: Never,
    ) -> None:
        _refuse_others(base_optimizer, others)
        base = _base_optimizer(base_optimizer)
        config = ESAMConfig.from_arguments(
            rho=rho,
            beta=beta,
            gamma=gamma,
            perturb=perturb,
            select=select,
            adaptive=adaptive,
            norm=norm,
            norm_eps=norm_eps,
            seed=seed,
            on_nonfinite=on_nonfinite,
        )
        flag("logs", logs)
        with _on_the_host():
            # The learning rate is the base's; a function keeps Keras from making a variable.
            super().__init__(learning_rate=lambda: base.learning_rate, name=name)
            # JAX keeps one buffer for equal constants, and will not donate it twice: the base
            # optimizer counts from 0 as well.
            self._iterations.assign(keras.ops.zeros((), dtype=self._iterations.dtype))
        self._log_sums = [
            self.add_variable((), dtype="float32", name=variable) for variable in LOG_SUMS
        ]
        self.base_optimizer = base
        self.config = config
        self.logs = logs
        self._report: StepReport | None = None

    # -- what is the base's ---------------------------------------------------------------------

    @property
    def learning_rate(self) -> Any:
        """The base optimizer's learning rate; assignable where the base's is."""
        return self.base_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.base_optimizer.learning_rate = value

    @property
    def iterations(self) -> Any:
        """The number of updates that the base optimizer made."""
        return self.base_optimizer.iterations

    @property
    def _model_variables_moving_average(self) -> Any:
        """The base's averages: what the `SwapEMAWeights` callback swaps in."""
        return compat.ema_variables(self.base_optimizer)

    @property
    def variables(self) -> list[Any]:
        """ESAM's own variables (the counter first), then the base optimizer's."""
        return self._variables[:] + self.base_optimizer.variables

    def build(self, variables: Sequence[Any]) -> None:
        """Create the base optimizer's variables."""
        if getattr(self, "built", False):
            return
        if not self.base_optimizer.built:
            self.base_optimizer.build(variables)
        # Straight into the instance: Keras would track the model's variables as our own.
        self.__dict__["_trainable_variables"] = list(variables)
        self.built = True

    def scale_loss(self, loss: Any) -> Any:
        """Scale a loss as the base optimizer does."""
        return self.base_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Let the base optimizer put its moving averages into the weights, if it keeps any."""
        self.base_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from the base optimizer's weight decay."""
        self.base_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    # -- the update -----------------------------------------------------------------------------

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Make the base optimizer's update with the descent gradients of an ESAM step.

        Raises:
            ESAMRuntimeError: called by anything but an ESAM step: gradients alone cannot make one.
        """
        _require_step(trainable_variables)
        self.base_optimizer.apply(grads, trainable_variables)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """Make the base optimizer's stateless update: see `apply`."""
        _require_step(trainable_variables)
        own = len(self._variables)
        trainable, base = self.base_optimizer.stateless_apply(
            optimizer_variables[own:], grads, trainable_variables
        )
        # A loss scaler hands over its scope's variables, and wants their values back.
        mine = [v.value if isinstance(v, keras.Variable) else v for v in optimizer_variables[:own]]
        return trainable, [*mine, *base]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Refuse: updates are the base optimizer's, and come through `apply`."""
        _require_step(None)

    def reset_logs(self) -> None:
        """Begin new means of what is logged."""
        for variable in self._log_sums:
            variable.assign(keras.ops.zeros((), dtype=variable.dtype))

    # -- what a step leaves -----------------------------------------------------------------------

    @property
    def count(self) -> Any:
        """The variable that counts ascents: on it depend masks, and it is saved."""
        return self._variables[0]

    @property
    def report(self) -> StepReport | None:
        """The last step's `StepReport`, its arrays on their device; None before the first step."""
        return self._report

    def keep_report(self, report: StepReport) -> None:
        """Make a step's report the last one."""
        self._report = report

    @property
    def log_variables(self) -> list[Any]:
        """The sums from which the logged means are made: see `esam_keras.metrics.log_sums`."""
        return self._log_sums

    # -- saving -----------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return everything that `from_config` needs, the base optimizer included."""
        config = self.config.to_dict()
        config.pop("ascend", None)  # no argument of this optimizer
        return {
            "name": self.name,
            "base_optimizer": keras.saving.serialize_keras_object(self.base_optimizer),
            "logs": self.logs,
            **config,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "ESAM":
        """Return the optimizer that `get_config` described."""
        arguments = copy.deepcopy(config)  # Keras writes into what it reads
        base = keras.saving.deserialize_keras_object(
            arguments.pop("base_optimizer"), custom_objects=custom_objects
        )
        name, logs = arguments.pop("name"), arguments.pop("logs")
        read = ESAMConfig.from_dict(arguments)
        return cls(base, name=name, logs=logs, **{key: getattr(read, key) for key in arguments})

    def save_own_variables(self, store: Any) -> None:
        """Write ESAM's own variables; the base writes its own beside them."""
        for i, variable in enumerate(self._variables):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote."""
        if len(store.keys()) != len(self._variables):
            raise ESAMValueError(
                f"The saved optimizer must be an ESAM with {len(self._variables)} variables of "
                f"its own. Received: {len(store.keys())} variables."
            )
        for i, variable in enumerate(self._variables):
            variable.assign(store[str(i)])

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all of `variables`, the base optimizer's included."""
        if len(weights) != len(self.variables):
            raise ESAMValueError(
                f"`weights` must be {len(self.variables)} arrays, one for each of `variables`. "
                f"Received: {len(weights)}."
            )
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)


def _require_step(variables: Any) -> None:
    """Raise unless variables come from an ESAM step."""
    if not (isinstance(variables, OfAStep) or _APPLYING.get()):
        raise ESAMRuntimeError(
            "ESAM was handed gradients, and makes its own: it needs model, loss and batch for two "
            "passes. Train with `model.compile(optimizer=ESAM(...))` and `model.fit`. In a "
            "`train_step` of your own, call `esam_keras.train_step(self, ...)` or "
            "`super().train_step(...)` with the arguments that it received, instead of computing "
            "and applying gradients."
        )


def find_esam(optimizer: Any) -> ESAM | None:
    """Return the ESAM that an optimizer is, or that a loss scaler holds; else None."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, ESAM) else None


def _refuse_others(base: Any, others: Mapping[str, Any]) -> None:
    """Raise if there are arguments that ESAM does not have."""
    for name, value in others.items():
        message = f"`{name}` is not an argument of ESAM. Received: {name}={value!r}."
        kind = type(_base_optimizer(base))
        if name in inspect.signature(kind).parameters:
            message += (
                " Give it to the base optimizer: "
                f"ESAM(keras.optimizers.{kind.__name__}({name}={value!r}), ...)."
            )
        raise ESAMTypeError(message)


def _base_optimizer(given: Any) -> keras.optimizers.Optimizer:
    """Return the base optimizer, or raise: an instance, or a name that Keras knows."""
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
            "`base_optimizer` must be an instance, such as keras.optimizers.SGD(0.1), and not a "
            f"class. Received: base_optimizer={given!r}."
        )
    if find_esam(given) is not None:
        raise ESAMTypeError(
            f"`base_optimizer` must not be another ESAM. Received: base_optimizer={given!r}."
        )
    if not isinstance(given, keras.optimizers.Optimizer):
        raise ESAMTypeError(
            "`base_optimizer` must be a Keras optimizer such as keras.optimizers.SGD(0.1). "
            f"Received: base_optimizer={given!r}."
        )
    return given


def _on_the_host() -> Any:
    """Return the scope in which the counter is made, so that reading it waits for no device."""
    if keras.backend.backend() == "jax":
        # There the counter travels in the state, which jit wants on one device.
        return keras.name_scope("esam")
    return keras.device("cpu:0" if keras.backend.backend() == "tensorflow" else "cpu")
