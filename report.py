"""What a run leaves for its reader: predictions as JSON lines, and a summary on the terminal."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from metrics import rouge


SUMMARY_ROWS = ("loss", "perplexity", "rouge1", "rouge2", "rougeL", "gen_len", "unique_captions")
EXAMPLES = 3


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
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        for image_id, reference, prediction, score, loss in zip(
            image_ids, references, predictions, scores, nll, strict=True
        ):
            row = {"image_id": image_id, "reference": reference, "prediction": prediction}
            file.write(json.dumps(row | {"rougeL": float(score), "nll": float(loss)}, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def read_predictions(path: Path) -> list[dict[str, object]]:
    """Read a file of `write_predictions`."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def summary(metrics: Mapping[str, float], predictions_dir: Path) -> str:
    """Return a table of the validation and test scores, and three captions of the last split with their references.

    They are the first, not the best: an example is a sample.
    """
    columns = {
        name: prefix for name, prefix in (("validation", "eval_"), ("test", "predict_")) if f"{prefix}loss" in metrics
    }
    lines = [" " * 18 + "".join(f"{name:>12}" for name in columns)]
    for row in SUMMARY_ROWS:
        values = [metrics.get(prefix + row) for prefix in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{row:<18}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values))
    files = [predictions_dir / f"{name}.jsonl" for name in columns]
    for example in read_predictions(files[-1])[:EXAMPLES] if files and files[-1].is_file() else ():
        lines += ["", f"{example['image_id']}", f"  reference   {example['reference']}"]
        lines += [f"  prediction  {example['prediction']}   (rougeL {example['rougeL']:.2f})"]
    return "\n".join(lines)
