"""Captions on disk: the predictions of a run as JSON lines."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics import rouge


PREDICTION_KEYS = ("image_id", "reference", "prediction", "rougeL", "nll")


def write_predictions(
    path: Path, image_ids: Sequence[str], references: Sequence[str], predictions: Sequence[str], nll: np.ndarray
) -> None:
    """Write one JSON object a line: `image_id`, `reference`, `prediction`, `rougeL`, `nll`.

    Args:
        path: the file; it appears whole or not at all.
        image_ids: N ids.
        references: N full captions.
        predictions: N generated captions.
        nll: `[N]`, the negative log-likelihood of the whole reference in nats.
    """
    scores = rouge(predictions, references)["rougeL"]
    rows = zip(image_ids, references, predictions, scores.tolist(), nll.tolist(), strict=True)
    lines = [json.dumps(dict(zip(PREDICTION_KEYS, row, strict=True)), ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{line}\n" for line in lines))


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears whole or not at all, also if the process is killed."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def read_predictions(path: Path) -> list[dict[str, object]]:
    """Read a file of `write_predictions`."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
