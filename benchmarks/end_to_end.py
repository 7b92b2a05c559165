"""Where does the wall time of a whole run go, and how long does the same take by a stock script?

    python benchmarks/end_to_end.py [--images 2000] [--epochs 3] [--rounds 1] [--json end_to_end.json] [--quick]

Runs `run_captioning.py` and `stock_script.py` in turn, each as a process of its own with an empty cache: training,
an evaluation with 3 beams after each epoch, then loss, captions and scores of validation and test, on phantoms that
are enlarged to 384 pixels and stored as PNG in parquet, and a small BLIP for that size. Ours checks all rows, compares
the splits, scores baselines and all COCO metrics, and writes page and card, too. The ratios are those of the whole
commands, in wall time and in processor time of all their processes. The stages are those of `stages.json`, wall and
processor seconds of the main process. All are medians of the rounds.

Exits with status 1 if a stage other than training, evaluation and captions takes more than a tenth of ours.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import Image
from measure import parser, report
from PIL import Image as PIL

from captioning.data.phantoms import load_phantoms
from captioning.files import PROJECT
from captioning.models.load import build_captioner
from captioning.stages import STAGES_FILE


SIDE, PATCH = 384, 16  # pixels, as BLIP-base
BATCH, TOKENS, RATE, MOST = 16, 40, 1e-3, 0.1
MODEL_STAGES = ("training", "evaluation in training", "prediction")  # each other one may take `MOST` of the time
OURS = ["--use_cpu", "true", "--dataloader_num_workers", "1", "--max_caption_length", "64", "--num_beams", "3"]


def main(arguments) -> bool:
    images = 120 if arguments.quick else arguments.images
    side = 96 if arguments.quick else SIDE
    found: dict[str, list[tuple[tuple, dict]]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        captions = write_data(folder / "data", images, side)
        write_model(folder / "model", captions, side)
        for number in range(arguments.rounds):
            for name in ("ours", "stock")[:: (-1) ** number]:
                found[name].append(run_side(name, folder, number, arguments))
    names = ("wall", "processor")
    seconds = {
        f"{name}, {kind}": statistics.median(times[i] for times, _ in runs)
        for name, runs in found.items()
        for i, kind in enumerate(names)
    }
    stages = {name: median_stages(runs) for name, runs in found.items()}
    rows = []
    for kind in names:
        ours, stock = (seconds[f"{name}, {kind}"] for name in ("ours", "stock"))
        rows.append({"what": f"stock, {images} images, {arguments.epochs:g} epochs: {kind}", "value": f"{stock:.1f}"})
        rows[-1]["ratio"] = stock / ours
        rows.append({"what": f"ours, {kind}", "value": f"{ours:.1f}"})
    total, large = sum(each["seconds"] for each in stages["ours"].values()), []
    for name, own in sorted(stages["ours"].items(), key=lambda item: -item[1]["seconds"]):
        share, beside = own["seconds"] / total, stages["stock"].get(name)
        texts = [" and ".join(f"{value:.1f}" for value in side.values()) for side in (own, beside) if side]
        rows.append({"what": f"{name:<30}{'; stock '.join(texts)}", "value": f"{share:.1%}"})
        large += [name] * (name not in MODEL_STAGES and share > MOST)
    report(arguments, "End to end", rows, seconds=seconds, stages=stages)
    print(f"\nabove {MOST:.0%}, but for training and captions: {', '.join(large) or 'none'}")
    return arguments.quick or not large


def write_data(folder: Path, number: int, side: int) -> list[str]:
    """Write phantoms of `side` pixels, a tenth of them each for validation and test; return the training captions."""
    tenth = number // 10
    folder.mkdir()

    def enlarge(row: dict) -> dict:
        buffer = io.BytesIO()
        PIL.open(io.BytesIO(row["image"]["bytes"])).resize((side, side)).save(buffer, "PNG")
        return {"image": {"bytes": buffer.getvalue(), "path": None}}

    splits = load_phantoms(sizes={"train": number - 2 * tenth, "validation": tenth, "test": tenth})
    for split, rows in splits.items():
        rows = rows.cast_column("image", Image(decode=False)).map(enlarge).cast_column("image", Image())
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return splits["train"]["caption"][:]


def write_model(folder: Path, captions: list[str], side: int) -> None:
    """Save a small BLIP with random weights, for images of `side` pixels."""
    name = "recipes/configs/blip_small.json"
    config = json.loads((PROJECT / name).read_text())
    config["vision_config"] |= {"image_size": side, "patch_size": PATCH}
    captioner = build_captioner(name, 0, None, captions, 400, config)
    for part in (captioner.model, captioner.processor):
        part.save_pretrained(folder)


def run_side(name: str, folder: Path, number: int, arguments) -> tuple[tuple[float, float], dict]:
    """Run a side with an empty cache; return its wall and processor seconds, and what it wrote into `stages.json`.

    The processor seconds are those of all its processes, the stages those of its main process.
    """
    output = folder / f"{name}_{number}"
    model, data = folder / "model", folder / "data"
    sizes = ["--per_device_train_batch_size", BATCH, "--per_device_eval_batch_size", BATCH]
    ours = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, *OURS, *sizes]
    stock = [model, data, output, "--batch_size", BATCH]
    words = ["run_captioning.py", *ours] if name == "ours" else ["benchmarks/stock_script.py", *stock]
    words += ["--num_train_epochs", arguments.epochs, "--max_new_tokens", TOKENS, "--learning_rate", RATE]
    environment = os.environ | {"HF_HOME": str(folder / f"cache_{name}_{number}"), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    log = folder / f"{name}_{number}.log"
    with open(log, "w") as file:
        command = [sys.executable, *map(str, words)]
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, processor = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    print(f"{name}: {wall:.1f} s, processor {processor:.1f}", flush=True)
    if process.returncode:
        sys.exit(log.read_text())
    stages = json.loads((output / STAGES_FILE).read_text())[-1]
    stages["start and end of the process"] = {"seconds": wall - sum(own["seconds"] for own in stages.values())}
    return (wall, processor), stages


def median_stages(runs: list[tuple[tuple, dict]]) -> dict[str, dict[str, float]]:
    """Return the medians of each stage over the runs of a side."""
    names = {name: found for _, stages in runs for name, found in stages.items()}
    return {
        name: {kind: statistics.median(stages.get(name, {}).get(kind, 0) for _, stages in runs) for kind in found}
        for name, found in names.items()
    }


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--images", type=int, default=2000)
    flags.add_argument("--epochs", type=float, default=3)
    flags.set_defaults(rounds=1)
    sys.exit(not main(flags.parse_args()))
