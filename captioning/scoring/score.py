"""All scores of a set of captions, beside what they are worth: baselines, confidence intervals, modalities.

    scores = score(captions, Training(train_captions, train_cuis))    # a dict that JSON can hold
    print(score_table(scores))

`python -m captioning score` scores the captions of any system, `run_captioning.py` those of each split. In
`scores.json` the dict stands under the name of its split:

    captions, unique_captions, verdict, beats_constant
    scores      name -> value, low and high (95 % confidence interval), signature, baselines (key -> value),
                references, tokenizer (the upper bound by it); rewarded in a self-critical training; of attributes
                also precision, recall, and how many items were predicted and stated
    baselines   key -> what it is, its caption or captions, among what it was found
    modalities  name -> captions, and scores as above
    missing     name -> what a score that was not computed needs

A run adds `leaks`: see `captioning.data.leaks.find_leaks`, and `concept_detection`: see
`captioning.reporting.concepts`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from captioning.errors import UserError
from captioning.scoring import TOKENIZERS
from captioning.scoring.baselines import BASELINES, baseline_captions
from captioning.scoring.bertscore import NOT_COMPUTED, bertscore
from captioning.scoring.bootstrap import (
    LEVEL,
    Score,
    compare,
    holm,
    interval,
    num_decimals,
    resampled,
    resampling_counts,
)
from captioning.scoring.captions import Captions
from captioning.scoring.clinical import ATTRIBUTES, UNKNOWN, agreement, item_counts, modality_of
from captioning.scoring.coco import coco_scores
from captioning.scoring.concepts import concept_f1, known_concepts
from captioning.scoring.constants import constant_values
from captioning.scoring.signatures import signature
from captioning.scoring.training_split import Training
from metrics import wording_scores


HEADLINE = "rougeL"
DETECTION_F1 = ("concept_detection_f1", "concept_detection_manual_f1")  # of all concepts, and of 15 manual ones
HOW_MANY = ("A baseline scores", *(f"{word} baselines score" for word in ("Two", "Three", "Four", "Five")))
# Scores that a table by modality shows; BLEU and METEOR need more captions than a modality may have
BY_MODALITY = (HEADLINE, "rouge1", "imageclef_rouge1", *(f"{name}_f1" for name in ATTRIBUTES), "concept_f1")


# --- One system -----------------------------------------------------------------------------------------------


def score(
    captions: Captions,
    training: Training | None = None,
    features: np.ndarray | None = None,
    tokenizer: str | None = "ptb",
    bertscore_model: str | None = None,
    round_trip: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score the captions of a system and its baselines: the dict described above; an undefined value is None.

    Args:
        captions: of N images.
        training: the training split; without it the baselines are made of the references themselves.
        features: float `[N, H]` of the images, for the nearest training image.
        tokenizer: of the COCO metrics, one of `TOKENIZERS`; None leaves them out.
        bertscore_model: the weights of BERTScore; None leaves it out.
        round_trip: the N references encoded and decoded, whose scores are an upper bound of the model's: `tokenizer`.
    """
    modalities = [modality_of(cuis, text) for cuis, text in zip(captions.cuis, captions.references, strict=True)]
    split = training or Training(captions.references, captions.cuis, is_scored=True)
    constants = split.constants(tokenizer)
    constant = constants.captions[HEADLINE]
    baselines, notes = baseline_captions(captions, modalities, split, features, constant)
    systems = {"": captions.predictions, **baselines} | ({"tokenizer": round_trip} if round_trip else {})
    scores, missing, reference_tokens = _scores_of_systems(
        systems, captions, training, tokenizer, constants.captions, bertscore_model, [""]
    )
    of_constants = constant_values(constants, captions, reference_tokens, tokenizer)
    of_constants |= {name: own.value for name, own in scores.pop("constant", {}).items()}
    bound = scores.pop("tokenizer", {})  # no baseline
    counts = resampling_counts(len(captions))
    entries = {}
    for name, own in scores[""].items():
        others = {"constant": of_constants[name]} if name in of_constants else {}
        others |= {key: scores[key][name].value for key in baselines if name in scores[key]}
        entries[name] = {
            **score_entry(own, counts),
            "signature": signature(name, bertscore_model, len(split.captions)),
            "baselines": {key: finite(value) for key, value in others.items()},
            **({"tokenizer": finite(bound[name].value)} if name in bound else {}),
            **(item_counts(own) if name.removesuffix("_f1") in ATTRIBUTES else {}),
        }
    if "concept_f1" in entries:
        references = _concept_scores({"": captions.references}, captions, training, {})[""]
        entries["concept_f1"]["references"] = finite(references.value)
    notes["constant"] = {"caption": constant, "found_among": split.source, **constants._asdict()}
    wording = wording_scores((constant,) * len(captions), tuple(captions.references))
    headline = {"constant": Score.of(wording[HEADLINE])} | {name: own[HEADLINE] for name, own in scores.items()}
    known = {key: own.description for key, own in BASELINES.items() if key in headline}
    return {
        "captions": len(captions),
        "unique_captions": len(set(captions.predictions)) / len(captions),
        **_verdict(headline, split.is_scored, entries[HEADLINE], counts),
        "scores": entries,
        "baselines": {key: {"what": what} | notes.get(key, {}) for key, what in known.items()},
        "modalities": _by_modality(scores[""], modalities, counts),
        "missing": missing,
    }


def _scores_of_systems(
    systems: Mapping[str, Sequence[str]],
    captions: Captions,
    training: Training | None,
    tokenizer: str | None,
    constants: Mapping[str, str],
    bertscore_model: str | None,
    with_bertscore: Sequence[str],
) -> tuple[dict[str, dict[str, Score]], dict[str, str], list[str] | None]:
    """Return all scores of each system, by name what is missing for a score, and the references' COCO tokens.

    Only the systems `with_bertscore` get BERTScore, whose model is large. The best constant for METEOR is scored along
    with them, since its program takes seconds to start.
    """
    missing, scores, reference_tokens = {}, {}, None
    constant = constants.get(f"{TOKENIZERS[tokenizer]}_meteor") if tokenizer else None
    with ThreadPoolExecutor(max_workers=1) as beside:  # METEOR's program computes meanwhile
        coco = beside.submit(coco_scores, systems, captions.references, tokenizer, constant) if tokenizer else None
        for name, texts in systems.items():
            wording = wording_scores(tuple(texts), tuple(captions.references))
            scores[name] = {key: Score.of(values) for key, values in wording.items()}
            scores[name] |= {f"{key}_f1": own for key, own in agreement(texts, captions.references).items()}
        concepts = _concept_scores(systems, captions, training, missing)
    if coco:
        found, missing_coco, reference_tokens = coco.result()
        missing = missing_coco | missing
        for name, own in found.items():
            scores.setdefault(name, {}).update(own)
    for name, own in concepts.items():
        scores[name]["concept_f1"] = own
    for name in with_bertscore if bertscore_model else ():
        try:
            scores[name]["imageclef_bertscore"] = bertscore(systems[name], captions.references, bertscore_model)
        except UserError as error:
            missing["imageclef_bertscore"] = str(error)
    computed = set().union(*scores.values())
    missing |= {name: how for name, how in NOT_COMPUTED.items() if name not in computed | missing.keys()}
    return scores, missing, reference_tokens


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


def score_entry(own: Score, counts: np.ndarray, rows: np.ndarray | slice = slice(None)) -> dict[str, float | None]:
    """Return the value of a score of some of N captions with its interval; `counts`: see `resampling_counts`."""
    part = own.part(rows)
    low, high = interval(resampled(part, counts[:, rows]))
    return {"value": finite(part.value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """Return the value, or None where it is NaN or infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def _by_modality(scores: Mapping[str, Score], modalities: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    of_image, sizes = np.array(modalities), Counter(name for name in modalities if name != UNKNOWN)
    shown = [key for key in BY_MODALITY if key in scores]
    return {
        name: {"captions": sizes[name], **{key: score_entry(scores[key], counts, of_image == name) for key in shown}}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name))
    }


def _verdict(
    headline: Mapping[str, Score], is_scored: bool, entry: Mapping[str, Any], counts: np.ndarray
) -> dict[str, Any]:
    """Say whether the captions beat the constant one, which baselines are higher, and what looking at the image adds.

    `headline` are the ROUGE-L of the captions, "", and of each baseline; with `is_scored` the constant was found among
    the references themselves. `beats_constant` needs the whole confidence interval of the difference above 0, and a
    p-value below 0.05: of few captions the interval is too narrow, and the randomization test is not.
    """
    own, constant = headline[""], headline["constant"]
    digits = num_decimals(entry["low"], entry["high"])
    shown, shown_constant = f"ROUGE-L {own.value:.{digits}f}", f"{constant.value:.{digits}f}"
    difference = compare(own, constant, counts)
    beats = difference.low > 0 and difference.p_value < 1 - LEVEL
    if difference.difference > 0:
        among = " among the references themselves" if is_scored else ""
        relation = "beats" if beats else "does not significantly beat"
        shown += f" {relation} the best constant caption{among} ({shown_constant})"
    sentences = [shown]
    higher = {key: other.value for key, other in headline.items() if other.value > own.value}
    if higher:
        ranked = sorted(higher, key=lambda key: -higher[key])
        names = [f"{BASELINES[key].name} {higher[key]:.{digits}f}" for key in ranked]
        among = " (found among the references themselves)" if is_scored and "constant" in higher else ""
        sentences += [f"{HOW_MANY[len(ranked) - 1]} higher: {', '.join(names)}{among}"]
    elif difference.difference <= 0:
        sentences += [f"The constant caption scores the same: {shown_constant}"]
    if "shuffled_images" in headline:
        gain = compare(own, headline["shuffled_images"], counts)
        low, high = (f"{value:+.{digits}f}" for value in (gain.low, gain.high))
        sentences += [f"Looking at the image adds {gain.difference:+.{digits}f} ({low} to {high})"]
    return {"verdict": f"{'. '.join(sentences)}.", "beats_constant": beats}


def flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores by the names that the Trainer's result files have: `rougeL`, `rougeL_constant`, ...

    Of the baselines only those of ROUGE-L; all of them are in `scores.json`.
    """
    values = {name: entry["value"] for name, entry in scores["scores"].items()}
    values |= {f"{HEADLINE}_{key}": value for key, value in scores["scores"][HEADLINE]["baselines"].items()}
    if head := scores.get("concept_detection", {"systems": {}})["systems"].get("head"):
        values |= {name: head[name]["value"] for name in DETECTION_F1}
    return {name: value for name, value in values.items() if value is not None}


# --- Two systems ----------------------------------------------------------------------------------------------


def compare_captions(
    first: Captions,
    second: Captions,
    training: Training | None = None,
    tokenizer: str | None = None,
    bertscore_model: str | None = None,
) -> dict[str, Any]:
    """Return the `scores` of two systems, with the difference, its interval, p-value, signature; what is `missing`.

    Both have the same images in the same order; the other arguments are those of `score`. `p_holm` is the p-value
    corrected for the number of scores.
    """
    systems = {"first": first.predictions, "second": second.predictions}
    scores, missing, _ = _scores_of_systems(systems, first, training, tokenizer, {}, bertscore_model, list(systems))
    counts = resampling_counts(len(first))
    rows = {}
    for name, own in scores["first"].items():
        other = scores["second"][name]
        values = {"first": own.value, "second": other.value, **vars(compare(own, other, counts))}
        signed = signature(name, bertscore_model, len(training.captions) if training else 0)
        rows[name] = {key: finite(value) for key, value in values.items()} | {"signature": signed, "p_holm": None}
    known = [row for row in rows.values() if row["p_value"] is not None]
    for row, corrected in zip(known, holm([row["p_value"] for row in known]), strict=True):
        row["p_holm"] = corrected
    return {"scores": rows, "missing": missing}
