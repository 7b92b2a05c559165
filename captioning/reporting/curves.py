"""TODO."""

import json
import os
from pathlib import Path

from matplotlib.figure import Figure


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
