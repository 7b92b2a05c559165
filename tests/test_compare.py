"""`benchmarks/compare.py` says what became slower, and compares no seconds of different machines."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import read_json
from processes import ROOT


MACHINE = {"device": "AMD EPYC", "threads": 2, "dtype": "float32", "clock": "wall", "load": 0.5}


def record(ratio: float = 4.0, ours: float = 10.0, memory: float = 0.5, machine: dict = MACHINE, **more) -> dict:
    """Return what a benchmark writes: a ratio where more is better, one where less is, seconds, a row without any."""
    rows = [
        {"what": "  stock", "value": "40", "ratio": ratio, "target": 5},
        {"what": "memory", "value": "1", "ratio": memory, "target": 0.6, "at_most": True},
        {"what": "limit", "value": "3"},
    ]
    seconds = {"ours": ours, "stock": ratio * ours}
    return {"title": "Evaluation", "quick": False, "machine": machine, "rows": rows, "seconds": seconds} | more


@pytest.fixture
def compare(tmp_path):
    """Return a function that compares records with what is stored: the lines about one, and the exit status."""

    def call(*records: dict, store: bool = False, beside: Sequence[Path] = ()) -> tuple[list[str], int]:
        folder = tmp_path / "found"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for number, each in enumerate(records):
            (folder / f"{number}.json").write_text(json.dumps(each))
        for path in beside:
            shutil.copy(path, folder)
        words = [ROOT / "benchmarks" / "compare.py", folder, "--results", tmp_path / "results", *["--store"] * store]
        run = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
        return [line.strip() for line in run.stdout.splitlines() if line], run.returncode

    return call


def test_a_slower_ratio_fails_and_seconds_within_noise_do_not(compare):
    compare(record(), store=True)
    lines, status = compare(record(ratio=3.0, ours=10.9))
    assert status == 1
    assert lines[1:] == [
        "stock, ratio: SLOWER, 1.33 times",
        "memory, ratio: as before (1.00 times)",
        "ours, seconds: as before (1.09 times)",
        "stock, seconds: faster, 1.22 times",
    ]


def test_less_is_better_where_a_ratio_is_to_be_at_most(compare):
    compare(record(), store=True)
    assert "memory, ratio: SLOWER, 1.20 times" in compare(record(memory=0.6))[0]
    lines, status = compare(record(memory=0.4))
    assert "memory, ratio: faster, 1.25 times" in lines and status == 0


def test_on_another_machine_ratios_are_compared_and_seconds_are_not(compare):
    compare(record(), store=True)
    for change in ({"device": "Xeon"}, {"threads": 1}, {"dtype": "bfloat16"}, {"clock": "processor"}):
        other = MACHINE | change
        lines, status = compare(record(ours=99.0, machine=other))
        assert [line.split(":")[0] for line in lines[1:]] == ["stock, ratio", "memory, ratio"] and status == 0
    assert compare(record(ratio=2.0, machine=other))[1] == 1


def test_the_same_machine_comes_before_a_newer_result_of_another(compare, tmp_path):
    compare(record(), store=True)
    compare(record(ratio=1.0, machine=MACHINE | {"device": "Xeon"}), store=True)
    path = tmp_path / "results" / "amd_epyc.json"
    path.write_text(path.read_text().replace('"date": "20', '"date": "19'))
    assert compare(record(ratio=2.0))[1] == 1
    assert compare(record(ratio=2.0, machine=MACHINE | {"device": "other"}))[1] == 0


def test_what_is_missing_is_named_on_both_sides(compare):
    lines, status = compare(record())
    assert "nothing is stored to compare" in lines[0] and status == 0
    compare(record(), store=True)
    lines, status = compare(record(rows=[], seconds={}))
    assert [line.endswith(": MISSING") for line in lines] == [False, True, True, True, True] and status == 0
    assert "nothing is stored" in compare(record(quick=True))[0][0], "a quick run is another benchmark"
    assert compare()[1] == 1


def test_a_store_replaces_the_result_of_the_same_benchmark_and_machine_alone(compare, tmp_path):
    records = (record(), record(title="Training step"), record(machine=MACHINE | {"threads": 1}), record(quick=True))
    compare(*records, store=True)
    compare(record(ratio=5.0), store=True)
    found = read_json(tmp_path / "results" / "amd_epyc.json")
    assert len(found) == 4 and [each["rows"][0]["ratio"] for each in found] == [4, 4, 4, 5]
    assert "load" not in found[0]["machine"] and [row["what"] for row in found[0]["rows"]] == ["stock", "memory"]


def test_other_settings_are_another_benchmark(compare):
    """`gpu.sh` evaluates two models, in files of the same title."""
    base, large = (record(ratio=ratio, settings={"model": model}) for model, ratio in (("base", 4.0), ("large", 2.0)))
    compare(base, large, store=True)
    lines, status = compare(base, large)
    assert status == 0 and sum("as before" in line for line in lines) == 8
    assert "model large" in lines[5] and "model base" not in lines[5]


def test_a_file_that_cannot_be_compared_is_named_and_the_others_are(compare, tmp_path):
    compare(record(), store=True)
    for name, text in (("half", '{"title": "Eval'), ("scoring", '{"total": 60.0, "steps": []}'), ("list", "[1]")):
        (tmp_path / f"{name}.json").write_text(text)
    others = [tmp_path / f"{name}.json" for name in ("half", "scoring", "list")]
    lines, status = compare(record(ratio=3.0), beside=others)
    assert status == 1 and "stock, ratio: SLOWER, 1.33 times" in lines
    assert [f"{each.name}: left out" in line for each, line in zip(sorted(others), lines, strict=False)] == [True] * 3
    assert compare(beside=others)[1] == 1, "nothing is left"


def test_each_stored_result_can_be_compared():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for stored in read_json(Path(path)):
            assert {"title", "quick", "settings", "date", "machine", "rows", "seconds"} == stored.keys(), path
