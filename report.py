"""What a run leaves for its reader: the training curve, and a summary on the terminal."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from metrics import METRIC_NAMES
from predictions import read_predictions


EXAMPLES = 3


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
