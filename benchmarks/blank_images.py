"""Words alone: what do caption loss and self-critical training reach where the image shows nothing?

    OMP_NUM_THREADS=1 python benchmarks/blank_images.py ../shared/data/roco_captions_ccby outputs/blank_images

The folder of captions holds `validation.csv`, which is trained on, and `test.csv`, of which 500 are for validation and
the rest for the test; columns `roco_id` and `caption`. All images are the same gray square. A model cannot tell one
from another, so the most that it can reach is the best constant caption, a baseline of each run. A training that ends
in one caption for all images is no collapse here: the guard against it is off.

The quickstart's model learns from the captions, then from its own samples. What the folder holds is not made again.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

from datasets import Dataset, DatasetDict
from PIL import Image


sys.path.insert(0, str(Path(__file__).parent.parent))
import run_captioning
from captioning.data.phantoms import FEATURES
from captioning.files import PROJECT
from captioning.training import self_critical


VALIDATION = 500
COMMON = ["--max_caption_length", "64", "--max_new_tokens", "60", "--num_beams", "3", "--adam_beta2", "0.98"]
COMMON += ["--per_device_train_batch_size", "64", "--per_device_eval_batch_size", "100", "--weight_decay", "0.05"]
COMMON += ["--warmup_steps", "0.1", "--load_best_model_at_end", "true", "--metric_for_best_model", "rougeL"]
CAPTION_LOSS = ["--config_name", str(PROJECT / "recipes/configs/blip_small.json"), "--vocab_size", "4000"]
CAPTION_LOSS += ["--learning_rate", "1e-3", "--num_train_epochs", "10", "--eval_strategy", "epoch"]
CAPTION_LOSS += ["--save_strategy", "epoch"]
SAMPLES = ["--objective", "self_critical", "--reward", "rougeL", "--num_samples", "5", "--learning_rate", "5e-5"]
SAMPLES += ["--per_device_train_batch_size", "32", "--caption_loss_weight", "1"]
SAMPLES += ["--eval_strategy", "steps", "--eval_steps", "50", "--save_strategy", "steps", "--save_steps", "50"]
SAMPLES += ["--logging_steps", "10", "--eval_on_start", "true"]


def main(captions: Path, folder: Path, steps: int) -> None:
    data = folder / "data"
    if not data.exists():
        test = read(captions / "test.csv")
        splits = {"train": read(captions / "validation.csv")}
        splits |= {"validation": test[:VALIDATION], "test": test[VALIDATION:]}
        rows = {name: Dataset.from_list(rows, features=FEATURES) for name, rows in splits.items()}
        DatasetDict(rows).save_to_disk(data)
    self_critical.COLLAPSED = float("inf")
    more = ["--model_name_or_path", str(folder / "caption_loss"), "--max_steps", str(steps), *SAMPLES]
    for name, flags in {"caption_loss": CAPTION_LOSS, "self_critical": more}.items():
        run = folder / name
        if not (run / "README.md").exists():
            run_captioning.main(["--dataset_name", str(data), "--output_dir", str(run), *COMMON, *flags])
        found = json.loads((run / "scores.json").read_text())["test"]["scores"]["rougeL"]
        constant = found["baselines"]["constant"]
        print(f"{name:<14} rougeL {found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]", end="")
        print(f"   best constant {constant:.4f}   share of it {found['value'] / constant:.3f}")
        with (run / "predictions" / "test.jsonl").open() as lines:
            print(f"               the first caption: {json.loads(next(lines))['prediction']}")


def read(file: Path) -> list[dict]:
    blank = io.BytesIO()
    Image.new("L", (48, 48), 128).save(blank, "PNG")
    image = {"bytes": blank.getvalue(), "path": None}
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [{"image_id": row["roco_id"], "caption": row["caption"]} for row in csv.DictReader(lines)]
    return [row | {"image": image, "cui": []} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="of self-critical training: 200")
    arguments = parser.parse_args()
    main(arguments.captions, arguments.folder, arguments.steps)
