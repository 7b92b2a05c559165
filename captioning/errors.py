"""The one exception for what the user can mend, and how a command ends on it: one line on standard error, status 2."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


MAX_NAME = 200  # characters of a name that is compared with those that exist: `difflib` takes time by the product


class UserError(ValueError):
    """A mistake of the user's; the message is one line: what is wrong, where, and the mend."""


class Stopped(UserError):
    """The run was told to stop, and did, in order.

    Args:
        message: the line.
        exit_status: of the process, 128 + the signal as shells count.
    """

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


def printable(text: str, width: int | None = None) -> str:
    """Return text from a file or from the network so that it is safe to show on a terminal.

    Control characters and those that change the direction of writing become spaces; more than `width` is cut.
    """
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if width is None or len(shown) <= width else f"{shown[: width - 1]}…"


@contextmanager
def as_user_error(what: str, mend: str = "") -> Iterator[None]:
    """Turn any exception of the block into a `UserError`: `what`, the first line of its message, the mend.

    For blocks that only read what the user named: torch, transformers and pyarrow raise errors of many unrelated
    classes on a damaged file or an impossible value.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error).rstrip('.')}{'; ' if mend else ''}{mend}") from error


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message, cut."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of the `known` names, or an empty string if none is near."""
    near = difflib.get_close_matches(name[:MAX_NAME], list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near and near[0] != name else ""
