"""Has the quickstart learned to look? Its scores on the phantoms' test split beside what bounds them.

    python benchmarks/quickstart.py outputs/quickstart

Four figures, each with its target: `rougeL` as a share of the oracle's (which knows every attribute and words it
anew), the share of each attribute that is said right, what `rougeL` loses when the same model captions *shuffled* test
images, and the minutes of training. Ends with status 1 if a target is missed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BlipForConditionalGeneration, GenerationConfig


sys.path.insert(0, str(Path(__file__).parent.parent))
from captioning.data.phantoms import attribute_accuracy, oracle_captions
from captioning.data.sources import load_source
from captioning.models.blip import load_blip
from captioning.scoring.captions import read_predictions
from collator import CaptioningCollator
from metrics import decode_captions, rouge


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
    figures += [(f"{name} right", share, 0.90, 1) for name, share in attributes.items()]
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
    """Caption the first `number` test images in another order, each moved, by stock `generate`."""
    model, processor = load_blip(str(folder))
    assert type(model) is BlipForConditionalGeneration
    settings = GenerationConfig.from_pretrained(folder)
    collator = CaptioningCollator(processor, model.config.text_config.bos_token_id)
    images = load_source("phantoms")["test"].select_columns("image")
    order = np.random.default_rng(0).permutation(number)
    moved = np.empty(number, dtype=int)
    moved[order] = np.roll(order, 1)  # a cycle through all of them leaves none in its place
    captions = []
    for start in range(0, number, BATCH_SIZE):
        pixel_values = collator.pixel_values([images[int(row)] for row in moved[start : start + BATCH_SIZE]])
        tokens = model.eval().generate(pixel_values=pixel_values, generation_config=settings)
        captions += decode_captions(tokens[:, 1:].numpy(), processor.tokenizer)
    return captions


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
