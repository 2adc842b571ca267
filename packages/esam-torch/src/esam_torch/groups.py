"""ESAM's own options of a parameter group: "esam_rho", "esam_adaptive", "esam_perturb".

Their prefix keeps them apart from the base optimizer's (Adadelta has a "rho" of its own). They may
change at any time, as a learning rate does, so they are checked in every step.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from esam_core import ESAMTypeError, ESAMValueError, validation

__all__ = ["OPTIONS", "check_groups"]

#: What a group may set: the name, and the check of its value.
OPTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "esam_rho": validation.nonnegative,
    "esam_adaptive": validation.flag,
    "esam_perturb": validation.flag,
}


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse options that ESAM does not know, or whose value cannot be used.

    Raises:
        ESAMTypeError, ESAMValueError: naming the option, what must hold, and what came.
    """
    for group in groups:
        if group.get("maximize"):
            raise ESAMValueError(
                "`maximize` must be False: the perturbation climbs the losses, which are to be "
                "small. Return the negative of what is to be large. Received: maximize=True."
            )
        for name, value in group.items():
            if name in OPTIONS:
                OPTIONS[name](name, value)
            elif name.startswith("esam_"):
                raise ESAMTypeError(
                    f"`{name}` is not an option of a parameter group. Known: {', '.join(OPTIONS)}."
                )
