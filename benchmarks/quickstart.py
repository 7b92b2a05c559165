"""Has the quickstart learned to look? Its scores on the phantoms' test split beside what bounds them.

    python benchmarks/quickstart.py outputs/quickstart

Four figures, each with its target: `rougeL` as a share of that of an oracle, which knows every attribute and picks a
wording at random; the share of each attribute that is stated correctly; what `rougeL` loses when the same model
captions *shuffled* test images; and the minutes of training. Ends with status 1 if a target is missed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig


sys.path.insert(0, str(Path(__file__).parent.parent))
from phantom_attributes import attribute_accuracy, oracle_captions

from captioning.data.images import open_image
from captioning.data.sources import load_source
from captioning.models.load import load_captioner
from captioning.scoring.baselines import shuffled
from captioning.scoring.captions import read_predictions
from metrics import rouge


ORACLE_SEEDS = 5
BATCH_SIZE = 100


def main(folder: Path) -> bool:
    rows = read_predictions(folder / "predictions" / "test.jsonl")
    references = [row["reference"] for row in rows]
    predictions = [row["prediction"] for row in rows]
    results = json.loads((folder / "all_results.json").read_text())
    rouge_l = mean_rouge_l(predictions, references)
    oracle = np.mean([mean_rouge_l(oracle_captions(references, seed), references) for seed in range(ORACLE_SEEDS)])
    shuffled = mean_rouge_l(captions_of_shuffled_images(folder, len(rows)), references)
    attributes = attribute_accuracy(predictions, references)
    print(f"test captions {len(rows)}, rougeL {rouge_l:.4f}, oracle {oracle:.4f}, shuffled images {shuffled:.4f}\n")
    figures = [("share of the oracle's rougeL", rouge_l / oracle, 0.90, 1)]
    figures += [(f"{name} correct", share, 0.90, 1) for name, share in attributes.items()]
    figures += [("rougeL above shuffled images", rouge_l - shuffled, 0.20, 1)]
    figures += [("training, minutes", results["train_runtime"] / 60, 3.0, -1)]
    for name, value, target, sign in figures:
        print(
            f"{name:<30}{value:8.3f}   target {target:.2f}   {'reached' if sign * (value - target) >= 0 else 'MISSED'}"
        )
    return all(sign * (value - target) >= 0 for _, value, target, sign in figures)


def mean_rouge_l(predictions: list[str], references: list[str]) -> float:
    return float(rouge(predictions, references)["rougeL"].mean())


@torch.no_grad()
def captions_of_shuffled_images(folder: Path, number: int) -> list[str]:
    """Caption the first `number` test images in another order, none in its own place, by stock `generate`."""
    captioner = load_captioner(str(folder))  # which is stock until `adapt`
    settings = GenerationConfig.from_pretrained(folder)
    images = load_source("phantoms")["test"].select_columns("image")
    captions = []
    rows = shuffled(range(number))
    for start in range(0, number, BATCH_SIZE):
        chosen = [open_image(images[row]["image"]) for row in rows[start : start + BATCH_SIZE]]
        pixel_values = captioner.pixel_values(chosen)
        tokens = captioner.model.eval().generate(pixel_values=pixel_values, generation_config=settings)
        captions += captioner.decode(tokens[:, 1:].numpy())
    return captions


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
