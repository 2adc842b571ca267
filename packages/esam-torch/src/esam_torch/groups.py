"""ESAM's options of parameter groups: "esam_rho", "esam_adaptive", "esam_perturb".

The prefix separates them from the base optimizer's options (Adadelta also has a "rho"). Like
learning rates, they may change at any time, so they are checked in every step.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from esam_core import ESAMTypeError, ESAMValueError, validation

__all__ = ["OPTIONS", "check_groups"]

#: The options that a group may set: the name, and the check of its value.
OPTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "esam_rho": validation.nonnegative,
    "esam_adaptive": validation.flag,
    "esam_perturb": validation.flag,
}


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for options that are unknown or have an invalid value.

    Raises:
        ESAMTypeError, ESAMValueError: an option is invalid; the message names it, the requirement
            and the value received.
    """
    for group in groups:
        if group.get("maximize"):
            raise ESAMValueError(
                "`maximize` must be False: ESAM perturbs in the direction that increases the "
                "losses, and minimises them. To maximise a value, return its negative. Received: "
                "maximize=True."
            )
        for name, value in group.items():
            if name in OPTIONS:
                OPTIONS[name](name, value)
            elif name.startswith("esam_"):
                raise ESAMTypeError(
                    f"`{name}` is not an option of a parameter group. Known: {', '.join(OPTIONS)}."
                )
