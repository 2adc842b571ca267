"""The compared methods: a table of them, and one interface for their steps."""

from benchmarks.methods.registry import METHODS, Method, Schedule, parse_method
from benchmarks.methods.steppers import Losses, Stepper, make_stepper

__all__ = [
    "METHODS",
    "Losses",
    "Method",
    "Schedule",
    "Stepper",
    "make_stepper",
    "parse_method",
]
