"""A third-party backend of ESAM that uses only NumPy and the esam-core wheel.

It contains no derivatives. Every gradient is computed by complex steps,

    dL/dtheta_j = Im L(theta + i h e_j) / h,

which is exact up to rounding, and slow: one forward per scalar weight. It is an independent
implementation: it does not use esam-core's reference, and the kit compares the two.

    python -m esam_core.conformance outsider:adapter
"""

import numpy as np

from esam_core import ESAMConfig, ESAMValueError, Momentum, NonFiniteError, Previous, Unit
from esam_core.conformance.adapter import Observed
from esam_core.directions import check_statistics, climbing_indices, records_at_theta
from esam_core.problem import (
    BatchNorm,
    Carry,
    Conv,
    Conventions,
    Dense,
    Dropout,
    Embedding,
    GlobalMean,
    Relu,
    Tanh,
)
from esam_core.selectors import needs_losses, needs_perturbed_losses, select, subset_size

STEP = 1e-30


class Model:
    """A chain of layers. Arrays may be complex: it uses no |x|, max(x) or conjugate."""

    def __init__(self, problem, frozen, seed):
        self.layers = problem.layers
        self.theta, self.buffers, self.kinds = {}, {}, {}
        self.frozen = frozenset(frozen)
        for layer in self.layers:
            for role in ("weight", "bias"):
                if getattr(layer, role, None) is not None:
                    name = f"{layer.name}.{role}"
                    self.theta[name] = np.array(getattr(layer, role), dtype=float)
                    self.kinds[name] = {BatchNorm: "norm", Embedding: "embedding"}.get(
                        type(layer), role
                    )
            if isinstance(layer, Carry):
                self.buffers[f"{layer.name}.state"] = np.array(layer.state, dtype=float)
            if isinstance(layer, BatchNorm):
                self.buffers[f"{layer.name}.mean"] = np.array(layer.mean, dtype=float)
                self.buffers[f"{layer.name}.variance"] = np.array(layer.variance, dtype=float)
        self.noise = np.random.Generator(np.random.Philox(seed))
        self.found = self.buffers  # the state that all forwards of a step read

    def units(self):
        """Return the units for samplers."""
        order = [layer.name for layer in self.layers]
        names = [name for name in self.theta if name not in self.frozen]
        return [
            Unit(n, self.theta[n].shape, self.kinds[n], block, depth=order.index(block))
            for n in names
            for block in [n.rpartition(".")[0]]
        ]

    def losses(self, x, y, *, update=False, running=False):
        """Return one loss per sample."""
        for layer in self.layers:
            weight = self.theta.get(f"{layer.name}.weight")
            bias = self.theta.get(f"{layer.name}.bias", 0.0)
            match layer:
                case Dense():
                    x = x @ weight + bias
                case Conv():
                    windows = np.lib.stride_tricks.sliding_window_view(
                        x, weight.shape[:2], axis=(1, 2)
                    )
                    x = np.einsum("bijcuv,uvco->bijo", windows, weight) + bias
                case BatchNorm():
                    x = self.normalised(layer, x, update, running) * weight + bias
                case Carry():
                    name, mean = f"{layer.name}.state", x.mean(axis=tuple(range(x.ndim - 1)))
                    x = x + self.found[name]
                    if update:
                        self.buffers[name] = (self.found[name] + mean) / 2
                case Dropout():
                    x = x * (self.noise.random(x.shape) < 1 - layer.rate) / (1 - layer.rate)
                case Embedding():
                    x = weight[x]
                case Tanh():
                    x = np.tanh(x)
                case Relu():
                    x = np.where(x.real > 0, x, 0 * x)
                case GlobalMean():
                    x = x.mean(axis=tuple(range(1, x.ndim - 1)))
        x = x - x.real.max(axis=1, keepdims=True)
        return np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(y)), y]

    def normalised(self, layer, x, update, running):
        """Return BatchNorm's normalised input."""
        axes = tuple(range(x.ndim - 1))
        mean, variance = x.mean(axis=axes), ((x - x.mean(axis=axes)) ** 2).mean(axis=axes)
        old = self.buffers[f"{layer.name}.mean"], self.buffers[f"{layer.name}.variance"]
        if running:
            mean, variance = old
        elif update:
            n = x.size / x.shape[-1]
            for kept, new in zip(old, (mean, variance * n / (n - 1)), strict=True):
                kept += layer.momentum * (new - kept)
        return (x - mean) / np.sqrt(variance + layer.eps)

    def gradient(self, names, x, y, weights, **how):
        """Return the gradient of the weighted sum of losses, with one complex step per weight."""
        state, found = self.noise.bit_generator.state, {}
        for name in names:
            theta, g = self.theta[name], np.empty(self.theta[name].shape)
            for place in np.ndindex(theta.shape):
                self.theta[name] = theta.astype(complex)
                self.theta[name][place] += 1j * STEP
                self.noise.bit_generator.state = state
                g[place] = (weights @ self.losses(x, y, **how)).imag / STEP
            self.theta[name] = theta
            found[name] = g
        return found


class Session:
    """A training run."""

    def __init__(self, problem, base, esam, frozen, seed):
        self.model = Model(problem, frozen, seed)
        self.base = base
        self.config = None if esam is None else ESAMConfig.from_arguments(**esam)
        self.count = 0
        self.moments, self.updates, self.last = {}, 0, {}
        no_moment = base.kind == "sgd" and base.momentum == 0.0
        if self.config is not None and isinstance(self.config.ascend, Momentum) and no_moment:
            raise ESAMValueError(
                f"`ascend=Momentum()` must have a base with one. Received: {base}."
            )

    def step(self, batch, fault=None):
        """Run one step; if it raises, restore everything."""
        if len(batch.targets) == 0:
            raise ESAMValueError("The batch must contain at least one sample. Received: 0.")
        model = self.model
        theta = dict(model.theta)  # arrays are replaced, never changed in place
        buffers = model.found = {name: a.copy() for name, a in model.buffers.items()}
        state = model.noise.bit_generator.state
        passes = []

        def evaluate(x, y, **how):
            model.noise.bit_generator.state = state
            losses = model.losses(x, y, **how)
            passes.append(len(losses))
            if fault is not None and fault.call == len(passes):
                raise fault.error
            return losses

        done = False
        try:
            with np.errstate(all="ignore"):
                seen, gradient = self.passes(batch, evaluate, state)
            mode = "propagate" if self.config is None else self.config.on_nonfinite
            numbers = [seen["losses"], seen.get("perturbed_losses"), *gradient.values()]
            finite = all(np.isfinite(a).all() for a in numbers if a is not None)
            if mode == "raise" and not finite:
                raise NonFiniteError("A loss or gradient is not finite.")
            done = True
        finally:
            model.theta = theta
            if not done:
                model.buffers = buffers
                model.noise.bit_generator.state = state
        if mode == "skip" and not finite:
            model.buffers, gradient = buffers, {}
        self.count += 1
        if gradient:
            self.update(gradient)
        return Observed(**seen, gradient=gradient, passes=tuple(passes))

    def direction(self, b):
        """Return the samples of the ascent pass, and the direction from earlier steps."""
        config = self.config
        if config is None or config.rho == 0.0:
            return np.arange(0), {}
        past = {Previous: self.last, Momentum: {n: m for n, (m, _) in self.moments.items()}}
        left = past.get(type(config.ascend), {})
        part = climbing_indices(config.ascend, b, seed=config.seed, count=self.count)
        return part, {name: config.ascend.sign * g for name, g in left.items()}

    def passes(self, batch, evaluate, state):
        """Return the observations, and the gradient for the base optimizer."""
        model, x, y, b = self.model, batch.inputs, batch.targets, len(batch.targets)
        units, config = model.units(), self.config
        names = [unit.name for unit in units]
        part, past = self.direction(b)
        mask = None
        if len(part) or past:
            mask = config.perturb.draw(units, seed=config.seed, count=self.count)

        def gradient(which, x, y, weights, **how):
            after = model.noise.bit_generator.state
            model.noise.bit_generator.state = state
            found = model.gradient(which, x, y, weights, **how)
            model.noise.bit_generator.state = after
            return found

        if mask is None or not mask.active:
            losses = evaluate(x, y, update=True)
            shown = {"losses": losses, "perturbed": (), "perturbation_norm": 0.0}
            return shown, gradient(names, x, y, np.full(b, 1.0 / b))

        if any(isinstance(layer, BatchNorm) for layer in model.layers):
            check_statistics(config.ascend, config.select, b)
        scale = dict(zip(names, mask.scale, strict=True))
        perturbed = tuple(name for name in names if scale[name])
        needed = names if config.norm == "full" else perturbed
        at_theta = records_at_theta(config.ascend, config.select, b)
        losses, scored = np.full(b, np.nan), needs_losses(config.select, b)
        g = {name: past[name] for name in needed if name in past}
        if len(part):
            how = {"running": len(part) == 1 < b}
            losses[part] = evaluate(x[part], y[part], update=at_theta, **how)
            after = model.noise.bit_generator.state
            g = gradient(needed, x[part], y[part], np.full(len(part), 1.0 / len(part)), **how)
        rest = np.setdiff1d(np.arange(b), part)
        if scored and len(rest):
            how = {"running": len(rest) == 1 < b}
            losses[rest] = evaluate(x[rest], y[rest], update=at_theta and not len(part), **how)
            after = model.noise.bit_generator.state if not len(part) else after
        known = np.arange(b) if scored else part
        length, epsilon = self.perturbation(g, {name: scale[name] for name in g})
        usable = bool(np.isfinite(length))
        finite = usable and np.isfinite(losses[known]).all()
        epsilon = {name: mask.rho_factor * e for name, e in epsilon.items()}
        for name, e in epsilon.items():
            model.theta[name] = model.theta[name] + (e if usable else 0.0)

        peak, k = None, subset_size(config.select.gamma, b)
        if needs_perturbed_losses(config.select, b):
            peak = evaluate(x, y)
        kept = select(config.select, losses, peak, seed=config.seed, count=self.count)
        hidden = np.nan if not finite or (peak is not None and not np.isfinite(peak).all()) else 1.0
        chosen = x[kept.indices], y[kept.indices]
        # The descent pass; its gradient needs many more forwards.
        alone = k == 1 < b
        low = evaluate(*chosen, running=alone, update=not at_theta)
        descent = gradient(names, *chosen, kept.weights * hidden, running=alone)
        if at_theta:
            model.noise.bit_generator.state = after
        size = np.sqrt(sum(np.sum(e**2) for e in epsilon.values())) if usable else 0.0
        shown = {
            "losses": losses[known] if len(known) else None,
            "perturbed_losses": peak if len(known) else low,
            "indices": kept.indices if k < b else None,
            "sample_weights": kept.weights if k < b else None,
            "perturbed": perturbed,
            "perturbation_norm": float(size),
            "gradient_norm": float(length),
            "part": part if 0 < len(part) < b else None,
        }
        return shown, descent

    def perturbation(self, g, scale):
        """Return ||g|| and epsilon, as in the documentation's table of phases."""
        config, theta = self.config, self.model.theta
        stretch = {n: np.abs(theta[n]) if config.adaptive else 1.0 for n in g}
        share = {n: scale[n] if config.norm == "estimated" else 1.0 for n in g}
        length = np.sqrt(sum(share[n] * np.sum((stretch[n] * g[n]) ** 2) for n in g))
        divisor = 1.0 if config.norm == "none" else length + config.norm_eps
        if config.norm == "none":
            length = np.sqrt(sum(np.sum((stretch[n] * g[n]) ** 2) for n in g if scale[n]))
        return length, {
            n: scale[n] * config.rho * stretch[n] ** 2 * g[n] / divisor for n in g if scale[n]
        }

    def update(self, gradient):
        """Run the base optimizer's update."""
        base, self.updates, self.last = self.base, self.updates + 1, dict(gradient)
        for name, g in gradient.items():
            theta = self.model.theta[name]
            m, v = self.moments.get(name, (0.0, 0.0))
            if base.kind == "sgd":
                g = g + base.weight_decay * theta
                m = base.momentum * m + g
                direction = g + base.momentum * m if base.nesterov else m
            else:
                first, second = base.betas
                m, v = first * m + (1 - first) * g, second * v + (1 - second) * g**2
                m_hat, v_hat = m / (1 - first**self.updates), v / (1 - second**self.updates)
                direction = m_hat / (np.sqrt(v_hat) + base.eps)
                if base.kind == "adamw":
                    direction = direction + base.weight_decay * theta
            self.moments[name] = (m, v)
            self.model.theta[name] = theta - base.lr * direction

    def weights(self):
        """Return copies of the parameters."""
        return {name: a.copy() for name, a in self.model.theta.items()}

    def buffers(self):
        """Return copies of the running statistics."""
        return {name: a.copy() for name, a in self.model.buffers.items()}

    def trainable(self):
        """Return which parameters are trained."""
        return {name: name not in self.model.frozen for name in self.model.theta}

    def random_probe(self):
        """Return the position of the noise's generator."""
        state = self.model.noise.bit_generator.state
        return np.append(state["state"]["counter"], state["buffer_pos"])


class Adapter:
    """The adapter for the kit."""

    name = "outsider"
    dtypes = ("float64",)
    conventions = Conventions()
    gaps = {  # noqa: RUF012 - a constant, as in the protocol
        "backward": "a step includes its update",
        "state": "nothing is saved",
        "groups": "all parameters have the same settings",
        "weight_masks": "masks of single weights are not implemented",
    }

    def session(self, problem, base, esam, *, dtype, frozen=(), groups=None, seed=0):
        """Return a training run."""
        return Session(problem, base, esam, frozen, seed)


adapter = Adapter()
