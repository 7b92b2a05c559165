"""An output folder is written by one run at a time."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from captioning.errors import UserError


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"  # says who writes to the folder; a killed run leaves it, without its lock
_held: set[int] = set()  # file descriptors of this process
# A worker that outlives its killed parent must not keep the folder locked
os.register_at_fork(after_in_child=lambda: [os.close(file) for file in _held] and _held.clear())


class FolderInUse(UserError):
    """Another process writes to the folder."""


@contextmanager
def hold_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a folder, also those of machines that share it; do nothing where there is no such folder.

    The lock is the kernel's: it ends with the process, however that ends.

    Raises:
        FolderInUse: naming the process that has the folder.
        UserError: the block failed, and the folder was removed meanwhile.
    """
    path, file = Path(folder) / LOCK_FILE, None
    with ExitStack() as stack:
        try:
            file = _open_locked(path, stack)
        except BlockingIOError:
            holder = "another process"
            with suppress(OSError):
                holder = path.read_bytes()[:200].decode(errors="replace").strip() or holder
            mend = "wait until it has ended, or set another --output_dir"
            raise FolderInUse(f"output folder '{folder}' is being written by {holder}; {mend}") from None
        except OSError as error:
            if path.parent.is_dir():  # read-only, or on a file system without locks
                logger.warning("'%s' cannot be locked (%s): let no other run write to it", folder, error)
        if file is not None:
            _held.add(file)
            stack.callback(_held.discard, file)
            stack.callback(lambda: _is_at(path, file) and path.unlink())
            with suppress(OSError):  # a full disk
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        except Exception as error:
            if file is None or isinstance(error, UserError) or _is_at(path, file):
                raise
            what = f"output folder '{folder}' was removed while the run wrote to it"
            raise UserError(f"{what}; run again, with --resume_from_checkpoint true if it trains") from error


def _open_locked(path: Path, stack: ExitStack) -> int:
    """Open and lock the file; again, if the run that held it has removed it meanwhile."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, file)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, file):
            return file


def _is_at(path: Path, file: int) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file), os.stat(path))
