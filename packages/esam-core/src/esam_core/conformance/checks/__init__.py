"""All checks of the kit, by subject. Each is a plain function of an adapter."""

from esam_core.conformance.checks import (
    arguments,
    earlier,
    limits,
    masks,
    momentum,
    observing,
    parts,
    passes,
    perturbation,
    restoring,
    selection,
    single_weights,
    traces,
    updates,
    written,
)
from esam_core.conformance.checks.registry import Check, check, missing, needs_of

__all__ = ["CHECKS", "Check", "check", "missing", "needs_of"]

#: All checks by name, in the order of reports.
CHECKS: dict[str, Check] = {
    function.__name__: function
    for module in (
        observing,
        limits,
        masks,
        single_weights,
        perturbation,
        selection,
        passes,
        written,
        restoring,
        updates,
        parts,
        earlier,
        momentum,
        arguments,
        traces,
    )
    for function in module.CHECKS
}
