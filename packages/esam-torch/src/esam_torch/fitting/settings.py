"""The settings of a training run, compared when it resumes.

Loading a checkpoint replaces what code sets, so that a changed setting would have no effect. What
code sets is noted before training: later, schedulers may have changed it.
"""

import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from esam_core import ESAMValueError
from esam_core.config import component_from_dict
from esam_torch.bases import SideBySide
from esam_torch.lookups import length_of
from esam_torch.optimizer import ESAM
from esam_torch.spending import CHOSEN

__all__ = ["check_data", "check_settings", "data_of", "settings_of", "trained"]

#: A setting that is not there.
_NONE = "null"

#: Optimizers that `fit` has trained: their options are no longer those that code has set.
trained: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()


def settings_of(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, str]:
    """Return the settings that a checkpoint would replace, in JSON, by name."""
    found: dict[str, Any] = {"`optimizer`": _kind(optimizer), "`scheduler`": _kind(scheduler)}
    if isinstance(optimizer, ESAM):
        chosen = () if optimizer.budget is None else CHOSEN
        own = optimizer.config.to_dict()
        found |= {f"`{name}`": value for name, value in own.items() if name not in chosen}
        found["`budget`"] = optimizer.budget
    for i, group in enumerate(optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        found |= {f"`{name}` of parameter group {i}": value for name, value in options.items()}
    if scheduler is not None:
        state = scheduler.state_dict()
        found |= {f"`{name}` of the scheduler": value for name, value in state.items()}
    texts = {name: _text(value) for name, value in found.items()}
    return {name: text for name, text in texts.items() if text is not None}


def data_of(loader: Any, accumulate: int) -> dict[str, Any]:
    """Return what determines which samples an update uses, by name."""
    data = getattr(loader, "dataset", None)
    return {
        "`accumulate`": accumulate,
        "`len(loader)`": length_of(loader),
        "`loader.batch_size`": getattr(loader, "batch_size", None),
        "`len(loader.dataset)`": length_of(data),
        "the class of `loader.sampler`": _kind(getattr(loader, "sampler", None)),
    }


def check_settings(saved: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raise if a checkpoint would replace settings of the code; the message lists them."""
    # torch adds options to its optimizers; only ours mean something by being there.
    names = [n for n in {**saved, **given} if (n in saved and n in given) or n.startswith("`esam_")]
    pairs = {n: (saved.get(n, _NONE), given.get(n, _NONE)) for n in names}
    changed = {n: (_shown(old), _shown(new)) for n, (old, new) in pairs.items() if old != new}
    if changed:
        raise ESAMValueError(
            "A run must resume with its own settings: the checkpoint's would replace those in "
            f"code. Received: {_listed(changed)}. For a run with the new settings, use another "
            "`folder`, or resume=False, which overwrites this run."
        )


def check_data(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise if an epoch would resume with other batches; the message lists the differences."""
    changed = {n: (saved[n], given[n]) for n in given if saved[n] != given[n]}
    if changed:
        raise ESAMValueError(
            "An interrupted epoch must resume with the same batches: the checkpoint counts those "
            f"that are done. Received: {_listed(changed)}. Finish the epoch with the checkpoint's "
            "values, or use another `folder`, or resume=False, which overwrites this run."
        )


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the old and the new values in words."""
    return "; ".join(f"{n}: {a} in the checkpoint, {b} in code" for n, (a, b) in changed.items())


def _shown(text: str) -> str:
    """Return a setting as it is written in code."""
    value = json.loads(text)
    return repr(
        component_from_dict(value) if isinstance(value, dict) and "name" in value else value
    )


def _kind(part: Any) -> str | None:
    """Return the class of a part of the run, with those of the optimizers inside."""
    if isinstance(part, ESAM):
        return f"ESAM({_kind(part.base_optimizer)})"
    if isinstance(part, SideBySide):
        return repr(part)
    return None if part is None else type(part).__name__


def _text(value: Any) -> str | None:
    """Return a value in JSON; None if it is not data but a function or another object."""
    try:
        return json.dumps(value, default=lambda x: x.tolist())  # tensors, and NumPy's numbers
    except (TypeError, ValueError, AttributeError):
        return None
