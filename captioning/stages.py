"""Where the time of a run goes: seconds of wall and processor time of each stage, in `stages.json` and in a line.

    with stage("checks"): ...        # also as a decorator

A stage inside another one is counted for itself alone. All times are those of this process: its `DataLoader` workers
and the other processes of a run count as the time that it waits for them.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from captioning.files import write_whole


STAGES_FILE = "stages.json"
BEGUN = ("training", "prediction")  # a run without any has ended before it began, and leaves no file
LEAST_SHARE = 1  # percent of the wall time from which on `time_in_words` names a stage

_open = ["other"]  # what is in no stage
_spent: dict[str, list[float]] = {}
_last = [0.0, 0.0]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time of the block, or of the decorated function, as that of the stage `name`."""
    _count()
    _open.append(name)
    try:
        yield
    finally:
        _count()
        _open.pop()


def begin_stages(imported: bool) -> None:
    """Begin a run; `imported`: what this process has done so far were its imports, a stage of their own."""
    _spent.clear()
    if imported:
        _spent["imports"] = [_seconds_since_start(), time.process_time()]
    _last[:] = _now()


@contextmanager
def keep_stages(folder: str, resumed: bool, should_save: bool) -> Iterator[None]:
    """Write `stages.json` into the output folder when the block ends, also by an error.

    It lists this run behind those that it is `resumed` from: by stage the `seconds` and `processor_seconds`.
    """
    path = Path(folder) / STAGES_FILE
    try:
        yield
    finally:
        if should_save and _spent.keys() & BEGUN:
            before = None
            with suppress(OSError, ValueError):  # missing or damaged
                before = json.loads(path.read_text()) if resumed else None
            runs = before if isinstance(before, list) else []
            with suppress(OSError):  # it must not hide the error of the block
                write_whole(path, json.dumps([*runs, stage_times()], indent=2) + "\n")


def stage_times() -> dict[str, dict[str, float]]:
    """Return the `seconds` and `processor_seconds` of each stage so far."""
    _count()
    return {
        name: {"seconds": round(wall, 3), "processor_seconds": round(processor, 3)}
        for name, (wall, processor) in _spent.items()
    }


def time_in_words() -> str:
    """Return a line: the wall time so far, and which share of it the stages took."""
    seconds = {name: found["seconds"] for name, found in stage_times().items()}
    total = sum(seconds.values())
    shares = sorted(((100 * value / total, name) for name, value in seconds.items()), reverse=True)
    named = [f"{name} {share:.0f} %" for share, name in shares if share >= LEAST_SHARE]
    return f"time: {total:.0f} s, {', '.join(named)}"


def _count() -> None:
    """Count the time since the last call as that of the innermost stage."""
    now, spent = _now(), _spent.setdefault(_open[-1], [0.0, 0.0])
    spent[:] = (before + new - old for before, new, old in zip(spent, now, _last, strict=True))
    _last[:] = now


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _seconds_since_start() -> float:
    """Return the age of this process; where the system does not tell it, its processor time, which is most of it."""
    with suppress(OSError):
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.process_time()
