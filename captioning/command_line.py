"""How a command ends: signals, one-line messages and exit statuses; and how log messages are shown."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from captioning.errors import Stopped, UserError, causes, is_disk_full, printable


MAX_LINE = 2000  # characters of an error on the terminal; it may quote a file, which may be of any length
AGAIN = "run the same command again, with --resume_from_checkpoint true if it trains"
# What users, terminals and job schedulers send to end a run
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PARENT_SECONDS = 5  # how soon a worker notices that the main process is gone
# By the library that writes it, the variable that sets a cache, and the constant that is its path
CACHES = {
    "datasets": ("HF_DATASETS_CACHE", "datasets.config", "HF_DATASETS_CACHE"),
    "huggingface_hub": ("HF_HOME", "huggingface_hub.constants", "HF_HUB_CACHE"),
}
# What gloo and NCCL report to the other processes when one has ended
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was aborted",
    "remote process exited",
)


@contextmanager
def on_stop_signals(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `handle` on one of `STOP_SIGNALS` during the block; a second SIGINT ends the process at once.

    A signal that is ignored stays ignored, such as SIGHUP under `nohup`. Outside of the main thread, where Python
    cannot catch signals, nothing is changed.
    """
    interrupted = False

    def catch(number: int, frame) -> None:
        nonlocal interrupted
        if interrupted and number == signal.SIGINT:
            end_now("ended by a second SIGINT; complete checkpoints are kept: " + AGAIN, number)
        interrupted |= number == signal.SIGINT
        handle(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, catch)
        _handlers.append(catch)
        yield
    finally:
        signal.alarm(0)  # of `_stop`
        _handlers.remove(catch)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_now(message: str, number: int) -> NoReturn:
    """End the process from within a signal handler, with a line, and without waiting for uploads or workers."""
    os.write(2, f"\nerror: {message}\n".encode())  # `print` may have been interrupted
    os._exit(128 + number)


# A terminal and a job scheduler signal all processes of a group. The workers that load data and check rows must
# outlive it: the main process needs them until it stops
_handlers: list[Callable] = []
_masking = False  # Python prints and drops what is raised while it forks


def _mask(how: int) -> None:
    global _masking
    if _handlers:
        _masking = True
        signal.pthread_sigmask(how, STOP_SIGNALS)
        _masking = False


def _follow_parent() -> None:
    """End this forked process by SIGTERM of its parent, or with it."""
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            found = signal.sigtimedwait([signal.SIGTERM], PARENT_SECONDS)
            if found and found.si_pid == parent:
                break
        os._exit(128 + signal.SIGTERM)

    if _handlers:
        _handlers.clear()
        threading.Thread(target=wait, daemon=True).start()


if hasattr(signal, "sigtimedwait"):  # not on macOS, where workers are not forked
    block, unblock = partial(_mask, signal.SIG_BLOCK), partial(_mask, signal.SIG_UNBLOCK)
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=_follow_parent)


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; errors that a user can mend, and signals, end the process with one line on standard error.

    The exit status is 2, after a signal 128 and its number. Any other error is a fault of the program and keeps its
    traceback.
    """
    try:
        with on_stop_signals(_stop), _without_repetition():
            main()
            sys.stdout.flush()
    except BrokenPipeError:  # such as `... | head`; Python would raise it again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:
        message, status = _ending(error)
        if message is None:
            raise
        others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        uploads = isinstance(error, Stopped) and not all(thread.daemon for thread in others)
        for number in STOP_SIGNALS if uploads else ():  # Python waits for such threads, and would print a traceback
            signal.signal(number, lambda number, frame: os._exit(status))
        _print_error(f"{message}; an upload still goes on, a signal ends it" if uploads else message)
        sys.exit(status)


@contextmanager
def _without_repetition() -> Iterator[None]:
    """Print no traceback of TensorBoard's thread: the main thread raises its error, such as of a full disk, too."""
    before = threading.excepthook
    threading.excepthook = lambda args: type(args.thread).__module__.startswith("tensorboard") or before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def _stop(number: signal.Signals) -> None:
    # Again until it arrives: libraries drop an exception that comes while they pickle or delete an object
    signal.signal(signal.SIGALRM, lambda *_: _stop(number))
    signal.alarm(1)
    if not _masking:
        raise Stopped(f"stopped by {number.name}; all files are complete: {AGAIN}", number)


def _ending(error: BaseException) -> tuple[str | None, int]:
    """Return the line for an error and the exit status; no line for a fault of the program."""
    # A library may raise an error of its own while it cleans up
    error = next((cause for cause in causes(error) if isinstance(cause, Stopped)), error)
    if isinstance(error, UserError):
        # From a DataLoader worker, the message is preceded by the text of a traceback
        return str(error).rsplit("UserError: ", 1)[-1], 2
    if isinstance(error, Stopped):
        return str(error), 128 + error.number
    if isinstance(error, Exception) and is_disk_full(error):
        return f"no space left {full_disk(error)} and run again", 2
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if isinstance(error, RuntimeError) and several and any(text in str(error) for text in PEER_GONE):
        return f"another process of the run has ended: its error is above, or it was killed; {AGAIN}", 2
    return None, 1


def full_disk(error: BaseException, folder: str = "a file", mend: str = "free some") -> str:
    """Say what is full, and the mend: a cache if its library was writing, else the file of the error, or `folder`."""
    frames = [frame for cause in causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    found = [library for frame in frames if (library := frame.f_globals["__name__"].partition(".")[0]) in CACHES]
    if found:
        variable, module, constant = CACHES[found[-1]]
        cache = getattr(sys.modules[module], constant)  # imported by the library that was writing
        # Beside the data, where that was loaded by `load_from_disk`
        files = [frame.f_locals.get("cache_file_name") for frame in frames]
        where = next((os.path.dirname(file) for file in files if isinstance(file, str)), cache)
        return f"in the cache '{where}'; free some, or set {variable} to a folder on another disk,"
    return f"to write '{getattr(error, 'filename', None) or folder}'; {mend}"


def _print_error(message: str) -> None:
    rank = int(os.environ.get("RANK", "0"))  # several processes may fail
    where = f"error (process {rank})" if rank else "error"
    if len(message) > MAX_LINE:  # cut in its middle: the remedy is at its end
        message = f"{message[: MAX_LINE // 2]} … {message[-MAX_LINE // 2 :]}"
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message is printed at the end of a bar, and the bar again after it
    line = f"{where}: {printable(' '.join(message.split()))}"
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats it at the end of its own report
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(f"{message}; see `{self.prog} --help`")


class PrintableFormatter(logging.Formatter):
    """A log formatter whose lines are `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, or as several if it has a traceback."""
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


def set_up_logging() -> None:
    """Log our own messages to standard error."""
    ours = logging.getLogger("captioning")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter())
        ours.addHandler(handler)
