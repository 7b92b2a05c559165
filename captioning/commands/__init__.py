"""The commands of `python -m captioning`, a module each: its description, an `EXAMPLE`, `ARGUMENTS`, and the `WORK`.

`WORK` names the `module:function` that is called with the arguments. Its imports take seconds, so they wait until the
arguments are known to be right: these modules import nothing of it.
"""

import argparse
import os
from collections.abc import Callable


def existing_file(path: str) -> str:
    """Return the path of a file, as the `type` of an argument; an `ArgumentTypeError` if there is none."""
    if not os.path.exists(path) or os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"'{path}' is not a file")
    return path


def new_file(*endings: str) -> Callable[[str], str]:
    """Return the `type` of an argument that names a file to write, with one of these endings."""

    def check(path: str) -> str:
        if not path.lower().endswith(endings):
            raise argparse.ArgumentTypeError(f"'{path}' must end with {' or '.join(endings)}")
        if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
            raise argparse.ArgumentTypeError(f"'{path}' cannot be written: it is a folder, or its folder is missing")
        return path

    return check


def positive(text: str) -> int:
    """Return a whole number from 1, as the `type` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def frame(text: str) -> str:
    """Return which frame of an image is meant, as the `type` of an argument."""
    return text if text in ("middle", "all") else str(positive(text))
