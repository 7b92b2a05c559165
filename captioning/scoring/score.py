"""All scores of a set of captions, beside what they are worth: baselines, confidence intervals, modalities.

    scores = score(captions, Training(train_captions, train_cuis))    # a dict that JSON can hold
    print(score_table(scores))

`python -m captioning score` scores the captions of any system, `run_captioning.py` those of each split. In
`scores.json` the dict stands under the name of its split:

    captions, unique_captions, verdict, beats_constant
    scores      name -> value, low and high (95 % confidence interval), baselines (key -> value), upper_bound
    baselines   key -> what it is, its caption or captions, among what it was found
    modalities  name -> captions, and scores as above
    missing     name -> what a score that was not computed needs

A run adds `leaks`: see `captioning.data.leaks.find_leaks`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captioning.errors import UserError
from captioning.scoring.baselines import BASELINES, baseline_captions
from captioning.scoring.bertscore import bertscore
from captioning.scoring.bootstrap import LEVEL, Score, compare, interval, resampled, resampling_counts
from captioning.scoring.captions import Captions
from captioning.scoring.clinical import ATTRIBUTES, agreement, modality_of
from captioning.scoring.coco import coco_scores
from captioning.scoring.concepts import concept_f1, known_concepts
from captioning.scoring.training_split import Training
from metrics import wording_scores


HEADLINE = "rougeL"
# Scores that a table by modality shows; BLEU and METEOR need more captions than a modality may have
BY_MODALITY = (HEADLINE, "rouge1", "imageclef_rouge1", *(f"{name}_f1" for name in ATTRIBUTES), "concept_f1")


# --- One system -----------------------------------------------------------------------------------------------


def score(
    captions: Captions,
    training: Training | None = None,
    features: np.ndarray | None = None,
    tokenizer: str | None = "ptb",
    bertscore_model: str | None = None,
) -> dict[str, Any]:
    """Score the captions of a system, its baselines, and its captions by modality.

    Args:
        captions: of N images.
        training: the training split; without it the baselines are made of the references themselves.
        features: float `[N, H]` of the images, for the nearest training image.
        tokenizer: of the COCO metrics, `ptb` or `whitespace`; None leaves them out.
        bertscore_model: the weights of BERTScore; None leaves it out.

    Returns:
        The dict described at the top of this file; an undefined value is None.
    """
    modalities = [modality_of(cuis, text) for cuis, text in zip(captions.cuis, captions.references, strict=True)]
    baselines, notes = baseline_captions(captions, modalities, training, features)
    # The constant caption comes second, so that it has a METEOR: see `coco_scores`
    systems = {"": captions.predictions, **baselines}
    scores, missing = _scores_of_systems(systems, captions, training, tokenizer, bertscore_model, [""])
    counts = resampling_counts(len(captions))
    entries = {}
    for name, own in scores[""].items():
        entries[name] = _entry(own, counts)
        entries[name]["baselines"] = {key: finite(scores[key][name].value) for key in baselines if name in scores[key]}
    if "concept_f1" in entries:
        upper_bound = _concept_scores({"": captions.references}, captions, training, {})[""]
        entries["concept_f1"]["upper_bound"] = finite(upper_bound.value)
    return {
        "captions": len(captions),
        "unique_captions": len(set(captions.predictions)) / len(captions),
        **_verdict(scores, counts),
        "scores": entries,
        "baselines": notes,
        "modalities": _by_modality(scores[""], modalities, counts),
        "missing": missing,
    }


def _scores_of_systems(
    systems: Mapping[str, Sequence[str]],
    captions: Captions,
    training: Training | None,
    tokenizer: str | None,
    bertscore_model: str | None,
    with_bertscore: Sequence[str],
) -> tuple[dict[str, dict[str, Score]], dict[str, str]]:
    """Return all scores of each system, and by name what is missing for a score.

    Only the systems `with_bertscore` get BERTScore, whose model is large.
    """
    missing, scores = {}, {}
    for name, texts in systems.items():
        wording = wording_scores(tuple(texts), tuple(captions.references))
        scores[name] = {key: Score.of(values) for key, values in wording.items()}
        scores[name] |= {f"{key}_f1": own for key, own in agreement(texts, captions.references).items()}
    if tokenizer:
        found, missing = coco_scores(systems, captions.references, tokenizer)
        for name, own in found.items():
            scores[name] |= own
    for name, own in _concept_scores(systems, captions, training, missing).items():
        scores[name]["concept_f1"] = own
    for name in with_bertscore if bertscore_model else ():
        try:
            scores[name]["imageclef_bertscore"] = bertscore(systems[name], captions.references, bertscore_model)
        except UserError as error:
            missing["imageclef_bertscore"] = str(error)
    return scores, missing


def _concept_scores(
    systems: Mapping[str, Sequence[str]], captions: Captions, training: Training | None, missing: dict[str, str]
) -> dict[str, Score]:
    """Return the concept F1 of each system; without one, the reason is added to `missing`."""
    truth = [known_concepts(cuis) for cuis in captions.cuis]
    if not training:
        reason = "needs the captions and concepts of the training split"
    else:
        reason = training.extractor.reason if any(truth) else "the images have no concepts (column cui)"
    if reason:
        missing["concept_f1"] = reason
        return {}
    # Each text once: a shuffled baseline has the captions of another system, a constant one repeats its own
    texts = list({text: None for own in systems.values() for text in own})
    found = dict(zip(texts, training.extractor.predict(texts), strict=True))
    return {name: concept_f1([found[text] for text in own], truth) for name, own in systems.items()}


def _entry(own: Score, counts: np.ndarray, rows: np.ndarray | slice = slice(None)) -> dict[str, float | None]:
    part = own.part(rows)
    # A single caption does not show how much captions vary
    several = len(part.statistics) > 1
    low, high = interval(resampled(part, counts[:, rows])) if several else (math.nan, math.nan)
    return {"value": finite(part.value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """Return the value, or None where it is NaN or infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def _by_modality(scores: Mapping[str, Score], modalities: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    of_image, sizes = np.array(modalities), Counter(modalities)
    shown = [key for key in BY_MODALITY if key in scores]
    return {
        name: {"captions": sizes[name], **{key: _entry(scores[key], counts, of_image == name) for key in shown}}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name))
    }


def _verdict(scores: Mapping[str, Mapping[str, Score]], counts: np.ndarray) -> dict[str, Any]:
    """Say whether the captions beat the constant one, what looking at the image adds, and which baselines are higher.

    `beats_constant` needs the whole confidence interval of the difference above 0, and a p-value below 0.05: of few
    captions the interval is too narrow, and the randomization test is not.
    """
    headline = {name: found[HEADLINE] for name, found in scores.items()}
    own, constant = headline.pop(""), headline["constant"]
    difference = compare(own, constant, counts)
    beats = difference.low > 0 and difference.p_value < 1 - LEVEL
    if beats:
        relation = "beats"
    elif difference.difference > 0:
        relation = "does not significantly beat"
    else:
        relation = "does NOT beat"
    verdict = f"ROUGE-L {own.value:.4f} {relation} the best constant caption ({constant.value:.4f})"
    if "shuffled_images" in headline:
        gain = compare(own, headline["shuffled_images"], counts)
        verdict += f"; looking at the image adds {gain.difference:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
    higher = [
        f"{BASELINES[key].description} ({baseline.value:.4f})"
        for key, baseline in headline.items()
        if baseline.value > own.value and key != "constant"
    ]
    if higher:
        verdict += f". A trivial baseline scores higher: {', '.join(higher)}"
    return {"verdict": f"{verdict}.", "beats_constant": beats}


def flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores by the names that the Trainer's result files have: `rougeL`, `rougeL_constant`, ...

    Of the baselines only those of ROUGE-L; all of them are in `scores.json`.
    """
    values = {name: entry["value"] for name, entry in scores["scores"].items()}
    values |= {f"{HEADLINE}_{key}": value for key, value in scores["scores"][HEADLINE]["baselines"].items()}
    return {name: value for name, value in values.items() if value is not None}


# --- Two systems ----------------------------------------------------------------------------------------------


def compare_captions(
    first: Captions,
    second: Captions,
    training: Training | None = None,
    tokenizer: str | None = None,
    bertscore_model: str | None = None,
) -> dict[str, Any]:
    """Return the `scores` of two systems, each with the difference, its interval and p-value; and what is `missing`.

    Args:
        first: the captions of one system.
        second: those of another for the same images in the same order.
        training: see `score`.
        tokenizer: see `score`.
        bertscore_model: see `score`.
    """
    systems = {"first": first.predictions, "second": second.predictions}
    scores, missing = _scores_of_systems(systems, first, training, tokenizer, bertscore_model, list(systems))
    counts = resampling_counts(len(first))
    rows = {}
    for name, own in scores["first"].items():
        other = scores["second"][name]
        values = {"first": own.value, "second": other.value, **vars(compare(own, other, counts))}
        rows[name] = {key: finite(value) for key, value in values.items()}
    return {"scores": rows, "missing": missing}
