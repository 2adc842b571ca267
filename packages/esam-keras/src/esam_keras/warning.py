"""Warnings that point at the user's line."""

import os
import sys
import warnings

import keras

__all__ = ["warn_user"]

#: The folders of the code between a warning and the user's line. They end with a separator, since
#: other packages have names that start with "keras".
_FOLDERS = tuple(os.path.join(os.path.dirname(path), "") for path in (keras.__file__, __file__))


def warn_user(message: str) -> None:
    """Warn at the line that called Keras or this package.

    Python 3.11 cannot skip files; there the warning names the line that calls this function.
    """
    if sys.version_info >= (3, 12):
        warnings.warn(message, stacklevel=2, skip_file_prefixes=_FOLDERS)
    else:
        warnings.warn(message, stacklevel=2)
