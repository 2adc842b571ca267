"""Checks of base optimizers, and `SideBySide`, which combines several."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from esam_core import ESAMTypeError, ESAMValueError

__all__ = ["SideBySide", "check_base", "refuse_optimizer_class"]

_CLOSURE = "evaluates the loss again within its step, which would discard the perturbed gradient"
_SECOND = "needs second derivatives, but ESAM's gradient, computed at other weights, has no graph"
_FUSED = "updates within the backward, at the perturbed weights"
_SHARPNESS = (
    "is sharpness-aware itself and runs its own passes: pass ESAM the optimizer that it wraps"
)

#: Optimizers whose signature does not show what they need, by class name.
_REFUSED = {
    "LBFGS": _CLOSURE,
    "AliG": "needs the value of the loss within its step",
    "AdaHessian": _SECOND,
    "Adahessian": _SECOND,
    "SophiaH": _SECOND,
    "LOMO": _FUSED,
    "AdaLOMO": _FUSED,
    "ESAM": _SHARPNESS,
    "SAM": _SHARPNESS,
    "GSAM": _SHARPNESS,
    "BSAM": _SHARPNESS,
}


def check_base(base: Any) -> None:
    """Raise if an object cannot be a base optimizer; the message gives the reason.

    Raises:
        ESAMTypeError: it is not an optimizer, or it needs more than gradients.
    """
    if isinstance(base, type):
        raise ESAMTypeError(
            "`base_optimizer` must be an optimizer, not a class: "
            f"ESAM({base.__name__}(model.parameters(), ...), model). Received: {base!r}."
        )
    if not isinstance(base, torch.optim.Optimizer):
        raise ESAMTypeError(
            "`base_optimizer` must be a torch.optim.Optimizer, followed by the model: "
            f"ESAM(base_optimizer, model, rho=...). Received: {type(base).__name__}."
        )
    reason = _needs(base)
    if reason is not None:
        raise ESAMTypeError(f"`base_optimizer` must update from the gradients alone, but {reason}.")


def refuse_optimizer_class(first: Any, second: Any, options: dict[str, Any]) -> None:
    """Raise for the arguments of other SAM implementations: parameters and an optimizer class.

    Raises:
        ESAMTypeError: the message says what to write instead.
    """
    if isinstance(second, type) and issubclass(second, torch.optim.Optimizer):
        raise ESAMTypeError(
            "ESAM must be given an optimizer and the model: "
            f"base = torch.optim.{second.__name__}(model.parameters(), ...), "
            "then ESAM(base, model, rho=...). Pass the optimizer's options, such as `lr`, to the "
            f"optimizer. Received: ESAM({type(first).__name__}, "
            f"{second.__name__}{''.join(f', {name}=...' for name in options)})."
        )


def _needs(base: torch.optim.Optimizer) -> str | None:
    """Return, in words, what an optimizer or one inside it needs besides gradients, or None."""
    waiting, seen = [base], {id(base)}
    for optimizer in waiting:
        reason = _needs_itself(optimizer)
        if reason is not None:
            within = "" if optimizer is base else f" inside {type(base).__name__}"
            return f"{type(optimizer).__name__}{within} {reason}"
        for value in vars(optimizer).values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                if isinstance(inner, torch.optim.Optimizer) and id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append(inner)
    return None


def _needs_itself(base: torch.optim.Optimizer) -> str | None:
    """Return what an optimizer needs besides gradients, or None."""
    for cls in type(base).__mro__:
        if cls.__name__ in _REFUSED:
            return _REFUSED[cls.__name__]
    if hasattr(base, "first_step") and hasattr(base, "second_step"):
        return _SHARPNESS
    if hasattr(base, "fused_backward"):
        return _FUSED
    # Look at the class's method: a scheduler may have wrapped the instance's.
    _, *parameters = inspect.signature(type(base).step).parameters.values()
    if any(p.name == "hessian" for p in parameters):
        return _SECOND
    return _CLOSURE if any(_is_required(p) for p in parameters) else None


def _is_required(parameter: inspect.Parameter) -> bool:
    """Return whether this argument is required."""
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


class SideBySide(torch.optim.Optimizer):
    """Several optimizers as one, each with its own parameters of the same model.

    Its parameter groups are the same dictionary objects as theirs, in order. Schedulers, `ESAM` and
    gradient scalers see one optimizer.

    Args:
        *optimizers: two or more, with no parameter in common.

    Raises:
        ESAMTypeError: an argument is not an optimizer, or cannot be ESAM's base optimizer.
        ESAMValueError: there are fewer than two, or two have a parameter in common.

    Example:
        >>> import torch
        >>> from esam_torch import ESAM, SideBySide
        >>> model = torch.nn.Linear(4, 3)
        >>> base = SideBySide(
        ...     torch.optim.Muon([model.weight], lr=0.02),
        ...     torch.optim.AdamW([model.bias], lr=0.001),
        ... )
        >>> optimizer = ESAM(base, model)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.02, 0.001]
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        if len(optimizers) < 2:
            raise ESAMValueError(
                f"SideBySide needs two or more optimizers. Received: {len(optimizers)}."
            )
        for optimizer in optimizers:
            check_base(optimizer)
            if isinstance(optimizer, SideBySide):
                raise ESAMTypeError(
                    "`SideBySide` must not contain another one: pass all optimizers to it. "
                    f"Received: {optimizer!r}."
                )
        known = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
        if len(known) != len(set(known)):
            raise ESAMValueError(
                "The optimizers must have no parameter in common. Received: "
                f"{len(known) - len(set(known))} shared parameters."
            )
        self._optimizers = optimizers
        defaults: dict[str, Any] = {}
        for optimizer in reversed(optimizers):  # the first one's value wins where they differ
            defaults.update(optimizer.defaults)
        shared = set.intersection(*(set(optimizer.defaults) for optimizer in optimizers))
        for name in {"betas", "momentum"} - shared:  # schedulers would look for it in every group
            defaults.pop(name, None)
        self.__setstate__({"defaults": defaults})

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers."""
        return self._optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers, in order: the same dictionary objects, in a new list."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The state of all parameters: the same dictionary objects, in a new dictionary."""
        return {p: s for optimizer in self._optimizers for p, s in optimizer.state.items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise: only the user knows which optimizer a group belongs to."""
        raise ESAMTypeError(
            "A group must be added to one of the optimizers: "
            f"side_by_side.optimizers[0].add_param_group(...). Received: {sorted(param_group)}."
        )

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update with every optimizer."""
        if closure is not None:
            raise ESAMTypeError("SideBySide.step takes no closure.")
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)

    def train(self) -> None:
        """Call `train()` of the optimizers that have it."""
        for optimizer in self._optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()

    def eval(self) -> None:
        """Call `eval()` of the optimizers that have it."""
        for optimizer in self._optimizers:
            if hasattr(optimizer, "eval"):
                optimizer.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return {"optimizers": [the state dict of each optimizer]}."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        states = state_dict.get("optimizers", ())
        if len(states) != len(self._optimizers):
            raise ESAMValueError(
                f"`state_dict` must contain the states of {len(self._optimizers)} optimizers. "
                f"Received: {len(states)}."
            )
        rows = list(zip(self._optimizers, states, strict=True))
        for i, (optimizer, state) in enumerate(rows):  # check everything before changing anything
            own = [len(group["params"]) for group in optimizer.param_groups]
            saved = [len(group["params"]) for group in state["param_groups"]]
            if own != saved:
                raise ESAMValueError(
                    f"`state_dict` must fit the optimizers. Received: for optimizer {i}, groups of "
                    f"{saved} parameters instead of {own}."
                )
        for optimizer, state in rows:
            optimizer.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy: a scheduler's wrapper around `step` belongs to the original.
        state = self.__dict__.copy()
        state.pop("step", None)
        return state

    def __repr__(self) -> str:
        return f"SideBySide({', '.join(type(o).__name__ for o in self._optimizers)})"
