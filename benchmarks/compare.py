"""What became slower since the results that are stored in `benchmarks/results/`?

    python benchmarks/compare.py FOLDER [--store] [--results benchmarks/results]

FOLDER holds what the other scripts wrote by `--json`. Each ratio to stock, which both sides of one run share the noise
of, is compared with the last one stored: of the same machine if there is one, else of another. Seconds are compared on
the same machine only: device, threads, data type and clock. `--store` then keeps the results, one file a device, the
last of each benchmark.

The exit status is 1 if something became slower by more than a tenth.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
NOISE = 1.1  # times slower
SAME = ("device", "threads", "dtype", "clock")  # of a machine on which seconds are comparable
KEPT = (*SAME, "python", "torch", "transformers")


def main(arguments: argparse.Namespace) -> bool:
    found = []
    for path in sorted(Path(arguments.folder).glob("*.json")):
        try:
            found.append(slim(json.loads(path.read_text())))
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path.name}: left out, no table of a benchmark ({type(error).__name__}: {error})")
    if not found:
        sys.exit(f"'{arguments.folder}' holds no results: run the benchmarks with --json first")
    folder = Path(arguments.results)
    stored = [record for path in sorted(folder.glob("*.json")) for record in json.loads(path.read_text())]
    slower = False
    for record in found:
        before = last_stored(record, stored)
        print(f"\n{describe(record)}: " + (f"beside {describe(before)}" if before else "nothing is stored to compare"))
        for what, times in changes(record, before) if before else ():
            slower |= times is not None and times > NOISE
            print(f"  {what}: {in_words(times)}")
    for record in found if arguments.store else ():
        store(record, folder)
    return slower


def slim(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored of a record that `measure.report` wrote."""
    rows = [
        {"what": row["what"].strip(), "ratio": row["ratio"], "at_most": row.get("at_most", False)}
        for row in record["rows"]
        if "ratio" in row
    ]
    machine = {name: record["machine"][name] for name in KEPT if name in record["machine"]}
    kept = {"title": record["title"], "quick": record["quick"], "settings": record.get("settings", {})}
    kept |= {"date": date.today().isoformat(), "machine": machine}
    return kept | {"rows": rows, "seconds": record.get("seconds", {})}


def last_stored(record: dict[str, Any], stored: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last stored record of the same benchmark, of the same machine if there is one."""
    same = [other for other in stored if is_same_benchmark(record, other)]
    return max(same, key=lambda other: (is_same_machine(record, other), other["date"]), default=None)


def is_same_benchmark(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two records are of the same script in the same form, such as of the same model."""
    return all(record[key] == other[key] for key in ("title", "quick", "settings"))


def is_same_machine(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether the seconds of two records can be compared."""
    return all(record["machine"].get(key) == other["machine"].get(key) for key in SAME)


def changes(record: dict[str, Any], before: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yield what was measured before, and how many times as slow it is now; None where it is missing now."""
    now = {row["what"]: row["ratio"] for row in record["rows"]}
    for row in before["rows"]:
        times = row["ratio"] / now[row["what"]] if now.get(row["what"]) else None
        yield f"{row['what']}, ratio", 1 / times if times and row["at_most"] else times
    for name, seconds in before["seconds"].items() if is_same_machine(record, before) else ():
        yield f"{name}, seconds", record["seconds"][name] / seconds if name in record["seconds"] else None


def in_words(times: float | None) -> str:
    """Return a change in words."""
    if times is None:
        return "MISSING"
    if 1 / NOISE <= times <= NOISE:
        return f"as before ({times:.2f} times)"
    return f"SLOWER, {times:.2f} times" if times > 1 else f"faster, {1 / times:.2f} times"


def describe(record: dict[str, Any]) -> str:
    """Return the name of a benchmark, its machine and date."""
    machine = ", ".join(str(record["machine"].get(key, "unknown")) for key in SAME)
    form = "".join(f", {name} {value}" for name, value in record["settings"].items() if value is not None)
    return f"{record['title']}{form}{', quick' if record['quick'] else ''} ({machine}; {record['date']})"


def store(record: dict[str, Any], folder: Path) -> None:
    """Put a record into the file of its device, in place of that of the same benchmark and machine."""
    device = re.sub(r"[^a-z0-9]+", "_", record["machine"]["device"].lower()).strip("_")
    path = folder / f"{device}.json"
    kept = json.loads(path.read_text()) if path.is_file() else []
    kept = [other for other in kept if not (is_same_machine(record, other) and is_same_benchmark(record, other))]
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps([*kept, record], indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--results", default=str(RESULTS))
    sys.exit(main(parser.parse_args()))
