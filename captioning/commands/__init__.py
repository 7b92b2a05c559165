"""The commands of `python -m captioning`, a module each: its description, an `EXAMPLE`, `ARGUMENTS`, and the `WORK`.

`WORK` names the `module:function` that is called with the arguments. Its imports take seconds, so they wait until the
arguments are known to be right: these modules import nothing of it.
"""

import argparse
import os


def existing_file(path: str) -> str:
    """Return the path of a file, as the `type` of an argument; an `ArgumentTypeError` if there is none."""
    if not os.path.exists(path) or os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"'{path}' is not a file")
    return path
