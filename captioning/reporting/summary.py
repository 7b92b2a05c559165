"""What a run leaves for its reader: the training curve, a summary on the terminal; and the check of a submission.

python report.py check outputs/my-run/submission.csv --references test_captions.csv
"""

import json
from collections.abc import Mapping
from pathlib import Path

from captioning.scoring.baselines import BASELINES
from captioning.scoring.captions import printable, read_predictions
from captioning.scoring.score import HEADLINE
from metrics import METRIC_NAMES


EXAMPLES = 3
SHOWN_FAULTS = 20


def summary(metrics: Mapping[str, float], output_dir: Path) -> str:
    """Return a table of the scores with the baselines of ROUGE-L, the verdicts, and three captions of the last split.

    They are the first, not the best: an example is a sample.
    """
    columns = {
        name: prefix for name, prefix in (("validation", "eval_"), ("test", "predict_")) if f"{prefix}loss" in metrics
    }
    rows = {name: name for name in METRIC_NAMES}
    rows |= {f"{HEADLINE}_{key}": f"{HEADLINE} of {baseline.heading}" for key, baseline in BASELINES.items()}
    lines = [" " * 24 + "".join(f"{name:>12}" for name in columns)]
    for row, label in rows.items():
        values = [metrics.get(prefix + row) for prefix in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{label:<24}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values))
    scores = output_dir / "scores.json"
    verdicts = json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else {}
    lines += [f"{name}: {verdicts[name]['verdict']}" for name in columns if name in verdicts]
    files = [output_dir / "predictions" / f"{name}.jsonl" for name in columns]
    for example in read_predictions(files[-1])[:EXAMPLES] if files and files[-1].is_file() else ():
        lines += ["", printable(example["image_id"]), f"  reference   {printable(example['reference'])}"]
        lines += [f"  prediction  {printable(example['prediction'])}   (rougeL {example['rougeL']:.2f})"]
    return "\n".join(lines)
