"""The scores on the report page: their names and numbers as text, and the geometry of the bar beside each."""

from collections.abc import Collection, Mapping
from typing import Any

from captioning.scoring.baselines import BASELINES
from captioning.scoring.clinical import ATTRIBUTES
from captioning.scoring.score import HEADLINE


LABELS = {
    "Wording, rouge_score": {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"},
    "Wording, ImageCLEF's evaluator": {"imageclef_rouge1": "ROUGE-1", "imageclef_bertscore": "BERTScore"},
}
LABELS |= {
    f"Wording, {tool}": {f"{prefix}_bleu{n}": f"BLEU-{n}" for n in range(1, 5)}
    | {f"{prefix}_cider": "CIDEr", f"{prefix}_meteor": "METEOR", f"{prefix}_rougeL": "ROUGE-L"}
    for prefix, tool in {"coco": "pycocoevalcap", "nlgeval": "nlg-eval: pycocoevalcap on words between blanks"}.items()
}
CLINICAL = "Content, F1"  # the group of all other scores
# In this order those at the top of the page, with what they measure
HEADLINES = {
    HEADLINE: "words in common with the reference, in its order",
    "coco_cider": "phrases in common, rare ones count more",
    "concept_f1": "concepts of the image that the caption names",
    "laterality_f1": "sides: left, right, bilateral",
    "modality_f1": "modalities: CT, MRI, X-ray, ...",
    "rouge1": "words in common with the reference, in any order",
}
SHOWN_HEADLINES = 3

Score = Mapping[str, Any]  # an entry of `scores` or `modalities` in scores.json


# --- Text -----------------------------------------------------------------------------------------------------


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
            family = {"coco": "COCO ", "nlgeval": "nlg-eval ", "imageclef": "ImageCLEF "}.get(key.split("_")[0], "")
            return f"{family if full else ''}{labels[key]}"
    return key.removesuffix("_f1").replace("_", " ").capitalize() + (" F1" if full and key.endswith("_f1") else "")


def three_digits(number: float | None, sign: str = "") -> str:
    """Return a number as text, a dash for None."""
    return "–" if number is None else f"{number:{sign}.3f}".replace("-", "−")


def interval_text(score: Score, sign: str = "") -> str:
    """Return the confidence interval of a score as text, empty if it has none."""
    low, high = (three_digits(score[end], sign) for end in ("low", "high"))
    return "" if score["low"] is None else f"{low} – {high}"


def standing(baseline: float | None, score: Score) -> str:
    """Return `lost` if a baseline is above the score, `within` if it is in the score's interval, or ``.

    A tie is no loss: nothing is above a perfect score.
    """
    value, low = score["value"], score["low"]
    if None not in (baseline, value) and baseline > value:
        return "lost"
    return "within" if None not in (baseline, low) and low <= baseline < value else ""


def headline(summary: Mapping[str, Any]) -> str:
    """Return in plain words whether the captions of a split are worth more than those of the baselines."""
    score = summary["scores"][HEADLINE]
    higher = [BASELINES[key].name for key, own in score["baselines"].items() if standing(own, score) == "lost"]
    if not summary["beats_constant"]:
        return "The model does not beat one constant caption for all images"
    return (
        f"Better than a constant caption, but below: {', '.join(higher)}" if higher else "Better than every baseline"
    )


def never_stated(key: str, score: Score) -> str:
    """Return what a bare 0 of an attribute means, empty where the captions state some."""
    if score.get("predicted") != 0 or not score["stated"]:
        return ""
    verb = "negates" if key == "negation_f1" else f"states a {score_label(key).lower()}"
    return f"The model never {verb}: the references do {score['stated']:,} times"


# --- Bars -----------------------------------------------------------------------------------------------------


def bar(score: Score, end: float, key: str = "value") -> dict[str, float | None]:
    """Return the geometry of a bar in percent of an axis from 0 to `end`, of a difference from -`end`.

    `start` and `width` are those of the bar, `low` and `span` of its interval; None where there is none.
    """
    zero, scale = (50, 50) if key == "difference" else (0, 100)

    def at(number: float | None) -> float | None:
        return None if number is None else round(zero + scale * max(-1, min(1, number / (end or 1))), 1)

    value, low, high = (at(score.get(name)) for name in (key, "low", "high"))
    start, stop = sorted((zero, zero if value is None else max(value, 0)))
    span = None if low is None else max(round(high - low, 1), 0.5)
    return {"start": start, "width": round(stop - start, 1), "low": low, "span": span, "zero": zero}


def headline_bars(scored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each score at the top its name, what it measures, and as bars the model among its baselines."""
    shown = []
    for key, what in HEADLINES.items():
        score = scored["scores"].get(key, {"value": None})
        if score["value"] is None or len(shown) == SHOWN_HEADLINES:
            continue
        entries = {"this model": score} | {
            BASELINES[name].name: {"value": v} for name, v in score["baselines"].items()
        }
        entries = {name: entry for name, entry in entries.items() if entry["value"] is not None}
        end = max([1e-9, score["high"] or 0, *(entry["value"] for entry in entries.values())])
        ranked = sorted(entries.items(), key=lambda item: -item[1]["value"])
        bars = [{"name": name, "score": entry, "bar": bar(entry, end)} for name, entry in ranked]
        shown.append({"label": score_label(key, full=True), "what": what, "bars": bars})
    return shown


def modality_columns(scored: Mapping[str, Any]) -> dict[str, str]:
    """Return by key the names of the scores that modalities have."""
    keys = next(iter(scored["modalities"].values()), {})
    return {key: score_label(key, full=True) for group in score_groups(keys).values() for key in group}


def attributes_of(scored: Mapping[str, Any]) -> dict[str, Score]:
    """Return the scores of attributes that have a precision and a recall behind them."""
    keys = (f"{name}_f1" for name in ATTRIBUTES)
    return {key: scored["scores"][key] for key in keys if "stated" in scored["scores"].get(key, {})}
