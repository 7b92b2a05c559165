"""The scores on the report page: their names and numbers as text, and the geometry of the picture beside each."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from captioning.scoring.baselines import Baseline


LABELS = {
    "Wording, rouge_score": {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"},
    "Wording, ImageCLEF's evaluator": {"imageclef_rouge1": "ROUGE-1", "imageclef_bertscore": "BERTScore"},
    "Wording, pycocoevalcap": {
        **{f"coco_bleu{n}": f"BLEU-{n}" for n in range(1, 5)},
        "coco_cider": "CIDEr",
        "coco_meteor": "METEOR",
        "coco_rougeL": "ROUGE-L",
    },
}
CLINICAL = "Content, F1"  # the group of all other scores
PICTURE = {"width": 320, "height": 52, "margin": 8}  # units of the SVG, as are the widths below
LETTER_WIDTH, REFERENCES_WIDTH = 13, 26  # of the label over the line of a baseline, and over that of the references

Score = Mapping[str, Any]  # an entry of `scores` or `modalities` in scores.json
Legend = Mapping[str, Baseline]


# --- Tables ---------------------------------------------------------------------------------------------------


def score_groups(keys: Collection[str]) -> dict[str, list[str]]:
    """Return the keys of scores by the heading that says whose scores they are."""
    groups = {heading: [key for key in labels if key in keys] for heading, labels in LABELS.items()}
    known = {"captions"}.union(*LABELS.values())
    groups[CLINICAL] = [key for key in keys if key not in known]
    return {heading: found for heading, found in groups.items() if found}


def score_label(key: str, full: bool = False) -> str:
    """Return the name of a score; `full` where no heading says whose implementation it is."""
    for labels in LABELS.values():
        if key in labels:
            family = {"coco": "COCO ", "imageclef": "ImageCLEF "}.get(key.split("_")[0], "")
            return f"{family if full else ''}{labels[key]}"
    return key.removesuffix("_f1").replace("_", " ").capitalize() + (" F1" if full and key.endswith("_f1") else "")


def three_digits(number: float | None) -> str:
    """Return a number as text, a dash for None."""
    return "–" if number is None else f"{number:.3f}"


def interval_text(score: Score) -> str:
    """Return the confidence interval of a score as text, empty if it has none."""
    return "" if score["low"] is None else f"{three_digits(score['low'])} – {three_digits(score['high'])}"


def standing(baseline: float | None, score: Score) -> str:
    """Return `lost` if a baseline is above the score, `within` if it is in the score's interval, or ``.

    A tie is no loss: nothing is above a perfect score.
    """
    value, low = score["value"], score["low"]
    if None not in (baseline, value) and baseline > value:
        return "lost"
    return "within" if None not in (baseline, low) and low <= baseline < value else ""


# --- Pictures -------------------------------------------------------------------------------------------------


def score_picture(label: str, score: Score, legend: Legend, end: float | None = None) -> dict[str, Any] | None:
    """Return the picture of a score: its interval as a bar, its baselines and the references as lines with labels.

    The axis starts at 0, so that lengths compare, and ends at a round number of at least `end` (default: all shown).
    """
    value, low = score["value"], score["low"]
    if value is None:
        return None
    left, right = PICTURE["margin"], PICTURE["width"] - PICTURE["margin"]
    marks = [(score["baselines"].get(key), baseline.letter, baseline.name) for key, baseline in legend.items()]
    marks = sorted(mark for mark in [*marks, (score.get("references"), "ref", "references")] if mark[0] is not None)
    end = _round_up(end or max([largest_number([score]), *(number for number, _, _ in marks)]))

    def x(number: float) -> float:
        return round(left + (right - left) * min(max(number / end, 0), 1), 1)

    widths = [REFERENCES_WIDTH if letter == "ref" else LETTER_WIDTH for _, letter, _ in marks]
    labels = spread_labels([x(number) for number, _, _ in marks], widths, right)
    interval = "no interval" if low is None else f"95 % interval {interval_text(score)}"
    alternative = [f"{label} {three_digits(value)}", interval]
    alternative += [f"{name} {three_digits(number)}" for number, _, name in marks]
    return {
        **PICTURE,
        "y": 0 if marks else 19,  # without the band of the labels where there are none
        "right": right,
        "end": f"{end:g}",
        "point": x(value),
        "interval": None if low is None else (x(low), max(round(x(score["high"]) - x(low), 1), 1.0)),
        "marks": [
            {"x": x(number), "label_x": label_x, "letter": letter, "references": letter == "ref"}
            for (number, letter, _), label_x in zip(marks, labels, strict=True)
        ],
        "alternative": ", ".join(alternative),
    }


def spread_labels(wanted: Sequence[float], widths: Sequence[float], right: float) -> list[float]:
    """Return the ascending positions, moved apart so that labels of these widths do not touch, none beyond `right`."""
    positions: list[float] = []
    for at, width in zip(wanted, widths, strict=True):
        after = positions[-1] + (widths[len(positions) - 1] + width) / 2 if positions else 0.0
        positions.append(max(at, after))
    for i in reversed(range(len(positions))):
        limit = right if i == len(positions) - 1 else positions[i + 1] - (widths[i] + widths[i + 1]) / 2
        positions[i] = min(positions[i], limit)
    return [round(position, 1) for position in positions]


def largest_number(scores: Iterable[Score]) -> float:
    """Return the largest number that the pictures of these scores show, 0 if there is none."""
    numbers = [score.get(key) for score in scores for key in ("value", "high", "references")]
    return max((number for number in numbers if number is not None), default=0.0)


def _round_up(number: float) -> float:
    """Return a round number of at least `number`, and 1 where that is not positive."""
    if number <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(number))
    factors = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return round(next(power * factor for factor in factors if power * factor >= number), 12)
