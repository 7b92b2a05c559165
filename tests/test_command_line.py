"""A command ends with one line where the user can mend the fault, and with a traceback where only we can."""

import errno
import os
import signal
import threading
import time
from contextlib import suppress

import pytest
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from captioning.command_line import exit_on_user_error, on_stop_signals
from captioning.errors import UserError


def raising(error: BaseException):
    """Return a `main` that ends by an error."""

    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (UserError("a is b; set c"), "error: a is b; set c", 2),
        (UserError("Traceback ...\ncaptioning.errors.UserError: a is b; set c"), "error: a is b; set c", 2),
        (OSError(errno.ENOSPC, "full", "a.json"), "error: no space left to write 'a.json'; free some", 2),
        (OSError(errno.EDQUOT, "full"), "error: no space left to write 'a file'; free some", 2),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "error: no space left to write", 2),
    ],
)
def test_what_the_user_can_mend_is_one_line(capsys, error, line, status):
    with pytest.raises(SystemExit) as exited:
        exit_on_user_error(raising(error))
    assert exited.value.code == status
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("library", "cache", "variable"),
    [("datasets", HF_DATASETS_CACHE, "HF_DATASETS_CACHE"), ("huggingface_hub", HF_HUB_CACHE, "HF_HOME")],
    ids=["datasets", "huggingface_hub"],  # paths differ between the processes of pytest
)
def test_a_full_cache_is_named_with_the_variable_that_moves_it(capsys, library, cache, variable):
    with pytest.raises(SystemExit):
        exit_on_user_error(lambda: exec("raise OSError(28, 'full', 'a.json')", {"__name__": f"{library}.files"}))
    line = f"error: no space left in the cache '{cache}'; free some, or set {variable} to a folder"
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("error", [KeyError("a"), OSError(errno.EACCES, "no", "a.json"), SystemExit(0)])
def test_other_errors_pass(capsys, error):
    with pytest.raises(type(error)) as passed:
        exit_on_user_error(raising(error))
    assert passed.value is error
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("processes", "kind"), [(1, RuntimeError), (2, SystemExit)])
def test_a_process_whose_peer_is_gone_says_so_in_a_line(monkeypatch, capsys, processes, kind):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(kind):
        exit_on_user_error(raising(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:3145")))
    assert ("error: another process of the run has ended" in capsys.readouterr().err) == (processes == 2)


def test_sigterm_is_left_alone_in_another_thread():
    def run():
        with on_stop_signals(lambda number: None):
            found.append(signal.getsignal(signal.SIGTERM))

    found, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def test_torchrun_repeats_the_line_at_the_end_of_its_report(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        exit_on_user_error(raising(UserError("a is b; set c")))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    report = str(ChildFailedError("run_captioning.py", {0: failure})).splitlines()
    assert report[-2] == "  traceback : error: a is b; set c"


def test_a_stop_that_a_library_drops_comes_again(capsys):
    """`dill` has bare `except` clauses, through which the hash of a data set goes."""

    def main():
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(SystemExit) as exited:
        exit_on_user_error(main)
    assert exited.value.code == 143
    assert signal.alarm(0) == 0
