"""What does each step of docs/scores.md give on the quickstart, over several seeds?

    OMP_NUM_THREADS=1 python benchmarks/higher_scores.py outputs/higher_scores [--seeds 42 43 44]

For each seed it trains the quickstart, tunes the decoding on validation, averages the last two checkpoints, and goes
on with self-critical training. All systems caption the 400 test images, and 2,000 fresh images of the same
combinations of attributes. Differences of ROUGE-L are from the row "surface form" of the same seed, the quickstart as
it is. Their 95 % intervals are the bootstrap's over the captions of all seeds; how much the training matters is to be
seen in the differences of the single seeds, on fresh images.

What a folder holds is not computed again. About 40 minutes on one core.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).parent.parent))
from phantom_attributes import attribute_accuracy

from captioning.data.images import open_image
from captioning.data.phantoms import load_phantoms
from captioning.files import PROJECT
from captioning.models.load import load_captioner
from captioning.scoring.bootstrap import Score, compare, resampling_counts
from captioning.training.decoding import generation_config
from metrics import wording_scores


FRESH = {"test": 2000}  # and seed 1, where the quickstart's images have seed 0
BATCH_SIZE = 100
TUNE = ["--do_train", "false", "--do_predict", "false", "--tune_decoding", "true"]
# Of each system: the run that holds the weights, that whose settings it decodes by, and whether it restores the form
SYSTEMS = {
    "plain": ("base", "base", False),
    "surface form": ("base", "base", True),
    "tuned decoding": ("base", "base-tuned", True),
    "average of 2 checkpoints": ("averaged", "base", True),
    "self-critical": ("critical", "critical", True),
    "self-critical, tuned decoding": ("critical", "critical-tuned", True),
}


def main(folder: Path, seeds: list[int]) -> None:
    data = {"test": load_phantoms(0)["test"], "fresh": load_phantoms(1, FRESH)["test"]}
    scores = {}
    for seed in seeds:
        runs = folder / str(seed)
        train(runs, seed)
        for system in SYSTEMS:
            file = runs / f"{system}.json"
            if not file.exists():
                captions = {name: caption(runs, *SYSTEMS[system], rows) for name, rows in data.items()}
                file.write_text(json.dumps(captions))
            captions = json.loads(file.read_text())
            for name, rows in data.items():
                scores[seed, system, name] = measure(captions[name], list(rows["caption"]))
    print_table(scores, seeds)


# --- Runs -----------------------------------------------------------------------------------------------------


def train(runs: Path, seed: int) -> None:
    """Make all runs of a seed that are not there yet."""
    base = ["--model_name_or_path", str(runs / "base")]
    run(runs / "base", "quickstart", "--seed", str(seed), "--save_total_limit", "4")
    average(runs / "base", runs / "averaged")
    run(runs / "critical", "quickstart_self_critical", "--seed", str(seed), *base)
    for name in ("base", "critical"):
        run(runs / f"{name}-tuned", "quickstart", "--model_name_or_path", str(runs / name), *TUNE)


def run(folder: Path, recipe: str, *flags: str) -> None:
    """Run a recipe into a folder, unless it is done."""
    if not (folder / "README.md").exists():
        script = [sys.executable, str(PROJECT / "run_captioning.py"), str(PROJECT / "recipes" / f"{recipe}.json")]
        subprocess.run([*script, "--output_dir", str(folder), *flags], check=True, stdout=sys.stderr)


def average(run_folder: Path, folder: Path) -> None:
    """Make a model whose weights are the mean of those of the last two checkpoints of a run."""
    checkpoints = sorted(run_folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2:]
    first, second = (load_file(path / "model.safetensors") for path in checkpoints)
    shutil.copytree(checkpoints[-1], folder, dirs_exist_ok=True)
    means = {name: (value + second[name]) / 2 if value.is_floating_point() else value for name, value in first.items()}
    save_file(means, folder / "model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def caption(runs: Path, weights: str, settings: str, restore: bool, rows: Dataset) -> list[str]:
    """Caption rows by the model of a run and the decode settings of another."""
    captioner = load_captioner(str(runs / weights))
    captioner.adapt()
    captioner.model.eval()
    if not restore:
        captioner.surface_form = None
    config = generation_config(json.loads((runs / settings / "recipe.json").read_text()))
    images = rows.select_columns("image")
    captions = []
    for start in range(0, len(rows), BATCH_SIZE):
        chosen = [open_image(images[row]["image"]) for row in range(start, min(start + BATCH_SIZE, len(rows)))]
        batch = captioner.collate(chosen, [[*captioner.prompt_row, captioner.end_token_id]] * len(chosen))
        with captioner.evaluation():
            captions += captioner.decode(captioner.generate(captioner.encode_images(batch), config).numpy())
    return captions


# --- Scores ---------------------------------------------------------------------------------------------------


def measure(captions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """Return the scores of each caption, `[N]`, and the share of attributes that are right, `[1]`."""
    attributes = np.mean(list(attribute_accuracy(captions, references).values()))
    return dict(wording_scores(tuple(captions), tuple(references))) | {"attributes": np.array([attributes])}


def print_table(scores: dict, seeds: list[int]) -> None:
    print("| | test | difference | fresh | difference | of each seed | ImageCLEF ROUGE-1 | attributes |")
    print("|---|---|---|---|---|---|---|---|")
    for system in SYSTEMS:

        def of(data: str, score: str, system: str = system) -> np.ndarray:
            """Return the scores of all captions of all seeds."""
            return np.concatenate([scores[seed, system, data][score] for seed in seeds])

        cells = []
        for data in ("test", "fresh"):
            own, start = of(data, "rougeL"), of(data, "rougeL", "surface form")
            found = compare(Score.of(own), Score.of(start), resampling_counts(len(own)))
            cells += [f"{own.mean():.3f}", f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"]
        cells += [", ".join(f"{value:+.3f}" for value in (own - start).reshape(len(seeds), -1).mean(axis=1))]
        cells += [f"{of('fresh', 'imageclef_rouge1').mean():.3f}", f"{of('fresh', 'attributes').mean():.3f}"]
        print(f"| {system} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    main(arguments.folder, arguments.seeds)
