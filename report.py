"""What a run leaves for its reader: predictions as JSON lines, the training curve, a summary on the terminal."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from metrics import METRIC_NAMES, rouge


EXAMPLES = 3
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


def draw_training_curve(output_dir: Path) -> None:
    """Draw `training_curve.png` from `trainer_state.json`: losses in nats and ROUGE-L, by optimizer step.

    A run that did not train has none.
    """
    state = output_dir / "trainer_state.json"
    if not state.is_file():
        return
    log = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")  # inches; not pyplot, which keeps global state
    losses, scores = figure.subplots(1, 2)
    for axes, key, label in (
        (losses, "loss", "training"),
        (losses, "eval_loss", "validation"),
        (scores, "eval_rougeL", "validation"),
    ):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="" if key == "loss" else "o", label=label)
            axes.legend(frameon=False)
    losses.set(xlabel="step", ylabel="loss (nats a token)")
    scores.set(xlabel="step", ylabel="ROUGE-L")
    unfinished = output_dir / "training_curve.png.tmp"
    figure.savefig(unfinished, format="png", metadata={"Software": None})
    os.replace(unfinished, output_dir / "training_curve.png")


def summary(metrics: Mapping[str, float], predictions_dir: Path) -> str:
    """Return a table of the validation and test scores, and three captions of the last split with their references.

    They are the first, not the best: an example is a sample.
    """
    columns = {
        name: prefix for name, prefix in (("validation", "eval_"), ("test", "predict_")) if f"{prefix}loss" in metrics
    }
    lines = [" " * 18 + "".join(f"{name:>12}" for name in columns)]
    for row in METRIC_NAMES:
        values = [metrics.get(prefix + row) for prefix in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{row:<18}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values))
    files = [predictions_dir / f"{name}.jsonl" for name in columns]
    for example in read_predictions(files[-1])[:EXAMPLES] if files and files[-1].is_file() else ():
        lines += ["", f"{example['image_id']}", f"  reference   {example['reference']}"]
        lines += [f"  prediction  {example['prediction']}   (rougeL {example['rougeL']:.2f})"]
    return "\n".join(lines)
