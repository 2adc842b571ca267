"""A count of registered modules: a step notices a changed model without searching it.

The hook is called by `model.layer = module`, `add_module`, `append`, and so on, of all models.
"""

from torch import nn

__all__ = ["registered_modules"]

_count = 0


def registered_modules() -> int:
    """Return how many modules have been registered in others, since this module was imported."""
    return _count


def _note(*_: object) -> None:
    """Count one more."""
    global _count
    _count += 1


nn.modules.module.register_module_module_registration_hook(_note)
