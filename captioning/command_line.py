"""How a command ends: one line on standard error for what the user can mend, and how its messages are shown."""

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


MAX_LINE = 2000  # characters of an error on the terminal; what it quotes of a file may be of any length
# What gloo and NCCL say to the processes that are left
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was aborted",
    "remote process exited",
)


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
    """Show our own messages on standard error, and of the Hub client only errors: it reports each retry twice."""
    ours = logging.getLogger("captioning")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter())
        ours.addHandler(handler)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
