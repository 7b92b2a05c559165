"""The score tables of the report page: numbers as text, and the geometry of the picture beside each score."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from captioning.scoring.baselines import BASELINES, Baseline


LABELS = {
    "Wording, rouge_score": {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"},
    "Wording, ImageCLEF's evaluator": {"imageclef_rouge1": "ROUGE-1", "imageclef_bertscore": "BERTScore"},
    "Wording, pycocoevalcap": {
        "coco_bleu1": "BLEU-1",
        "coco_bleu2": "BLEU-2",
        "coco_bleu3": "BLEU-3",
        "coco_bleu4": "BLEU-4",
        "coco_cider": "CIDEr",
        "coco_meteor": "METEOR",
        "coco_rougeL": "ROUGE-L",
    },
}
CLINICAL = "Content, F1"  # the group of all other scores
PICTURE = {"width": 320, "height": 52, "margin": 8}  # units of the SVG, as are the widths below
LETTER_WIDTH, UPPER_BOUND_WIDTH = 13, 26  # of the label over the line of a baseline, and over that of an upper bound

Score = Mapping[str, Any]  # an entry of `scores` or `modalities` in scores.json
Legend = Mapping[str, Baseline]


def split_tables(split: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of one split.

    Args:
        split: its name.
        scored: what `scoring.score.score` returned for it.
    """
    scores, notes = scored["scores"], scored["baselines"]
    legend = {key: baseline for key, baseline in BASELINES.items() if key in notes}
    groups = {title: [key for key in labels if key in scores] for title, labels in LABELS.items()}
    groups[CLINICAL] = [key for key in scores if not any(key in labels for labels in LABELS.values())]
    return {
        "name": split,
        "captions": scored["captions"],
        "legend": list(legend.values()),
        "groups": [
            (title, [_score_row(key, scores[key], legend) for key in keys]) for title, keys in groups.items() if keys
        ],
        "has_upper_bound": any(score.get("upper_bound") is not None for score in scores.values()),
        "missing": {_label(key, full=True): reason for key, reason in scored["missing"].items()},
        "notes": [
            {
                "name": baseline.name,
                "what": notes[key]["what"],
                "found_among": notes[key].get("found_among"),
                "captions": {"": notes[key]["caption"]} if "caption" in notes[key] else notes[key].get("captions", {}),
            }
            for key, baseline in legend.items()
        ],
        **_modality_table(scored["modalities"]),
    }


def _score_row(key: str, score: Score, legend: Legend) -> dict[str, Any]:
    value, low = score["value"], score["low"]
    cells = []
    for name, baseline in legend.items():
        number = score["baselines"].get(name)
        lost = None not in (number, value) and number >= value
        within = not lost and None not in (number, low) and number >= low
        state = "lost" if lost else "within" if within else ""
        cells.append({"baseline": baseline, "text": _three_digits(number), "state": state})
    return {
        "label": _label(key),
        "value": _three_digits(value),
        "interval": _interval_text(score),
        "cells": cells,
        "upper_bound": _three_digits(score.get("upper_bound")),
        "picture": _picture(_label(key), score, legend),
    }


def _modality_table(modalities: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the table of scores by modality, the largest modality first, all pictures on one scale."""
    keys = {key for modality in modalities.values() for key in modality if key != "captions"}
    known = [key for labels in LABELS.values() for key in labels]
    columns = [key for key in known if key in keys] + sorted(keys.difference(known))
    end = max((_largest(modality["rougeL"]) for modality in modalities.values()), default=0.0)
    return {
        "columns": [_label(key, full=True) for key in columns],
        "modalities": [
            {
                "name": name,
                "captions": modality["captions"],
                "cells": [(_three_digits(modality[key]["value"]), _interval_text(modality[key])) for key in columns],
                "picture": _picture(f"ROUGE-L of {name}", modality["rougeL"], {}, end),
            }
            for name, modality in sorted(modalities.items(), key=lambda item: -item[1]["captions"])
        ],
    }


def _label(key: str, full: bool = False) -> str:
    """Return the name of a score; `full` where no heading says whose implementation it is."""
    for labels in LABELS.values():
        if key in labels:
            family = {"coco": "COCO ", "imageclef": "ImageCLEF "}.get(key.split("_")[0], "")
            return f"{family if full else ''}{labels[key]}"
    return key.removesuffix("_f1").replace("_", " ").capitalize() + (" F1" if full and key.endswith("_f1") else "")


def _interval_text(score: Score) -> str:
    return "" if score["low"] is None else f"{_three_digits(score['low'])} – {_three_digits(score['high'])}"


def _three_digits(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


# --- Pictures -------------------------------------------------------------------------------------------------


def _picture(label: str, score: Score, legend: Legend, end: float | None = None) -> dict[str, Any] | None:
    """Return the picture of a score: its interval as a bar, its baselines and upper bound as lines with labels.

    The axis starts at 0, so that lengths can be compared, and ends at a round number of at least `end`, by default of
    at least the largest number shown.
    """
    value, low = score["value"], score["low"]
    if value is None:
        return None
    end = _round_up(end or _largest(score))
    left, right = PICTURE["margin"], PICTURE["width"] - PICTURE["margin"]

    def x(number: float) -> float:
        return round(left + (right - left) * min(max(number / end, 0), 1), 1)

    marks = [(score["baselines"].get(key), baseline.letter, baseline.name) for key, baseline in legend.items()]
    marks.append((score.get("upper_bound"), "max", "upper bound"))
    marks = sorted(mark for mark in marks if mark[0] is not None)
    said = [
        f"{label} {_three_digits(value)}",
        f"95 % interval {_interval_text(score)}" if low is not None else "no interval",
    ]
    labels = spread_labels(
        [x(number) for number, _, _ in marks],
        [UPPER_BOUND_WIDTH if letter == "max" else LETTER_WIDTH for _, letter, _ in marks],
        right,
    )
    return {
        **PICTURE,
        "y": 0 if marks else 19,  # without the band of the labels where there are none
        "right": right,
        "end": f"{end:g}",
        "point": x(value),
        "interval": None if low is None else (x(low), max(round(x(score["high"]) - x(low), 1), 1.0)),
        "marks": [
            {"x": x(number), "label_x": label_x, "letter": letter, "upper_bound": letter == "max"}
            for (number, letter, _), label_x in zip(marks, labels, strict=True)
        ],
        "said": ", ".join(said + [f"{name} {_three_digits(number)}" for number, _, name in marks]),
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


def _largest(score: Score) -> float:
    numbers = [score["value"], score["high"], score.get("upper_bound"), *score.get("baselines", {}).values()]
    return max((number for number in numbers if number is not None), default=0.0)


def _round_up(number: float) -> float:
    """Return a round number of at least `number`, and 1 where that is not positive."""
    if number <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(number))
    factors = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return round(next(power * factor for factor in factors if power * factor >= number), 12)
