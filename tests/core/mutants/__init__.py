"""Deliberately wrong steps, each with the name of the check that must catch it.

They are based on the reference, with one fault each, and test the kit: a fault that its check does
not catch would also go unnoticed in a backend. Plain SGD is one of them.
"""

from tests.core.mutants import (
    earlier,
    masks,
    nonfinite,
    observing,
    parts,
    passes,
    pending,
    perturbation,
    selection,
    sessions,
    single_weights,
    written,
)
from tests.core.mutants.registry import Mutant

__all__ = ["MUTANTS", "Mutant"]

#: All mutants.
MUTANTS: tuple[Mutant, ...] = tuple(
    mutant
    for module in (
        masks,
        single_weights,
        perturbation,
        selection,
        nonfinite,
        passes,
        written,
        parts,
        earlier,
        sessions,
        observing,
        pending,
    )
    for mutant in module.MUTANTS
)
