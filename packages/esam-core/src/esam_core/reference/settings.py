"""Settings of single parameters."""

from collections.abc import Collection, Mapping
from typing import Any

from esam_core import validation

__all__ = ["checked_settings"]

_CHECKS = {
    "rho": validation.nonnegative,
    "adaptive": validation.flag,
    "perturb": validation.flag,
}


def checked_settings(
    settings: Mapping[str, Mapping[str, Any]], parameters: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Return the settings of single parameters, validated.

    Args:
        settings: parameter name -> "rho", "adaptive" or "perturb".
        parameters: the names of the model's parameters.

    Raises:
        ESAMValueError, ESAMTypeError: a name, a key or a value is invalid; the message names it.

    Example:
        >>> checked_settings({"head.weight": {"rho": 1}}, ["head.weight"])
        {'head.weight': {'rho': 1.0}}
    """
    for name, own in settings.items():
        validation.choice("settings", name, parameters)
        for key in own:
            validation.choice(f"settings[{name!r}]", key, _CHECKS)
    return {
        name: {key: _CHECKS[key](key, value) for key, value in own.items()}
        for name, own in settings.items()
    }
