"""Processes that start in tenths of a second: forks of a server that has imported what the script imports.

Each command is a process of its own, with its own working directory, environment, standard streams, signals and exit
status, and runs the script as `python` would. Only the imports, which take most of the time of a short run, are done
before. What libraries read from the environment when they are imported (`HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`)
is therefore the server's, and so is the seed of hashes: a test of these needs a server of its own, or a real start.
"""

import atexit
import functools
import gc
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


ROOT = Path(__file__).parents[1]
ANSWER = 10  # bytes of each of the two answers of a server: the process's id, and its status when it has ended


class Process:
    """A command that runs; the calls are those of `subprocess.Popen`, and the output is kept in files."""

    def __init__(self, connection: socket.socket, outputs: list):
        self._connection, self._outputs = connection, outputs
        self.pid = int(connection.recv(ANSWER))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0.001)
        except TimeoutError:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self._connection.recv(ANSWER)))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self, error: bool = False) -> bytes:
        """Return what it has written to standard output, or error, so far."""
        return os.pread(self._outputs[error].fileno(), 2**20, 0)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return standard output and standard error."""
        self.wait(timeout)
        for file in self._outputs:
            file.seek(0)
        return tuple(file.read().decode() for file in self._outputs)


class Server:
    """A Python that has imported the script, and forks a process for each command.

    Args:
        environment: its environment, which the commands inherit; None: that of the tests.
        setup: code that it runs after the imports.
    """

    def __init__(self, environment: dict[str, str] | None = None, setup: str = ""):
        self.environment = environment
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), setup],
                env={**(environment or os.environ), "OMP_NUM_THREADS": "1"},  # a process with threads must not fork
                pass_fds=[theirs.fileno()],
            )

    def start(self, words: list, cwd: str | Path = ROOT, environment: dict[str, str] | None = None) -> Process:
        """Start what `python *words` starts: a script, `-m module` or `-c code`, and its arguments."""
        ours, theirs = socket.socketpair()
        outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 (`Process` reads and closes them)
        with theirs, open(os.devnull) as nothing:
            streams = [nothing.fileno(), *(file.fileno() for file in outputs)]
            socket.send_fds(self._control, [b"!"], [theirs.fileno(), *streams])
        command = [list(map(str, words)), str(cwd), {**(self.environment or os.environ), **(environment or {})}]
        ours.sendall(json.dumps(command).encode() + b"\n")
        return Process(ours, outputs)

    def run(self, words: list, code: int = 0, timeout: float = 300, **where) -> subprocess.CompletedProcess:
        """Run a command to its end, as `subprocess.run` does, and assert its exit status."""
        process = self.start(words, **where)
        try:
            output, errors = process.communicate(timeout)
        except TimeoutError:
            process.send_signal(signal.SIGKILL)
            raise
        assert process.returncode == code, errors
        return subprocess.CompletedProcess(words, code, output, errors)

    def close(self) -> None:
        """End the server; commands that it has started go on."""
        self._control.close()
        self._process.wait()


@functools.cache
def server() -> Server:
    """Return the server of this test process, which has the environment that `conftest.py` sets."""
    return Server()


# --- In the server --------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> list[str]:
    """Fork for each command that comes, and return its words in the process that is to run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, *_ = socket.recv_fds(control, 1, 4)
        if not message:  # the tests are gone
            sys.exit()
        if not os.fork():
            break
        for file in files:
            os.close(file)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = socket.socket(fileno=files[0])
    words, cwd, environment = json.loads(connection.makefile().readline())
    if process := os.fork():  # this one waits for the other, and tells the test how it ended
        for file in files[1:]:
            os.close(file)
        connection.sendall(b"%*d" % (ANSWER, process))
        connection.sendall(b"%*d" % (ANSWER, os.waitpid(process, 0)[1]))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files[1:]):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    return words


def execute(words: list[str]) -> None:
    """Do what `python *words` does once it has started."""
    # Forks share the state of the generators: a run that forgets its seed must not pass for one that sets it
    for seed in (random.seed, numpy.random.seed, torch.seed):
        seed()
    kind, *arguments = words
    if kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), arguments
        sys.modules.pop(f"{arguments[0]}.__main__", None)  # or runpy warns that it is there already
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(kind).resolve().parent), words
        runpy.run_path(kind, run_name="__main__")


def end_with(words: list[str]) -> None:
    """Execute a command and end as Python does, without taking apart all modules: that alone takes half a second."""
    status = 0
    try:
        execute(words)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import numpy
    import torch

    import captioning.__main__  # noqa: F401
    import run_captioning  # noqa: F401

    exec(sys.argv[2])
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    # Arrow's allocator starts its thread anew in a fork
    assert len(set(threads) - {"jemalloc_bg_thd"}) <= 1, f"a fork would not have the threads {threads}"
    gc.freeze()
    end_with(serve(socket.socket(fileno=int(sys.argv[1]))))
