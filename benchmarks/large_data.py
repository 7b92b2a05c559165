"""Do memory and the time of a row stay flat from 1,000 to 100,000 rows, stored and streamed?

    python benchmarks/large_data.py [--rows 1000 10000 100000] [--folder FOLDER] [--json large_data.json] [--quick]

Writes datasets of that many rows in the schema of ROCOv2 to FOLDER (default: a temporary one): captions as long as
ROCOv2's, JPEG files of 64 x 64 pixels, 1.7 kB each, in row groups of 100 rows, as on the Hub. A process of its own,
with an empty cache, loads it, checks and tokenizes the rows, and collates an epoch of batches of 16 images at 96
pixels in random order; without `--streaming`, then with it.

Memory is `RssAnon` of /proc/self/status, sampled every 5 ms: what the process itself holds, without the pages of
memory-mapped files, which the system takes back when it needs them. What was held before the first stage is
subtracted: libraries, tokenizer, and 1,000 rows that were read, checked and collated to warm up. `cache` is what the
run leaves on disk.

Exits with status 1 if the peak of the largest dataset is more than 1.1 times that of the smallest, all memory counted,
or a row takes more than 1.25 times as long.
"""

import os


os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import MAX_LENGTH, MEDIAN_LENGTH, SIGMA_LENGTH, parser, report
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from captioning.data import checks, sources
from captioning.data.tokenize_captions import tokenize
from captioning.models.load import build_captioner
from captioning.training.samplers import StreamingSampler
from collator import CaptioningCollator


STAGES = ("load", "check", "tokenize", "epoch")
SHARD, GROUP = 5000, 100  # rows of a shard and of a row group
IMAGE, INPUT, BATCH = 64, 96, 16
ROWS = (1000, 10_000, 100_000)
MEMORY_TARGET, TIME_TARGET = 1.1, 1.25
SAMPLE = 0.005  # seconds


def main(arguments) -> bool:
    numbers = [200, 2000] if arguments.quick else sorted(arguments.rows)
    measured: dict[str, dict[int, dict]] = {"stored": {}, "streamed": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for number in numbers:
            folder = Path(arguments.folder or temporary) / f"rows-{number}"
            if not (folder / "data").is_dir():
                build(folder, number)
            for way, found in measured.items():
                found[number] = measure_apart(folder, way, temporary)
    rows = []
    for way, found in measured.items():
        for number, run in found.items():
            stages = ", ".join(f"{name} {1e3 * run['seconds'][name] / number:.2f}" for name in STAGES)
            row = {"what": f"{way}, {number:,} rows: MiB", "value": f"{run['start']:.0f} {run['peak']:+.1f}"}
            rows += [
                row,
                {"what": "  by stage: " + ", ".join(f"{n} {run['memory'][n]:+.0f}" for n in STAGES), "value": ""},
                {"what": f"  ms a row: {stages}", "value": f"{1e3 * sum(run['seconds'].values()) / number:.2f}"},
                {
                    "what": "  bytes of cache a row, and of the dataset",
                    "value": f"{run['cache']:.0f} of {run['set']:.0f}",
                },
            ]
        small, large = (found[number] for number in (numbers[0], numbers[-1]))
        memory = (large["start"] + large["peak"]) / (small["start"] + small["peak"])
        times = [sum(run["seconds"].values()) / number for number, run in found.items()]
        rows += [
            {"what": f"{way}: memory of the largest by the smallest", "value": "", "ratio": memory}
            | {"target": MEMORY_TARGET, "at_most": True},
            {"what": f"{way}: time of a row, likewise", "value": "", "ratio": times[-1] / times[0]}
            | {"target": TIME_TARGET, "at_most": True},
        ]
    return report(arguments, "Memory and time of a row by the size of the set", rows, measured=measured)


# --- The dataset ----------------------------------------------------------------------------------------------


def build(folder: Path, number: int) -> None:
    """Write a training split of `number` rows, the same in each call."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghilmnoprstu"), rng.integers(2, 10))) for _ in range(3000)])
    images = [noisy_jpeg(rng) for _ in range(500)]
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    (folder / "data").mkdir(parents=True)
    shards = -(-number // SHARD)
    for shard in range(shards):
        file = folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet"
        rows = range(shard * SHARD, min((shard + 1) * SHARD, number))
        lengths = np.minimum(MEDIAN_LENGTH * np.exp(SIGMA_LENGTH * rng.standard_normal(len(rows))), MAX_LENGTH)
        columns = {
            # Decoders ignore what follows an image; it makes every file different
            "image": pa.array([{"bytes": images[i % 500] + b"%08d" % i, "path": None} for i in rows], image_type),
            "image_id": [f"ROCOv2_2023_train_{i:06d}" for i in rows],
            # A word takes one or two WordPieces
            "caption": [" ".join(rng.choice(words, max(1, int(length * 0.6)))) for length in lengths],
            "cui": [[f"C{cui:07d}" for cui in rng.integers(0, 10**7, rng.integers(1, 5))] for _ in rows],
        }
        pq.write_table(pa.table(columns), file, row_group_size=GROUP, use_dictionary=False)


def noisy_jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (IMAGE, IMAGE), dtype=np.uint8)).save(buffer, "JPEG", quality=40)
    return buffer.getvalue()


# --- Measurements ---------------------------------------------------------------------------------------------


def measure_apart(folder: Path, way: str, temporary: str) -> dict:
    """Return `measure_here` of a new process with an empty cache."""
    with tempfile.TemporaryDirectory(dir=temporary) as home:
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
        printed = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(printed.splitlines()[-1])


def measure_here(folder: Path, streamed: bool) -> dict:
    """Return peak memory in MiB and seconds by stage, and the bytes of dataset and cache a row."""
    with tempfile.TemporaryDirectory() as warm:
        build(Path(warm), 1000)
        for _ in stages(Path(warm), streamed):
            pass
    cache = Path(os.environ["HF_HOME"])
    before = size_of(cache)
    memory = Memory()
    start, seconds, peaks = memory.now(), {}, {}
    started = time.perf_counter()
    for name, rows in stages(folder, streamed):
        seconds[name] = time.perf_counter() - started
        peaks[name] = memory.peak() - start
        number = rows
        started = time.perf_counter()
    return {
        "start": start,
        "peak": max(peaks.values()),
        "memory": peaks,
        "seconds": seconds,
        "cache": (size_of(cache) - before) / number,
        "set": size_of(folder) / number,
    }


def stages(folder: Path, streamed: bool) -> Iterator[tuple[str, int]]:
    """Do what a run does with its data; yield the name of each finished stage and the number of rows."""
    captions = ["a chest radiograph of abcdefghilmnoprstu"] * 9
    captioner = build_captioner("recipes/configs/blip_small.json", 0, None, captions, vocab_size=300)
    captioner.adapt(image_size=INPUT)
    captioner = captioner.without_weights()
    dataset = sources.load_source(str(folder), streaming=streamed)
    yield "load", len(dataset["train"])
    unopened = ["train"] if streamed else []
    checked = checks.check_rows(dataset, 0.0, os.devnull, unopened=unopened)
    yield "check", len(dataset["train"])
    rows = checks.usable(tokenize(checked, captioner, 64)["train"])
    yield "tokenize", len(rows)
    collator = CaptioningCollator(captioner)
    sampler = StreamingSampler(rows, seed=0) if streamed else RandomSampler(rows)
    for _ in DataLoader(rows, BATCH, sampler=sampler, collate_fn=collator):
        pass
    yield "epoch", len(rows)


class Memory:
    """The peak of `RssAnon` of this process, in MiB."""

    def __init__(self):
        self._peak = 0.0
        threading.Thread(target=self._sample, daemon=True).start()

    def now(self) -> float:
        """Return the current value."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("/proc/self/status has no RssAnon")

    def peak(self) -> float:
        """Return the highest value since the last call."""
        highest, self._peak = max(self._peak, self.now()), 0.0
        return highest

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, self.now())
            time.sleep(SAMPLE)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--rows", type=int, nargs="+", default=ROWS)
    flags.add_argument("--folder", help="where the datasets are written, and read if they exist")
    flags.add_argument("--way", choices=["stored", "streamed"], help="measure --folder here, and print JSON")
    given = flags.parse_args()
    if given.way:
        print(json.dumps(measure_here(Path(given.folder), given.way == "streamed")))
    else:
        sys.exit(0 if main(given) else 1)
