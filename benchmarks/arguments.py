"""Argparse types that check values before anything is trained.

An argparse type converts the text of an option to its value. The parser reports its errors together
with the option's name.
"""

import argparse
import math
from collections.abc import Callable

import torch

from benchmarks.data.source import check_images
from benchmarks.methods import parse_method

__all__ = [
    *("at_least", "check_place", "count_number", "method_name", "not_negative", "open_share"),
    *("partial_share", "positive", "seed_number", "whole_share"),
]


def at_least(lowest: int) -> Callable[[str], int]:
    """Return the type of whole numbers >= `lowest`."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise _wrong(f"a whole number >= {lowest}", text)
        return value

    return whole


count_number = at_least(1)
seed_number = at_least(0)


def _wrong(must: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must be {must}. Received: {text}.")


def _number(text: str, must: str, holds: Callable[[float], bool]) -> float:
    """Return the number in a text, after checking it."""
    try:
        value = float(text)
    except ValueError:
        raise _wrong(must, text) from None
    if not (math.isfinite(value) and holds(value)):
        raise _wrong(must, text)
    return value


def not_negative(text: str) -> float:
    """Return a number >= 0."""
    return _number(text, "a number >= 0", lambda x: x >= 0)


def positive(text: str) -> float:
    """Return a number > 0."""
    return _number(text, "a number > 0", lambda x: x > 0)


def whole_share(text: str) -> float:
    """Return a number in (0, 1]."""
    return _number(text, "in (0, 1]", lambda x: 0 < x <= 1)


def open_share(text: str) -> float:
    """Return a number in (0, 1)."""
    return _number(text, "in (0, 1)", lambda x: 0 < x < 1)


def partial_share(text: str) -> float:
    """Return a number in [0, 1)."""
    return _number(text, "in [0, 1)", lambda x: 0 <= x < 1)


def check_place(parser: argparse.ArgumentParser, device: str, *data: str) -> None:
    """Exit with the parser's error unless the device and the named images are there."""
    try:
        torch.zeros(1, device=device)
        for name in data:
            check_images(name)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error))


def method_name(text: str) -> str:
    """Return a method's name, "NAME" or "NAME@RHO", after checking that it exists."""
    try:
        parse_method(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
