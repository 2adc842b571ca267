"""ESAM's options of parameter groups: "esam_rho", "esam_adaptive", "esam_perturb".

The prefix separates them from the base optimizer's options (Adadelta also has a "rho"). Like
learning rates, they may change at any time, so they are checked in every step.
"""

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch

from esam_core import ESAMTypeError, ESAMValueError, validation

__all__ = ["OPTIONS", "check_groups", "options_of", "without_options"]

#: The options that a group may set: the name, and the check of its value.
OPTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "esam_rho": validation.nonnegative,
    "esam_adaptive": validation.flag,
    "esam_perturb": validation.flag,
}


def check_groups(groups: Iterable[Mapping[str, Any]], known: Container[str]) -> None:
    """Raise for options that are unknown or have an invalid value.

    Args:
        groups: parameter groups.
        known: the names of the base optimizer's own options.

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
            elif f"esam_{name}" in OPTIONS and name not in known:
                raise ESAMTypeError(
                    f"`{name}` is not an option of a parameter group, and would have no effect: "
                    f"use `esam_{name}`, or delete it if it comes from another SAM's checkpoint. "
                    f"Received: {name}={value!r}."
                )


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return ESAM's options of a parameter group."""
    return {name: value for name, value in group.items() if name.startswith("esam_")}


@contextlib.contextmanager
def without_options(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Remove ESAM's options from an optimizer's groups inside the context.

    torch loads only options that the groups have before loading, and raises an error for those that
    the checkpoint does not have.
    """
    options = [options_of(group) for group in optimizer.param_groups]
    for group, own in zip(optimizer.param_groups, options, strict=True):
        for name in own:
            del group[name]
    try:
        yield
    finally:  # loading replaces the groups
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
