"""The scores on the report page: their names and numbers as text, and the geometry of the bar beside each."""

from collections.abc import Mapping
from typing import Any

from captioning.scoring.baselines import BASELINES
from captioning.scoring.concept_detection import SYSTEMS
from captioning.scoring.score import HEADLINE


LABELS = {
    "Wording, rouge_score": {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"},
    "Wording, ImageCLEF's evaluator": {"imageclef_rouge1": "ROUGE-1", "imageclef_bertscore": "BERTScore"}
    | {"imageclef_bleurt": "BLEURT", "imageclef_alignscore": "AlignScore", "imageclef_medcat_f1": "MedCAT F1"}
    | {"imageclef_similarity": "similarity"},
}
_NLG_EVAL = "nlg-eval: pycocoevalcap on words between white space"
LABELS |= {
    f"Wording, {tool}": {f"{prefix}_bleu{n}": f"BLEU-{n}" for n in range(1, 5)}
    | {f"{prefix}_cider": "CIDEr", f"{prefix}_meteor": "METEOR", f"{prefix}_rougeL": "ROUGE-L"}
    for prefix, tool in (
        ("coco", "pycocoevalcap"),
        ("nlgeval", _NLG_EVAL),
        ("nlgeval_lower", f"{_NLG_EVAL}, lower case"),
    )
}
_FAMILIES = {"coco": "COCO ", "imageclef": "ImageCLEF "}
_FAMILIES |= {"nlgeval": "nlg-eval ", "nlgeval_lower": "nlg-eval, lower case: "}
CLINICAL = "Content, F1"  # the group of all other scores
REWARDED = "Rewarded in training; the scores below were held out"
# The first three of these that there are stand at the top of the page, with what they measure
HEADLINES = {
    HEADLINE: "words in common with the reference, in its order",
    "coco_cider": "phrases in common, rare ones count more",
    "concept_f1": "concepts of the image that the caption names",
    "laterality_f1": "sides: left, right, bilateral",
    "modality_f1": "modalities: CT, MRI, X-ray, ...",
    "rouge1": "words in common with the reference, in any order",
}

DETECTION_COLUMNS = {"concept_detection_f1": "F1", "concept_detection_manual_f1": "F1 of the 15 manual concepts"}
DETECTION_COLUMNS |= {"concept_detection_precision": "Precision", "concept_detection_recall": "Recall"}
SHOWN_CONCEPTS = 100  # of the table concept by concept

Score = Mapping[str, Any]  # an entry of `scores` or `modalities` in scores.json


def score_groups(scores: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the keys of scores by the heading that says whose scores they are, those rewarded first and apart."""
    others = [key for key, score in scores.items() if "rewarded" not in score]
    groups = {REWARDED: [key for key in scores if key not in others]}
    groups |= {heading: [key for key in labels if key in others] for heading, labels in LABELS.items()}
    groups[CLINICAL] = [key for key in others if key not in set().union(*LABELS.values())]
    return {heading: found for heading, found in groups.items() if found}


def score_label(key: str, full: bool = False) -> str:
    """Return the name of a score; `full` where no heading says whose implementation it is."""
    for labels in LABELS.values():
        if key in labels:
            family = _FAMILIES.get(key.removesuffix("_f1").rpartition("_")[0], "") if full else ""
            return f"{family}{labels[key]}"
    return key.removesuffix("_f1").replace("_", " ").capitalize() + (" F1" if full and key.endswith("_f1") else "")


def three_digits(number: float | None, sign: str = "") -> str:
    """Return a number as text, a dash for None."""
    return "–" if number is None else f"{number:{sign}.3f}".replace("-", "−")


def interval_text(score: Score, sign: str = "") -> str:
    """Return the confidence interval of a score as text, empty if it has none."""
    low, high = (three_digits(score[end], sign) for end in ("low", "high"))
    return "" if score["low"] is None else f"{low} – {high}"


def standing(baseline: float | None, score: Score) -> str:
    """Return `lost` if a baseline is above the score, `within` if it is in the score's interval, or ``."""
    value, low = score["value"], score["low"]
    if None not in (baseline, value) and baseline > value:
        return "lost"
    return "within" if None not in (baseline, low) and low <= baseline < value else ""  # a tie is no loss


def headline(summary: Mapping[str, Any]) -> str:
    """Return in plain words whether the captions of a split are worth more than those of the baselines."""
    score = summary["scores"][HEADLINE]
    higher = [BASELINES[key].name for key, own in score["baselines"].items() if standing(own, score) == "lost"]
    if not summary["beats_constant"]:
        return "The model does not beat one constant caption for all images"
    return f"Better than a constant caption, but below: {', '.join(higher)}" if higher else "Above every baseline"


def items_in_words(score: Score) -> str:
    """Say how often an attribute is stated, and how often rightly."""
    if not score["stated"]:
        return f"no reference states one, the captions {score['predicted']:,}"
    if not score["predicted"]:
        return f"the captions never state one, the references {score['stated']:,}"
    shares = f"precision {score['precision']:.3f}, recall {score['recall']:.3f}"
    return f"{shares}; the captions state {score['predicted']:,}, the references {score['stated']:,}"


def thresholds_note(split: str, detection: Mapping[str, Any]) -> str:
    """Return where the thresholds come from, and those that are common to all concepts."""
    known = {SYSTEMS[key].name: own["threshold"] for key, own in detection["systems"].items() if "threshold" in own}
    chosen = "chosen on these images, which flatters the scores"
    note = f"Thresholds were {chosen if split == 'validation' else 'not chosen on these images'}"
    values = ", ".join(f"{name} {threshold:g}" for name, threshold in known.items())
    return f"{note}: {values}." if values else f"{note}."


def bar(score: Score, end: float = 1) -> dict[str, float | None]:
    """Return a bar in percent of an axis from 0 to `end`, a difference in percent of its own, with 0 in the middle."""
    value, low, zero, scale = score.get("value"), score.get("low"), 0, 100
    if "difference" in score:
        value, zero, scale = score["difference"], 50, 50
        end = max(abs(score[key] or 0) for key in ("difference", "low", "high"))
    scale /= end or 1
    start, stop = sorted((zero, zero + scale * (value or 0)))
    span = None if low is None else max(scale * (score["high"] - low), 0.5)
    return {"start": start, "width": stop - start, "zero": zero, "low": zero + scale * (low or 0), "span": span}


def headline_bars(scored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each score at the top its name, what it measures, and as bars the model among its baselines."""
    shown = []
    for key, what in HEADLINES.items():
        score = scored["scores"].get(key, {"value": None})
        if score["value"] is not None:
            others = {BASELINES[name].name: {"value": value} for name, value in score["baselines"].items()}
            found = [(name, own) for name, own in {"this model": score, **others}.items() if own["value"] is not None]
            found.sort(key=lambda item: -item[1]["value"])
            bars = [(name, own, bar(own, max(score["high"] or 0, found[0][1]["value"]))) for name, own in found]
            shown.append({"label": score_label(key, full=True), "what": what, "bars": bars})
    return shown[:3]


def modality_columns(scored: Mapping[str, Any]) -> dict[str, str]:
    """Return by key the names of the scores that modalities have."""
    scores = {key: own for key, own in next(iter(scored["modalities"].values()), {}).items() if key != "captions"}
    return {key: score_label(key, full=True) for group in score_groups(scores).values() for key in group}


def bounds(scored: Mapping[str, Any]) -> list[str]:
    """Return what stands beside the baselines of a split: what references score, and once tokenized."""
    return [key for key in ("references", "tokenizer") if any(key in score for score in scored["scores"].values())]
