"""How a command ends, by a one-line message and an exit status, and how log messages are shown."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm

from captioning.errors import Stopped, UserError, is_disk_full, printable


MAX_LINE = 2000  # characters of an error on the terminal; it may quote a file, which may be of any length
# What gloo and NCCL report to the other processes when one has ended
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was aborted",
    "remote process exited",
)


@contextmanager
def on_sigterm(handle: Callable[[], None]) -> Iterator[None]:
    """Call `handle` when this process gets SIGTERM; afterwards the handler from before is in place again.

    Python lets only the main thread catch signals: in another thread nothing is changed.
    """
    process = os.getpid()

    def catch(number: int, frame) -> None:
        if os.getpid() != process:  # a forked worker, which has inherited this handler
            os._exit(128 + number)
        handle()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; errors that a user can mend, and signals, end the process with one line on standard error.

    The exit status is 2, after Ctrl-C 130, after SIGTERM 143. `main` may handle SIGTERM itself for a while. Any other
    error is a fault of the program and keeps its traceback.
    """
    try:
        with on_sigterm(_stop):
            main()
            sys.stdout.flush()
    except BrokenPipeError:  # such as `... | head`; Python would raise it again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:
        message, status = _ending(error)
        if message is None:
            raise
        _print_error(message)
        sys.exit(status)


def _stop() -> None:
    raise Stopped(
        "stopped by SIGTERM; all files are complete: run the same command again, with "
        "--resume_from_checkpoint true if it trains"
    )


def _ending(error: BaseException) -> tuple[str | None, int]:
    """Return the line that is printed for an error and the exit status; no line for a fault of the program."""
    if isinstance(error, UserError):
        # From a DataLoader worker, the message is preceded by the text of a traceback
        return str(error).rsplit("UserError: ", 1)[-1], 2
    if isinstance(error, Stopped):
        return str(error), 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if isinstance(error, Exception) and is_disk_full(error):
        return f"no space left to write '{getattr(error, 'filename', None) or 'a file'}'; free some and run again", 2
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if isinstance(error, RuntimeError) and several and any(text in str(error) for text in PEER_GONE):
        reason = "another process of the run has ended: its error is above, or it was killed"
        return f"{reason}; run again with --resume_from_checkpoint true", 2
    return None, 1


def _print_error(message: str) -> None:
    # Several processes may fail, each with its own message; that of the first is not numbered
    rank = int(os.environ.get("RANK", "0"))
    where = f"error (process {rank})" if rank else "error"
    if len(message) > MAX_LINE:  # cut in its middle: the remedy is at its end
        message = f"{message[: MAX_LINE // 2]} … {message[-MAX_LINE // 2 :]}"
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message is printed at the end of a bar, and the bar again after it
    print(f"{where}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


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
