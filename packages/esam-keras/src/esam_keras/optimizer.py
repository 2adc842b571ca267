"""The optimizer `ESAM`: it wraps any Keras optimizer, and configures the training step."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Never

import keras

from esam_core import (
    Batch,
    Direction,
    ESAMConfig,
    ESAMTypeError,
    ESAMValueError,
    Momentum,
    Sampler,
    Selector,
    StepReport,
)
from esam_core.config import OnNonfinite
from esam_core.perturbation import Norm
from esam_core.validation import flag
from esam_keras import compat
from esam_keras.bases import (
    BaseAttribute,
    Setting,
    refuse_attributes_of_the_base,
    refuse_other_arguments,
    resolve_base,
)
from esam_keras.devices import on_the_host
from esam_keras.directions import Earlier, check_moment, earlier_direction
from esam_keras.handover import require_step
from esam_keras.saved import LOG_SUMS, load_own
from esam_keras.scope import PassScope

__all__ = ["ESAM", "find_esam"]


@keras.saving.register_keras_serializable(package="esam_keras")
class ESAM(compat.BaseAverages, keras.optimizers.Optimizer):
    """Efficient sharpness-aware minimisation around any Keras optimizer.

    The defaults are the paper's method; `beta=1.0, gamma=1.0` is SAM. The most accurate setting in
    our study, which is small, was `perturb=Suffix(0.5), gamma=1.0, ascend=Part(0.25)`.

    Pass it to `model.compile` and train as usual. A Keras optimizer sees only gradients, but the
    second pass needs model, loss and batch. Therefore `compile` installs ESAM's training step in
    the model.

    Source: Du et al., ICLR 2022 (arXiv 2110.03141), algorithm 1. The documentation describes what
    the paper leaves open; the defaults are those of `esam_core.ESAMConfig`.

    Args:
        base_optimizer: an instance, or a name that Keras knows, such as "sgd".
        rho: the perturbation radius, >= 0; with 0, steps are base steps. Default 0.05.
        beta: share of the variables to perturb, in (0, 1]; short for `perturb=Bernoulli(beta)`.
            Default 0.6.
        gamma: share of the samples in the descent pass (the second gradient), in (0, 1]; short for
            `select=TopIncrease(gamma)`. Default 0.5.
        perturb: which weights to perturb: a sampler such as `Suffix(0.5)`, instead of `beta`.
        select: which samples the second gradient uses: a selector such as `Proportional(0.5)`,
            instead of `gamma`.
        adaptive: scale the perturbation by the weights (ASAM). Default False.
        norm: the norm that divides the ascent gradient. "masked" (default): that of the gradients
            of the perturbed variables, as in the authors' code. "estimated": an estimate of the
            whole gradient's norm from them. "full": the norm of the whole gradient, which needs a
            whole backward pass. "none": no division, as in the paper's algorithm 1.
        norm_eps: added to the gradient's norm, > 0. Default 1e-12.
        ascend: the ascent direction: the gradient of the batch (`Batch()`, default) or of a part of
            it (`Part(share)`); or, without an ascent pass, the gradient of the previous update
            (`Previous()`) or the base optimizer's first moment (`Momentum()`).
        seed: the seed of masks and random selections, in [0, 2**63). Default 0.
        on_nonfinite: what to do if a loss or gradient is not finite: "propagate" (default; it
            reaches the base optimizer or a loss scaler), "skip" (weights and optimizer stay as they
            are) or "raise" (`NonFiniteError`).
        logs: whether "sharpness" and "sample_share" appear in the logs. Default True.
        name: the name of the optimizer. Default "esam".

    Raises:
        ESAMTypeError, ESAMValueError: an argument is invalid; the message names it, the requirement
            and the value received.

    Example:
        >>> import keras, numpy as np
        >>> from esam_keras import ESAM
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.05, beta=0.6, gamma=0.5), "mse")
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
        >>> sorted(history.history)
        ['loss', 'sample_share', 'sharpness']
    """

    rho = Setting()
    beta = Setting("perturb.beta")
    gamma = Setting("select.gamma")
    perturb = Setting()
    select = Setting()
    ascend = Setting()
    adaptive = Setting()
    norm = Setting()
    norm_eps = Setting()
    seed = Setting()
    on_nonfinite = Setting()

    gradient_accumulation_steps = BaseAttribute()
    loss_scale_factor = BaseAttribute()
    weight_decay = BaseAttribute()
    clipnorm = BaseAttribute()
    clipvalue = BaseAttribute()
    global_clipnorm = BaseAttribute()
    use_ema = BaseAttribute()
    ema_momentum = BaseAttribute()
    ema_overwrite_frequency = BaseAttribute()

    def __init__(
        self,
        base_optimizer: keras.optimizers.Optimizer | str,
        *positional: Never,
        rho: float = 0.05,
        beta: float | None = None,
        gamma: float | None = None,
        perturb: Sampler | None = None,
        select: Selector | None = None,
        adaptive: bool = False,
        norm: Norm = "masked",
        norm_eps: float = 1e-12,
        ascend: Direction | None = None,
        seed: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        logs: bool = True,
        name: str = "esam",
        **others: Never,
    ) -> None:
        refuse_other_arguments(base_optimizer, positional, others)
        base = resolve_base(base_optimizer)
        if find_esam(base) is not None:
            raise ESAMTypeError(
                f"`base_optimizer` must not be another ESAM. Received: base_optimizer={base!r}."
            )
        config = ESAMConfig.from_arguments(
            rho=rho,
            beta=beta,
            gamma=gamma,
            perturb=perturb,
            select=select,
            adaptive=adaptive,
            norm=norm,
            norm_eps=norm_eps,
            ascend=Batch() if ascend is None else ascend,
            seed=seed,
            on_nonfinite=on_nonfinite,
        )
        flag("logs", logs)
        if isinstance(config.ascend, Momentum):
            check_moment(base)
        with on_the_host():
            # The learning rate is the base optimizer's; a function prevents Keras from creating a
            # variable.
            super().__init__(learning_rate=lambda: base.learning_rate, name=name)
            # JAX uses one buffer for equal constants, which cannot be donated twice: the base
            # optimizer also counts from 0.
            self.count.assign(keras.ops.zeros((), dtype=self.count.dtype))
        self._log_sums = [
            self.add_variable((), dtype="float32", name=variable) for variable in LOG_SUMS
        ]
        self.base_optimizer = base
        self.config = config
        self.logs = logs
        self._report: StepReport | None = None
        self._kept_of: Callable[[Sequence[Any]], Sequence[bool]] | None = None
        self._earlier: Earlier | None = None

    # -- the base optimizer's attributes -----------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_attributes_of_the_base(self, name, value)
        super().__setattr__(name, value)

    @property
    def learning_rate(self) -> Any:
        """The base optimizer's learning rate; assignable if the base optimizer's is."""
        return self.base_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.base_optimizer.learning_rate = value

    @property
    def iterations(self) -> Any:
        """The number of updates of the base optimizer."""
        return self.base_optimizer.iterations

    @property
    def variables(self) -> list[Any]:
        """ESAM's own variables (the counter first), then the base optimizer's."""
        return compat.own_variables(self) + self.base_optimizer.variables

    def build(self, variables: Sequence[Any]) -> None:
        """Create the base optimizer's variables, and those for the gradients of `Previous`."""
        if getattr(self, "built", False):
            return
        if not self.base_optimizer.built:
            self.base_optimizer.build(variables)
        kept = self._kept_of(variables) if self._kept_of else [True] * len(variables)
        self._earlier = earlier_direction(
            self.config.ascend, self, self.base_optimizer, variables, kept
        )
        compat.know_variables(self, variables)
        self.built = True

    def scale_loss(self, loss: Any) -> Any:
        """Scale a loss as the base optimizer does."""
        return self.base_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Let the base optimizer write its moving averages to the weights, if it has any."""
        self.base_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from the base optimizer's weight decay."""
        self.base_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    # -- the update -----------------------------------------------------------------------------

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Run the base optimizer's update with the descent gradients of an ESAM step.

        Raises:
            ESAMRuntimeError: it was not called by an ESAM step; gradients alone are not enough.
        """
        require_step(trainable_variables)
        with self._keeping(grads, trainable_variables):
            self.base_optimizer.apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Any:
        """Do the same through the base optimizer's `apply_gradients`, as Keras on TensorFlow."""
        pairs = list(grads_and_vars)
        grads, variables = zip(*pairs, strict=True)
        require_step(variables)
        with self._keeping(grads, variables):
            return self.base_optimizer.apply_gradients(pairs)

    @contextmanager
    def _keeping(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> Iterator[None]:
        """Keep the gradients of an update for `Previous`; without variables, of all known."""
        known = compat.known_variables(self) if variables is None else variables
        changed = self._earlier.after(grads, known) if self._earlier else []
        yield
        for variable, value in changed:
            variable.assign(value)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """Run the base optimizer's stateless update; see `apply`."""
        require_step(trainable_variables)
        own = compat.own_variables(self)
        # A loss scaler passes the variables of its scope, and needs their values in return.
        values = [v.value if isinstance(v, keras.Variable) else v for v in optimizer_variables]
        state = {id(v): value for v, value in zip(self.variables, values, strict=True)}
        if self._earlier:
            with PassScope(state.copy()):
                changed = self._earlier.after(grads, compat.known_variables(self))
            state.update({id(v): value for v, value in changed})
        trainable, base = self.base_optimizer.stateless_apply(
            optimizer_variables[len(own) :], grads, trainable_variables
        )
        return trainable, [*(state[id(v)] for v in own), *base]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Raise: the base optimizer runs updates, through `apply`."""
        require_step(None)

    def reset_logs(self) -> None:
        """Reset the logged means."""
        for variable in self._log_sums:
            variable.assign(keras.ops.zeros((), dtype=variable.dtype))

    # -- directions from earlier steps ------------------------------------------------------------

    def keep_gradients_of(self, kept_of: Callable[[Sequence[Any]], Sequence[bool]]) -> None:
        """Set the function that returns for which variables `Previous` keeps gradients."""
        self._kept_of = kept_of

    def has_direction(self) -> Any:
        """Return whether earlier steps provide an ascent direction, a boolean."""
        return self._earlier is not None and self._earlier.exists()

    def keeps(self, variable: Any) -> bool:
        """Return whether the direction from earlier steps, if there is one, has this variable."""
        return self._earlier is None or self._earlier.keeps(variable)

    def direction(self, variables: Sequence[Any]) -> list[Any]:
        """Return the ascent direction from earlier steps by variable, None where there is none."""
        return self._earlier.direction(variables) if self._earlier else [None] * len(variables)

    # -- the state after a step --------------------------------------------------------------------

    @property
    def count(self) -> Any:
        """The variable with the step count, on which masks depend. It is saved."""
        return compat.own_variables(self)[0]

    @property
    def report(self) -> StepReport | None:
        """The last step's `StepReport`, its arrays on their device; None before the first step."""
        return self._report

    def keep_report(self, report: StepReport) -> None:
        """Set the report of the last step."""
        self._report = report

    @property
    def log_variables(self) -> list[Any]:
        """The sums for the logged means; see `esam_keras.metrics.log_sums`."""
        return self._log_sums

    def __repr__(self) -> str:
        return f"ESAM({type(self.base_optimizer).__name__}, {self.config.summary()})"

    # -- saving -----------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return everything that `from_config` needs, including the base optimizer."""
        return {
            "name": self.name,
            "base_optimizer": keras.saving.serialize_keras_object(self.base_optimizer),
            "logs": self.logs,
            **self.config.to_dict(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "ESAM":
        """Return the optimizer described by `get_config`."""
        arguments = copy.deepcopy(config)  # Keras modifies its input
        base = keras.saving.deserialize_keras_object(
            arguments.pop("base_optimizer"), custom_objects=custom_objects
        )
        name, logs = arguments.pop("name"), arguments.pop("logs")
        read = ESAMConfig.from_dict(arguments)
        return cls(base, name=name, logs=logs, **{key: getattr(read, key) for key in arguments})

    def save_own_variables(self, store: Any) -> None:
        """Write ESAM's own variables; the base optimizer writes its own."""
        for i, variable in enumerate(compat.own_variables(self)):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Read the variables that `save_own_variables` wrote.

        Like Keras's optimizers, it warns and keeps its values if they are of another optimizer, or
        of none, as in a file with the weights of a model that was not compiled with an ESAM.

        Raises:
            ESAMValueError: the direction is of another model.
        """
        load_own(compat.own_variables(self), store, built=self.built)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all of `variables`, including the base optimizer's."""
        if len(weights) != len(self.variables):
            raise ESAMValueError(
                f"`weights` must be {len(self.variables)} arrays, one for each of `variables`. "
                f"Received: {len(weights)}."
            )
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)


def find_esam(optimizer: Any) -> ESAM | None:
    """Return the ESAM that an optimizer is or that a loss scaler wraps; else None."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, ESAM) else None
