"""The one exception for what the user can mend, and how a command ends on it: one line on standard error, status 2."""

import difflib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


MAX_LINE = 2000  # characters of an error on the terminal; what it quotes of a file may be of any length
# What gloo and NCCL say to the processes that are left
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was aborted",
    "remote process exited",
)
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


class Terminated(BaseException):
    """SIGTERM has come where nothing is to be saved first; no `except Exception` on the way takes it for its own."""


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; a `UserError` ends the process with its line on standard error and exit status 2.

    So does a full disk, wherever it is met. Ctrl-C ends it with a line and status 130, SIGTERM with 143, unless
    `main` has taken over the signal.
    """
    process = os.getpid()

    def terminate(number: int, frame) -> None:
        if os.getpid() != process:  # a worker that was forked with this handler
            os._exit(128 + number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        sys.stdout.flush()
    except Terminated:
        _tell(
            "stopped by SIGTERM; what is written is whole: run the same command again, with --resume_from_checkpoint "
            "true if it trains"
        )
        sys.exit(128 + signal.SIGTERM)
    except UserError as error:
        # From a worker of a DataLoader it comes with the text of its trace before it
        _tell(str(error).rsplit("UserError: ", 1)[-1])
        sys.exit(getattr(error, "exit_status", 2))
    except BrokenPipeError:  # `... | head` has read enough; Python would say so again when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _tell("interrupted")
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        if not (int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(text in str(error) for text in PEER_GONE)):
            raise
        _tell(
            "another process of the run has ended: its error is above, or it was killed; run again with "
            "--resume_from_checkpoint true"
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _tell(f"no space left to write '{error.filename or 'a file'}'; free some and run again")
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(message: str) -> None:
    # Several processes may fail for reasons of their own; the first needs no name
    rank = int(os.environ.get("RANK", "0"))
    where = f"error (process {rank})" if rank else "error"
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # the line would stand behind the bar, and the bar again behind the line
    print(f"{where}: {_one_line(message)}", file=sys.stderr, flush=True)


def _one_line(message: str) -> str:
    """Return the message as a terminal may show it, cut in its middle if it is long: the mend is at its end."""
    if len(message) > MAX_LINE:
        message = f"{message[: MAX_LINE // 2]} … {message[-MAX_LINE // 2 :]}"
    return printable(" ".join(message.split()))


def printable(text: str) -> str:
    """Return text that may come from a stranger's file as a terminal may show it.

    Control characters and those that turn the direction of writing become spaces.
    """
    return "".join(character if character.isprintable() else " " for character in text)


class PrintableFormatter(logging.Formatter):
    """A log formatter whose lines are `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, or as several if it has a traceback."""
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


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
