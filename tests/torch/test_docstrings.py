"""What is public has an example in its docstring; the examples themselves run as doctests."""

import inspect

import esam_torch
from esam_torch import ESAM


def documented():
    """Yield the functions and classes of this package, and the methods of `ESAM`."""
    for name in esam_torch.__all__:
        found = getattr(esam_torch, name)
        if callable(found) and found.__module__.startswith("esam_torch"):
            yield name, found
    for name, method in inspect.getmembers(ESAM, inspect.isfunction):
        if name in vars(ESAM) and not name.startswith("_"):
            yield f"ESAM.{name}", method


def test_public_names_have_an_example():
    obvious = ["ESAM.zero_grad"]
    without = [name for name, found in documented() if "Example:" not in (found.__doc__ or "")]
    assert without == obvious
