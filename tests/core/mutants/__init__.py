"""Deliberately wrong steps, each with the name of the check that must catch it.

They are built on the reference, one fault each, and test the kit: a defect that passes the check
made for it would pass in a backend too. Plain SGD is among them.
"""

from tests.core.mutants import (
    earlier,
    masks,
    parts,
    passes,
    perturbation,
    selection,
    sessions,
    written,
)
from tests.core.mutants.registry import Mutant

__all__ = ["MUTANTS", "Mutant"]

#: Every mutant.
MUTANTS: tuple[Mutant, ...] = tuple(
    mutant
    for module in (masks, perturbation, selection, passes, written, parts, earlier, sessions)
    for mutant in module.MUTANTS
)
