"""The adapter of esam-keras for the conformance kit, on Keras's current backend.

KERAS_BACKEND=jax python -m esam_core.conformance esam_keras.conformance:adapter
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from esam_core.conformance.adapter import Fault, Observed
from esam_core.problem import (
    Base,
    Batch,
    BatchNorm,
    Carry,
    Conv,
    Conventions,
    Dense,
    Dropout,
    Embedding,
    GlobalMean,
    Layer,
    Problem,
    Tanh,
)
from esam_keras.optimizer import ESAM
from esam_keras.training import Training

__all__ = ["KerasAdapter", "KerasSession", "adapter"]

Array = NDArray[Any]

#: The kit's names of variables, by Keras's names.
_ROLES = {
    "kernel": "weight",
    "gamma": "weight",
    "embeddings": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "variance",
    "state": "state",
}


class _GlobalMean(keras.layers.Layer):
    """Mean over every axis between the first and the last."""

    def call(self, x: Any) -> Any:
        return ops.mean(x, axis=tuple(range(1, len(x.shape) - 1)))


class _Carry(keras.layers.Layer):
    """Adds a variable to its input; each call moves it halfway to the mean of the input."""

    def build(self, input_shape: Any) -> None:
        self.state = self.add_weight(
            shape=input_shape[-1:], initializer="zeros", trainable=False, name="state"
        )

    def call(self, x: Any) -> Any:
        y = x + self.state
        self.state.assign((self.state + ops.mean(x, axis=0)) / 2)
        return y


class _Watch(keras.layers.Layer):
    """Returns its input, records each pass's number of samples, and raises the kit's faults."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.passes: list[int] = []
        self.fault: Fault | None = None

    def watch(self, fault: Fault | None) -> None:
        """Forget earlier passes, and set the fault."""
        self.__dict__["passes"] = []
        self.__dict__["fault"] = fault

    def call(self, x: Any) -> Any:
        self.passes.append(x.shape[0])
        if self.fault is not None and self.fault.call == len(self.passes):
            raise self.fault.error
        return x


@contextmanager
def _floatx(dtype: str) -> Iterator[None]:
    """Let Keras compute in a dtype inside the context."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(policy)


def _layer(layer: Layer, dtype: str, seed: int) -> keras.layers.Layer:
    """Return a layer of the kit as a Keras layer, without its weights."""
    common = {"name": layer.name, "dtype": dtype}
    if isinstance(layer, Dense):
        return keras.layers.Dense(layer.weight.shape[1], use_bias=layer.bias is not None, **common)
    if isinstance(layer, Conv):
        height, width, _, filters = layer.weight.shape
        return keras.layers.Conv2D(
            filters, (height, width), use_bias=layer.bias is not None, **common
        )
    if isinstance(layer, BatchNorm):
        return keras.layers.BatchNormalization(
            momentum=1.0 - layer.momentum, epsilon=layer.eps, **common
        )
    if isinstance(layer, Carry):
        return _Carry(**common)
    if isinstance(layer, Embedding):
        return keras.layers.Embedding(*layer.weight.shape, **common)
    if isinstance(layer, Dropout):
        return keras.layers.Dropout(layer.rate, seed=seed, **common)
    if isinstance(layer, GlobalMean):
        return _GlobalMean(**common)
    return keras.layers.Activation("tanh" if isinstance(layer, Tanh) else "relu", **common)


def _base(base: Base) -> keras.optimizers.Optimizer:
    """Return Keras's own optimizer with the kit's settings.

    They are NumPy numbers: Keras converts Python numbers to float32 before float64.
    """
    number = np.float64
    if base.kind == "sgd":
        return keras.optimizers.SGD(
            number(base.lr),
            momentum=number(base.momentum),
            nesterov=base.nesterov,
            weight_decay=number(base.weight_decay) if base.weight_decay else None,
        )
    beta_1, beta_2 = map(number, base.betas)
    settings = {"beta_1": beta_1, "beta_2": beta_2, "epsilon": number(base.eps)}
    if base.kind == "adam":
        return keras.optimizers.Adam(number(base.lr), **settings)
    decay = number(base.weight_decay)
    return keras.optimizers.AdamW(number(base.lr), weight_decay=decay, **settings)


class KerasSession:
    """A training run; see `esam_core.conformance.adapter.Session` for the methods."""

    def __init__(
        self,
        model: keras.Model,
        watch: _Watch,
        base: keras.optimizers.Optimizer,
        esam: Mapping[str, Any] | None,
        *,
        dtype: str,
        run_eagerly: bool,
    ) -> None:
        self.model = model
        self.watch = watch
        self.dtype = dtype
        self.given: dict[str, Array] = {}
        self.esam = None if esam is None else ESAM(base, **esam)
        self.names = {
            v.path: f"{layer.name}.{_ROLES[v.name]}"
            for layer in model.layers
            for v in layer.weights
            if v.name in _ROLES
        }
        self._record(base)
        model.compile(
            optimizer=base if self.esam is None else self.esam,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype),
            run_eagerly=run_eagerly,
            jit_compile=not run_eagerly and keras.backend.backend() == "jax",
        )
        model.optimizer.build(model.trainable_variables)

    def _record(self, base: keras.optimizers.Optimizer) -> None:
        """Let the base optimizer record its gradients."""
        original = base.apply

        def apply(grads: Any, trainable_variables: Any = None) -> None:
            variables = trainable_variables or self.model.trainable_variables
            if self.model.run_eagerly:
                self.given = {
                    self.names[v.path]: self._array(ops.convert_to_tensor(g))
                    for g, v in zip(grads, variables, strict=True)
                }
            original(grads, trainable_variables)

        vars(base)["apply"] = apply

    def step(self, batch: Batch, fault: Fault | None = None) -> Observed:
        """Run one whole training step with `train_on_batch`."""
        inputs = np.array(batch.inputs)
        inputs = inputs.astype(self.dtype if inputs.dtype.kind == "f" else "int32")
        targets = np.array(batch.targets)
        with _floatx(self.dtype):
            if self.esam is not None:
                # Building is not a pass of a step.
                Training.of(self.model).prepare((inputs, targets))
            self.watch.watch(fault)
            # Otherwise Keras would rewrite the message of the kit's error.
            filtering = keras.config.is_traceback_filtering_enabled()
            keras.config.disable_traceback_filtering()
            try:
                loss = self.model.train_on_batch(inputs, targets)
            finally:
                if filtering:
                    keras.config.enable_traceback_filtering()
        if self.esam is None:
            return Observed(losses=np.full(len(targets), loss))
        report = self.esam.report
        if report is None:
            return Observed()
        return Observed(
            losses=self._array(report.losses),
            perturbed_losses=self._array(report.perturbed_losses),
            indices=self._array(report.indices),
            sample_weights=self._array(report.sample_weights),
            part=self._array(report.part),
            perturbed=tuple(self.names[path] for path in report.perturbed),
            perturbation_norm=float(report.perturbation_norm),
            gradient_norm=None if report.gradient_norm is None else float(report.gradient_norm),
            gradient=self.given,
            passes=tuple(self.watch.passes),
        )

    @staticmethod
    def _array(tensor: Any) -> Array:
        """Return a copy of a tensor; None stays None."""
        return None if tensor is None else np.array(ops.convert_to_numpy(tensor))  # type: ignore[return-value]

    def _arrays(self, roles: Collection[str]) -> dict[str, Array]:
        """Return copies of the variables with one of the kit's roles."""
        found = {self.names[v.path]: v for v in self.model.variables if v.path in self.names}
        return {
            name: self._array(v.value)
            for name, v in found.items()
            if name.rpartition(".")[2] in roles
        }

    def weights(self) -> dict[str, Array]:
        """Return copies of all parameters."""
        return self._arrays(("weight", "bias"))

    def buffers(self) -> dict[str, Array]:
        """Return copies of all running statistics and carried states."""
        return self._arrays(("mean", "variance", "state"))

    def trainable(self) -> dict[str, bool]:
        """Return whether each parameter is trained."""
        trained = {v.path for v in self.model.trainable_variables}
        return {
            name: path in trained
            for path, name in self.names.items()
            if name.rpartition(".")[2] in ("weight", "bias")
        }

    def state(self) -> Any:
        """Return the contents of a checkpoint."""
        return (
            [self._array(v.value) for v in self.model.variables],
            [self._array(v.value) for v in self.model.optimizer.variables],
        )

    def load(self, state: Any) -> None:
        """Load a state that `state` returned."""
        groups = (self.model.variables, self.model.optimizer.variables)
        for variables, values in zip(groups, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def random_probe(self) -> Array:
        """Return the states of the model's seed generators."""
        seeds = [
            self._array(v.value).ravel()
            for v in self.model.non_trainable_variables
            if v.path not in self.names
        ]
        return np.concatenate([np.zeros(0), *seeds])

    def _not_apart(self, *_: Any) -> Any:
        """Raise: Keras's step cannot be split, which is a declared gap."""
        raise NotImplementedError(GAPS["backward"])

    backward: Callable[..., Any] = _not_apart
    gradients: Callable[..., Any] = _not_apart
    zero_gradients: Callable[..., Any] = _not_apart
    apply: Callable[..., Any] = _not_apart


GAPS = {
    "backward": "Keras's training step computes gradients and update together",
    "groups": "Keras's optimizers have no parameter groups; use `Only` and other samplers",
}


class KerasAdapter:
    """esam-keras as a backend of the kit.

    Args:
        run_eagerly: whether the steps run uncompiled, with all capabilities, or compiled. Default
            True.
    """

    conventions = Conventions(
        unbiased_running_variance=False,
        decoupled_sgd_decay=True,
        adam_eps_in_corrected_root=False,
    )

    def __init__(self, run_eagerly: bool = True) -> None:
        backend = keras.backend.backend()
        self.run_eagerly = run_eagerly
        self.name = f"esam-keras on {backend}, {'eager' if run_eagerly else 'compiled'}"
        # Keras computes in float64 only on TensorFlow: other backends convert it to float32.
        wide = ("float64", "float32")
        self.dtypes: tuple[str, ...] = wide if backend == "tensorflow" else ("float32",)
        self.gaps: Mapping[str, str] = dict(GAPS)
        if not run_eagerly:
            compiled = "the step is compiled: Python code runs in it only during tracing"
            self.gaps = {**GAPS, "faults": compiled, "passes": compiled, "gradient": compiled}

    def session(
        self,
        problem: Problem,
        base: Base,
        esam: Mapping[str, Any] | None,
        *,
        dtype: str,
        frozen: Collection[str] = (),
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> KerasSession:
        """Build a run; see `esam_core.conformance.adapter.Adapter.session`."""
        inputs = problem.batches[0].inputs
        with _floatx(dtype):
            watch = _Watch(name="watch", dtype=dtype)
            model = keras.Sequential(
                [
                    keras.Input(
                        inputs.shape[1:], dtype=dtype if inputs.dtype.kind == "f" else "int32"
                    ),
                    *(_layer(layer, dtype, seed) for layer in problem.layers),
                    watch,
                ]
            )
            for layer in problem.layers:
                native = model.get_layer(layer.name)
                for variable in native.weights:
                    role = _ROLES.get(variable.name)
                    if role is not None:
                        variable.assign(getattr(layer, role))
                if any(name.startswith(f"{layer.name}.") for name in frozen):
                    native.trainable = False
            return KerasSession(
                model, watch, _base(base), esam, dtype=dtype, run_eagerly=self.run_eagerly
            )


#: esam-keras, uncompiled, on Keras's current backend.
adapter = KerasAdapter()
