"""How a command ends, by a one-line message and an exit status, and how log messages are shown."""

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

from captioning.errors import UserError, printable


MAX_LINE = 2000  # characters of an error on the terminal; it may quote a file, which may be of any length
# What gloo and NCCL report to the other processes when one has ended
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was aborted",
    "remote process exited",
)


class Terminated(BaseException):
    """SIGTERM while nothing has to be saved first; a `BaseException`, so that no `except Exception` catches it."""


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; a `UserError` ends the process with a one-line message on standard error and exit status 2.

    So does a full disk. Ctrl-C ends it with a one-line message and status 130, SIGTERM with 143, unless `main` has
    installed its own handler.
    """
    process = os.getpid()

    def terminate(number: int, frame) -> None:
        if os.getpid() != process:  # a forked worker, which has inherited this handler
            os._exit(128 + number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        sys.stdout.flush()
    except Terminated:
        _print_error(
            "stopped by SIGTERM; all files are complete: run the same command again, with --resume_from_checkpoint "
            "true if it trains"
        )
        sys.exit(128 + signal.SIGTERM)
    except UserError as error:
        # From a DataLoader worker, the message is preceded by the text of a traceback
        _print_error(str(error).rsplit("UserError: ", 1)[-1])
        sys.exit(getattr(error, "exit_status", 2))
    except BrokenPipeError:  # such as `... | head`; Python would raise it again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _print_error("interrupted")
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        if not (int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(text in str(error) for text in PEER_GONE)):
            raise
        _print_error(
            "another process of the run has ended: its error is above, or it was killed; run again with "
            "--resume_from_checkpoint true"
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _print_error(f"no space left to write '{error.filename or 'a file'}'; free some and run again")
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_error(message: str) -> None:
    # Several processes may fail, each with its own message; that of the first is not numbered
    rank = int(os.environ.get("RANK", "0"))
    where = f"error (process {rank})" if rank else "error"
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message is printed at the end of a bar, and the bar again after it
    print(f"{where}: {_shortened(message)}", file=sys.stderr, flush=True)


def _shortened(message: str) -> str:
    """Return the message safe to print, cut in the middle if it is long: the remedy is at its end."""
    if len(message) > MAX_LINE:
        message = f"{message[: MAX_LINE // 2]} … {message[-MAX_LINE // 2 :]}"
    return printable(" ".join(message.split()))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s: one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(f"{message}; see `{self.prog} --help`")


class PrintableFormatter(logging.Formatter):
    """A log formatter whose lines are `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, or as several if it has a traceback."""
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


def set_up_logging() -> None:
    """Log our own messages to standard error; of the Hub client only errors, since it reports each retry twice."""
    ours = logging.getLogger("captioning")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter())
        ours.addHandler(handler)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
