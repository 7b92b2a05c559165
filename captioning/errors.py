"""The exceptions that end a command with one line, and how other errors become one."""

import difflib
import errno
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


# How libraries written in Rust and C++ say it, without an `errno`
DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "Not enough disk space")
MEMORY_FULL = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "No executable batch size")
# Instead of torch's message, which advises to run what the file brings
PICKLED = "a pickled file holds other things than tensors, could run code and is not read; take weights in safetensors"


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line: what is wrong, where, and the mend."""


class Stopped(BaseException):
    """A signal has stopped the command; the message is one line that says how to go on.

    Not an `Exception`, so that no library handles it as an error.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def printable(text: str, width: int | None = None) -> str:
    """Return text that is safe on a terminal: control and bidirectional characters are spaces, `width` is the most."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if width is None or len(shown) <= width else f"{shown[: width - 1]}…"


@contextmanager
def as_user_error(what: str, mend: str = "") -> Iterator[None]:
    """Turn any exception but a full disk into a `UserError`: `what`, the first line of its message, and the mend.

    For blocks that only read what the user named, on which libraries raise errors of many unrelated classes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{what}: {first_line(error).rstrip('.')}{'; ' if mend else ''}{mend}") from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from or while handling, each once: they may go round."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one of its causes, says that a disk or a quota is full."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(
        (isinstance(cause, OSError) and cause.errno in numbers) or any(text in str(cause) for text in DISK_FULL)
        for cause in causes(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of a GPU or of the machine is full."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in MEMORY_FULL)


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message, cut to 300 characters."""
    if isinstance(error, pickle.UnpicklingError):
        return PICKLED
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the most similar of the `known` names, or "" where none is similar."""
    # Cut, since the time grows with the product of the lengths
    near = difflib.get_close_matches(name[:200], list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near and near[0] != name else ""
