"""The summary that a run prints at its end."""

from collections.abc import Mapping

from captioning.errors import printable
from captioning.reporting.run_record import SPLITS, RunRecord
from captioning.reporting.score_table import CAPTION_WIDTH, detection_rows, not_computed, number_text
from captioning.scoring.baselines import BASELINES
from captioning.scoring.score import HEADLINE
from metrics import METRIC_NAMES


EXAMPLES = 3


def summary(metrics: Mapping[str, float], record: RunRecord) -> str:
    """Return metrics and baselines of ROUGE-L as a table, verdicts, leaks, what is missing, and three captions.

    The captions are the first of the last split, not the best: they are examples.
    """
    columns = {split: prefix for split, prefix in reversed(SPLITS.items()) if f"{prefix}_loss" in metrics}
    rows = {name: name for name in METRIC_NAMES}
    rows |= {f"{HEADLINE}_{key}": f"{HEADLINE} of {baseline.name}" for key, baseline in BASELINES.items()}
    lines = [" " * 34 + "".join(f"{split:>12}" for split in columns)]
    for row, label in rows.items():
        values = [metrics.get(f"{prefix}_{row}") for prefix in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{label:<34}" + "".join(f"{number_text(value):>12}" for value in values))
    scored = {split: record.scores[split] for split in columns if split in record.scores}
    lines += [f"{split}: {scores['verdict']}" for split, scores in scored.items()]
    for split, scores in scored.items():
        if "concept_detection" in scores:
            systems = [f"{name} {f1}" for name, f1, *_ in detection_rows(scores["concept_detection"])]
            lines.append(f"{split}: concepts, F1: {', '.join(systems)}")
    lines += record.leaks
    lines += dict.fromkeys(line for scores in scored.values() for line in not_computed(scores))
    for example in record.predictions(list(columns)[-1])[:EXAMPLES] if columns else ():
        texts = (example[key] for key in ("image_id", "reference", "prediction"))
        image_id, reference, prediction = (printable(text, CAPTION_WIDTH) for text in texts)
        lines += ["", image_id, f"  reference   {reference}"]
        lines += [f"  prediction  {prediction}   (rougeL {example['rougeL']:.2f})"]
    return "\n".join(lines)
