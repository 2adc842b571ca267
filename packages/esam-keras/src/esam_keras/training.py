"""ESAM's state for one compiled model: its units, its plans, and its training step."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import keras

from esam_core import ESAMRuntimeError, ESAMTypeError, ESAMValueError, NonFiniteError
from esam_core.directions import check_statistics, kept_units
from esam_core.reach import reach_warning, uses_costs
from esam_keras.backends import Backend, current_backend
from esam_keras.built import check_built, check_kept
from esam_keras.devices import on_the_host
from esam_keras.methods import has_own
from esam_keras.metrics import log_means
from esam_keras.noise import Noise
from esam_keras.optimizer import ESAM
from esam_keras.plan import Drawn, Plan, Planner
from esam_keras.prepared import Prepared, batch_size, build, first_axis, prepare
from esam_keras.report import step_report
from esam_keras.routes import check_row_counts
from esam_keras.scope import PassScope
from esam_keras.trial import predictions
from esam_keras.under_way import UnderWay, step_under_way, under_way
from esam_keras.units import is_stored, records_of, without_costs
from esam_keras.warning import warn_user

__all__ = ["Training", "train_step"]

#: The attribute in which a model keeps its `Training`.
ATTRIBUTE = "_esam_training"

Tensor = Any


class Training:
    """ESAM's part of a compiled model.

    Args:
        model: a model compiled with an ESAM.
        esam: this ESAM.
    """

    def __init__(self, model: keras.Model, esam: ESAM) -> None:
        self.model = model
        self.esam = esam
        self.backend: Backend = current_backend()
        self._prepared: Prepared | None = None
        self.has_run = False
        self.noise = Noise()
        self.updated = False
        #: The count at which earlier steps are known to provide a direction.
        self._directed_at: int | None = None

    @staticmethod
    def of(model: keras.Model) -> "Training":
        """Return a model's `Training`.

        Raises:
            ESAMRuntimeError: the model was not compiled with an ESAM.
        """
        found = vars(model).get(ATTRIBUTE)
        if found is None:
            raise ESAMRuntimeError(
                "The model must be compiled with an ESAM first: "
                "model.compile(optimizer=ESAM(...), loss=...). Received: a model "
                f"{'compiled with ' + repr(model.optimizer) if model.compiled else 'not compiled'}."
            )
        return found

    @staticmethod
    def logs_of(model: keras.Model) -> tuple[str, ...]:
        """Return the names of the logs that ESAM adds to a model; none without an ESAM."""
        found: Training | None = vars(model).get(ATTRIBUTE)
        return () if found is None else found.own_logs

    @property
    def trained(self) -> list[Any]:
        """The model's trained variables; see `Backend.trained`."""
        return self.backend.trained(self.model)

    # -- before the first step ---------------------------------------------------------------------

    def prepare(self, data: Any, state: Any = None) -> None:
        """Build everything that is not built, and run all checks before any weight changes.

        Args:
            data: a batch.
            state: the values of all variables if they are not in the variables (JAX), or None.
        """
        model, own = self.model, self.has_own_train_step
        before = self._prepared
        if before is not None and before.still_holds(self.trained, batch_size(data)):
            return
        if state is None:  # otherwise `fit` has built the model, and cleared the variables
            build(model, data, own_train_step=own)
        self.has_run, self.noise = False, Noise()
        self.backend.refuse(model)  # again: some layers are created when a model is built
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        trained = self.trained
        check_built(self.esam, trained, exactly=self.backend.updates_all)
        if not trained:
            warn_user("The model has no trainable weights: nothing is trained.")
        if trained and uses_costs(self.esam.config.perturb):
            self._find_costs(trained, data, state)
        planner = self._planner()
        check_kept(self.esam, trained, planner)
        if self.esam.config.rho > 0.0 and trained:
            short = reach_warning(self.esam.config.perturb, planner.units, planner.allowed)
            if short is not None:
                warn_user(short)
        with self.backend.checks_context(model):
            self._prepared = prepare(
                model,
                trained,
                self.esam.config,
                planner,
                data,
                state,
                own_train_step=own,
                context=functools.partial(self.backend.checks_context, model),
            )

    def _find_costs(self, trained: list[Any], data: Any, state: Any) -> None:
        """Find the costs of layers that Keras does not know; warn if they stay unknown."""
        if not without_costs(self.model, trained):
            return
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        # If the model cannot be called, the step says why.
        with self.backend.checks_context(self.model), suppress(Exception):
            predictions(self.model, x, batch_size(data), state)
        names = without_costs(self.model, trained)
        if names:
            warn_user(
                f"perturb={self.esam.config.perturb!r} uses the costs of layers. Those of "
                f"{', '.join(names)} are guesses, because no call with training=False runs their "
                "layers. To choose weights without costs, name a block (Suffix('head'))."
            )

    def _planner(self) -> Planner:
        """Return the planner for the model's trained variables."""
        trained = self.trained
        perturbable = [not is_stored(v) for v in trained]
        return Planner(self.esam.config, records_of(self.model, trained), perturbable)

    def find_kept(self, variables: Sequence[Any]) -> list[bool]:
        """Return for each variable whether `Previous` keeps its gradient."""
        config, trained = self.esam.config, self.trained
        if uses_costs(config.perturb) and without_costs(self.model, trained, recorded=False):
            return [True] * len(variables)  # a saved optimizer is built before shapes are known
        planner = self._planner()
        kept = kept_units(config.perturb, planner.units, planner.allowed, norm=config.norm)
        both = zip(trained, kept, strict=True)
        found = {id(v): keep and not is_stored(v) for v, keep in both}
        return [found.get(id(v), True) for v in variables]

    @property
    def prepared(self) -> Prepared:
        """The results of `prepare`.

        Raises:
            ESAMRuntimeError: `prepare` has not been called.
        """
        if self._prepared is None:
            raise ESAMRuntimeError("`prepare` must be called before a step.")
        return self._prepared

    # -- a step ------------------------------------------------------------------------------------

    def draw(self, count: int, data: Any, *, compiled: bool, state: Any = None) -> Drawn:
        """Return the drawn plan of a step on a batch.

        Args:
            count: the number of the ascent.
            data: the batch.
            compiled: whether the step is compiled for its plan.
            state: JAX's state where it is not in the variables, else None.
        """
        planner, b = self.prepared.planner, batch_size(data)
        if self.prepared.takes_rows and not self.has_own_train_step:
            check_row_counts(data)
        directed = not planner.needs_earlier or self._has_direction(count, state)
        drawn = planner.draw(count, b, compiled=compiled, directed=directed)
        if drawn.plan.active and self.prepared.has_statistics:
            check_statistics(self.esam.config.ascend, self.esam.config.select, b)
        return drawn

    def _has_direction(self, count: int, state: Any) -> bool:
        """Return whether earlier steps provide a direction.

        This waits for the device until there is one. Later it waits only if the count is not the
        expected one, as after loading a state.
        """
        if self._directed_at != count:
            values: dict[int, Any] = {}
            if state is not None:
                optimizer = zip(self.model.optimizer.variables, state[2], strict=True)
                values = {id(v): value for v, value in optimizer}
            with PassScope(values):
                if not bool(self.esam.has_direction()):
                    return False
        self._directed_at = count + 1
        return True

    @property
    def has_own_train_step(self) -> bool:
        """Whether the model has a `train_step` that is not Keras's."""
        return has_own(self.model, "train_step")

    def step(
        self, plan: Plan, inputs: dict[str, Tensor], *arguments: Any
    ) -> tuple[Any, dict[str, Any] | None]:
        """Run the drawn step, through the model's own `train_step` if it has one.

        Args:
            plan: the static part of the step.
            inputs: tensors by name.
            *arguments: the arguments of `train_step`.

        Returns:
            The result of `train_step`, and arrays for the report; None if it ran no step of ours.
        """
        run = functools.partial(self.backend.step, self, plan, inputs)
        if not self.has_own_train_step:
            return run(*arguments)
        with under_way(UnderWay(self, run, first_axis(arguments[-1]))) as step:
            return self.model.train_step(*arguments), step.report

    @contextmanager
    def counting(self, count: int) -> Iterator[None]:
        """Advance the count after a step, also after one that fails when it has made its update."""
        self.updated = False
        try:
            yield
        except BaseException:
            if self.updated:
                self._set_count(count + 1)
            raise
        self._set_count(count + 1)

    def _set_count(self, count: int) -> None:
        with on_the_host():
            self.esam.count.assign(count)

    def finish(self, count: int, drawn: Drawn, report: dict[str, Any] | None) -> None:
        """Keep the report of a step; raise if it was not finite and `on_nonfinite="raise"`."""
        if report is None:
            return
        planner = self.prepared.planner
        found = step_report(count, drawn, planner.units, planner.allowed, report)
        self.esam.keep_report(found)
        if found.skipped and self.esam.config.on_nonfinite == "raise":
            raise NonFiniteError(
                f"A loss or gradient of step {count} is not finite; weights and optimizer are as "
                'before the step. Use on_nonfinite="skip" to skip such steps.'
            )

    # -- logs --------------------------------------------------------------------------------------

    @property
    def own_logs(self) -> tuple[str, ...]:
        """The names of the logs that ESAM adds."""
        if not self.esam.logs:
            return ()
        config = self.esam.config
        if config.select.score == "increase" and config.select.gamma < 1.0:
            return ("sharpness", "sample_share")
        return ("sample_share",)

    def with_means(self, logs: dict[str, Any], sums: list[Tensor]) -> dict[str, Any]:
        """Return the logs together with the means."""
        for name in self.own_logs:
            if name in logs:
                raise ESAMValueError(
                    f"A metric must not be called {name!r}, which is one of ESAM's logs. Rename "
                    "it, or turn off ESAM's logs: ESAM(..., logs=False)."
                )
        return {**logs, **log_means(sums, self.own_logs)}


def train_step(model: keras.Model, *arguments: Any) -> Any:
    """Run one ESAM step of a compiled model, with the interface of Keras's `train_step`.

    Call it from your model's own `train_step`, where `super().train_step(...)` does the same, or in
    your own loop.

    Args:
        model: a model compiled with an ESAM.
        *arguments: the arguments of `train_step`: `data` on TensorFlow and torch, `state, data` on
            JAX. `data` is a batch (x, y) or (x, y, sample_weight).

    Returns:
        The result of `train_step`: `logs` on TensorFlow and torch, `(logs, state)` on JAX.

    Raises:
        ESAMRuntimeError: the model was not compiled with an ESAM, or the call is traced by a
            compiler other than `fit`'s, so that its mask would be fixed.
        ESAMTypeError: the arguments are not those of this backend.
        ESAMValueError: your own `train_step` changed the number of samples.

    Example:
        >>> import keras, numpy, esam_keras
        >>> class MyModel(keras.Sequential):
        ...     def train_step(self, *arguments):
        ...         return esam_keras.train_step(self, *arguments)
        >>> model = MyModel([keras.layers.Dense(1)])
        >>> model.compile(esam_keras.ESAM("sgd"), loss="mse")
        >>> history = model.fit(numpy.ones((8, 2)), numpy.ones((8, 1)), verbose=0)
        >>> "sharpness" in history.history
        True
    """
    training = Training.of(model)
    backend = training.backend
    if len(arguments) != len(backend.arguments):
        raise ESAMTypeError(
            f"`train_step` on {keras.backend.backend()} takes (model, "
            f"{', '.join(backend.arguments)}). Received: {len(arguments)} arguments after `model`."
        )
    step = step_under_way(training)
    if step is not None:
        return step.make(*arguments)
    if backend.is_tracing(*arguments):
        raise ESAMRuntimeError(
            "`esam_keras.train_step` draws a mask on the host for every step; compiled by your "
            "own `tf.function` or `jax.jit` it would repeat the first one forever. Use "
            "`model.fit` or `model.train_on_batch`, which compile it themselves, or call it "
            "uncompiled."
        )
    return backend.eager_step(training, *arguments)
