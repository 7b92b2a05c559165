"""What does the tokenizer cost, and what does the learned surface form bring back?

    python benchmarks/surface_form.py train_captions.csv test_captions.csv --vocab vocab [--json surface_form.json]

The form is learned on the first file; the captions of the second are encoded, decoded, restored and scored against
themselves: no model scores more. Files have a column `Caption` or `caption`; `vocab` is a folder with `vocab.txt` of
BERT. The tokenizer also loses accents, and with them words of ROUGE: "without accents" are the true captions but for
these, and no form scores more. "right case" is the share of words of letters, where all words are found again.
"""

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import processor

from captioning.models.surface_form import SurfaceForm, without_accents
from captioning.models.tokenizer import load_tokenizer
from captioning.scoring.coco import coco_tokens
from captioning.scoring.ngrams import ngram_scores
from metrics import imageclef_rouge1, rouge


WORD = re.compile(r"[^\W\d_]+")
LEARNED, RESTORED = 60_000, 10_000  # captions, about ROCOv2's training and test split


def main(arguments: argparse.Namespace) -> None:
    learned, captions, tokenizer = read(arguments.train), read(arguments.test), load_tokenizer(str(arguments.vocab))
    of_training, decoded = (decode(tokenizer, texts) for texts in (learned, captions))
    start = time.process_time()
    form = SurfaceForm.learn(learned, of_training)
    seconds = {LEARNED: (time.process_time() - start) / len(learned) * LEARNED}
    start = time.process_time()
    restored = [form.restore(text) for text in decoded]
    seconds[RESTORED] = (time.process_time() - start) / len(captions) * RESTORED
    plain = [without_accents(caption) for caption in captions]
    kept = [(text, caption) for text, caption, own in zip(restored, captions, plain, strict=True) if own == caption]
    scores = {
        "decoded": score_all(decoded, captions),
        "restored": score_all(restored, captions),
        "without accents": score_all(plain, captions),
        f"restored, {len(kept)} without accents": score_all(*zip(*kept, strict=True)),
    }
    print(f"{processor()}; learned on {len(learned)} captions, {len(form.forms)} forms; scored on {len(captions)}")
    print("; ".join(f"{number} captions: {value:.1f} s" for number, value in seconds.items()), "\n")
    for name, row in scores.items():
        print(f"{name:<32}" + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "scores": scores}, indent=2) + "\n")


def read(path: Path) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return [row.get("caption") or row.get("Caption") or "" for row in csv.DictReader(file)]


def decode(tokenizer, captions: list[str]) -> list[str]:
    tokens = tokenizer(captions, add_special_tokens=False, verbose=False)["input_ids"]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def score_all(texts: Sequence[str], captions: Sequence[str]) -> dict[str, float]:
    words = [(WORD.findall(a), WORD.findall(without_accents(b))) for a, b in zip(texts, captions, strict=True)]
    found = [pair for pair in words if " ".join(pair[0]).lower() == " ".join(pair[1]).lower()]
    cases = [a == b for pair in found for a, b in zip(*pair, strict=True)]
    bleu = ngram_scores({"": coco_tokens(texts, "ptb")}, coco_tokens(captions, "ptb"))[""]["bleu4"]
    return {
        "imageclef_rouge1": float(imageclef_rouge1(texts, captions).mean()),
        "rougeL": float(rouge(texts, captions)["rougeL"].mean()),
        "coco_bleu4": bleu.value,
        "right case": float(np.mean(cases)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("train", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--vocab", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
