"""Checks that optimizers were built for the variables that a model trains."""

from collections.abc import Sequence
from typing import Any, NoReturn

from esam_core import ESAMRuntimeError
from esam_core.directions import kept_units
from esam_keras import compat
from esam_keras.optimizer import ESAM
from esam_keras.plan import Planner

__all__ = ["check_built", "check_kept"]


def check_built(esam: ESAM, trained: Sequence[Any], *, exactly: bool) -> None:
    """Raise if an ESAM or its base optimizer was not built for the trained variables.

    The base optimizer may have been built before, for another ESAM.

    Args:
        esam: built.
        trained: the variables that a step trains.
        exactly: whether the update needs a gradient for every variable of the optimizer (JAX).

    Raises:
        ESAMRuntimeError: a variable is unknown, or `exactly` and one that is known is not trained.
    """
    known = compat.known_variables(esam)
    of_base = compat.known_variables(esam.base_optimizer)
    for variables in (known, of_base or known):  # an optimizer of your own may not know them
        places = {id(v) for v in variables}
        for variable in trained:
            if id(variable) not in places:
                _refuse(f"a step that would train {variable.path}")
        if exactly and [id(v) for v in variables] != [id(v) for v in trained]:
            chosen = {id(v) for v in trained}
            frozen = [v.path for v in variables if id(v) not in chosen]
            _refuse(f"a step that would not train {frozen[0]}" if frozen else "another order")


def check_kept(esam: ESAM, trained: Sequence[Any], planner: Planner) -> None:
    """Raise if a mask may perturb a variable whose previous gradient the ESAM does not keep.

    Raises:
        ESAMRuntimeError: it does not.
    """
    config = esam.config
    needed = kept_units(config.perturb, planner.units, planner.allowed, norm=config.norm)
    for variable, may in zip(trained, needed, strict=True):
        if may and not esam.keeps(variable):
            _refuse(f"a step that may perturb {variable.path}, whose last gradient is not kept")


def _refuse(received: str) -> NoReturn:
    raise ESAMRuntimeError(
        "The model must be compiled again, with a new optimizer and base optimizer: they know only "
        "the weights that were trainable when they were built. Do so for another model, and after "
        f"freezing or unfreezing layers. Received: {received}."
    )
