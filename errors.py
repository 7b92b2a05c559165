"""The one exception for a user's mistake, and how a command ends on it: one line on standard error, exit status 2."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user's; the message is one line: what is wrong, where, and the mend."""


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; a `UserError` ends the process with its line on standard error and exit status 2."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        # From a worker of a DataLoader it comes with the text of its trace before it
        message = " ".join(str(error).rsplit("UserError: ", 1)[-1].split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `... | head` has read enough; Python would say so again when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


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
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:300].rstrip('.')}" if lines else type(error).__name__
        raise UserError(f"{what}: {reason}{'; ' if mend else ''}{mend}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of the `known` names, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near and near[0] != name else ""
