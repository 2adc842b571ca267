"""What is compared: a step of each method behind one face, and a table of the methods."""

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
