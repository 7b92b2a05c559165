"""All scores of a set of captions, beside what they are worth: baselines, intervals, modalities.

    scores = score(captions, Training(train_captions, train_cuis))    # a dict that JSON can hold
    print(metrics_command.table(scores))

`python metrics.py` scores any system's captions so, `run_captioning.py` those of each split. The form of the dict
is that of `scores.json`, where it stands under the name of its split:

    captions, unique_captions, verdict, beats_constant
    scores      name -> value, low and high (95 % interval), baselines (name -> value), upper bound
    baselines      name -> caption or how it was made
    modalities  name -> captions, and scores as above
    missing     name -> what a score that was not computed needs
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from captioning.errors import UserError
from captioning.scoring import bertscore, clinical, coco
from captioning.scoring.baselines import BASELINES, constant_caption, nearest_captions, shuffled, typical_captions
from captioning.scoring.bootstrap import LEVEL, Score, compare, interval, resampled, resampling_counts
from captioning.scoring.captions import Captions, check_ids, read_csv, split_cuis
from captioning.scoring.concepts import ConceptExtractor, concept_f1, known_concepts
from metrics import wording_scores


logger = logging.getLogger(__name__)


# --- Two systems ----------------------------------------------------------------------------------------------


HEADLINE = "rougeL"
METEOR_CAPTIONS = 20_000
# Scores that a table by modality shows; BLEU and METEOR are of a corpus, and few captions make no corpus
BY_MODALITY = (HEADLINE, "rouge1", "imageclef_rouge1", *(f"{name}_f1" for name in clinical.ATTRIBUTES), "concept_f1")


@dataclass(frozen=True)
class Training:
    """The training split, as far as baselines and concepts are made of it.

    Attributes:
        captions: M captions.
        cuis: the concepts of each image, empty where none are known.
        features: float `[M, H]` of the images whose captions are `neighbors`; None without a model.
        neighbors: the captions of these images, where they are fewer than all.
    """

    captions: Sequence[str]
    cuis: Sequence[Sequence[str]]
    features: np.ndarray | None = None
    neighbors: Sequence[str] | None = None

    @cached_property
    def constant(self) -> str:
        """The training caption that agrees best with the training captions."""
        return constant_caption(self.captions, self.captions)

    @cached_property
    def typical(self) -> dict[str, str]:
        """The same for each modality."""
        modalities = [clinical.modality_of(c, text) for c, text in zip(self.cuis, self.captions, strict=True)]
        return typical_captions(self.captions, modalities)

    @cached_property
    def extractor(self) -> ConceptExtractor:
        """What reads concepts from a caption, learned from the pairs of the training split."""
        return ConceptExtractor().fit(self.captions, self.cuis)


# --- Score ----------------------------------------------------------------------------------------------------


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
        The dict described at the top of this file; what is not defined is None.
    """
    modalities = [clinical.modality_of(c, text) for c, text in zip(captions.cuis, captions.references, strict=True)]
    baselines, notes = _baselines(captions, modalities, training, features)
    systems = {"": captions.predictions, **baselines}
    scores, missing = scores_of_systems(systems, captions, training, tokenizer)
    if bertscore_model:
        found, reason = bertscore.bertscore(captions.predictions, captions.references, bertscore_model)
        scores[""] |= {"imageclef_bertscore": found} if found else {}
        missing |= {"imageclef_bertscore": reason} if reason else {}
    counts = resampling_counts(len(captions))
    entries = {}
    for name, own in scores[""].items():
        entries[name] = _entry(own, counts)
        entries[name]["baselines"] = {f: finite(scores[f][name].value) for f in baselines if name in scores[f]}
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


def scores_of_systems(
    systems: Mapping[str, Sequence[str]], captions: Captions, training: Training | None, tokenizer: str | None
) -> tuple[dict[str, dict[str, Score]], dict[str, str]]:
    """Return all scores of several systems on the same images, and what is missing, by name.

    Args:
        systems: of each N captions; the first two have METEOR, the others where it does not take too long.
        captions: what is true of the images.
        training: the training split, for concepts.
        tokenizer: see `score`.
    """
    missing: dict[str, str] = {}
    scores = {name: _caption_scores(texts, captions.references) for name, texts in systems.items()}
    if tokenizer:
        for name, found in _coco_scores(systems, captions.references, tokenizer, missing).items():
            scores[name] |= found
    for name, found in _concept_scores(systems, captions, training, missing).items():
        scores[name]["concept_f1"] = found
    return scores, missing


def _caption_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    found = wording_scores(tuple(predictions), tuple(references))
    scores = {name: Score.of(values) for name, values in found.items()}
    return scores | {f"{name}_f1": found for name, found in clinical.agreement(predictions, references).items()}


def _baselines(
    captions: Captions, modalities: Sequence[str], training: Training | None, features: np.ndarray | None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the captions of each baseline, `[N]`, and what is to be said of it."""
    number = len(captions)
    if training:
        source = f"{len(training.captions):,} training captions"
        constant, typical = training.constant, training.typical
    else:
        source = f"the references themselves ({number:,})"
        constant = constant_caption(captions.references, captions.references)
        typical = typical_captions(captions.references, modalities)
    baselines = {
        "constant": [constant] * number,  # second to the captions: see `scores_of_systems`
        "typical_of_modality": [typical.get(modality, constant) for modality in modalities],
    }
    if training and training.features is not None and features is not None:
        neighbors = training.captions if training.neighbors is None else training.neighbors
        baselines["nearest_image"] = nearest_captions(features, training.features, neighbors)
    if number > 1:  # else there is no other image
        baselines["shuffled_references"] = shuffled(captions.references)
        baselines["shuffled_images"] = shuffled(captions.predictions)
    notes = {name: {"what": BASELINES[name].description} for name in baselines}
    notes["constant"] |= {"caption": constant, "found_among": source}
    notes["typical_of_modality"] |= {"captions": typical, "found_among": source}
    if "nearest_image" in baselines:
        notes["nearest_image"]["found_among"] = f"{len(neighbors):,} training images"
    return baselines, notes


def _coco_scores(
    systems: Mapping[str, Sequence[str]], references: Sequence[str], tokenizer: str, missing: dict[str, str]
) -> dict[str, dict[str, Score]]:
    """Return the COCO metrics of each system; what cannot be computed is added to `missing`."""
    prefix = coco.TOKENIZERS[tokenizer]
    try:
        reference_tokens = coco.coco_tokens(references, tokenizer)
        tokens = {name: coco.coco_tokens(texts, tokenizer) for name, texts in systems.items()}
    except coco.MissingError as error:
        missing[f"{prefix}_*"] = str(error)
        return {name: {} for name in systems}
    # METEOR takes 0.7 ms a caption, more than all else
    chosen = list(tokens)[: max(2, METEOR_CAPTIONS // len(references))]
    found, reasons = coco.coco_scores_of_systems(tokens, reference_tokens, prefix, chosen)
    missing |= reasons
    return found


def _concept_scores(
    systems: Mapping[str, Sequence[str]], captions: Captions, training: Training | None, missing: dict[str, str]
) -> dict[str, Score]:
    """Return the concept F1 of each system; why there is none is added to `missing`."""
    truth = [known_concepts(cuis) for cuis in captions.cuis]
    if not training:
        reason = "needs the captions and concepts of the training split"
    else:
        reason = training.extractor.reason if any(truth) else "the images have no concepts (column cui)"
    if reason:
        missing["concept_f1"] = reason
        return {}
    return {name: concept_f1(training.extractor.predict(texts), truth) for name, texts in systems.items()}


def _entry(own: Score, counts: np.ndarray, rows: np.ndarray | None = None) -> dict[str, float | None]:
    value = own.value if rows is None else own.of_rows(rows)
    number = len(own.statistics) if rows is None else int(rows.sum())
    # One caption says nothing of how much captions vary
    low, high = interval(resampled(own, counts, rows)) if number > 1 else (math.nan, math.nan)
    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """Return the value, or None where it is not finite: JSON has no nan."""
    return float(value) if math.isfinite(value) else None


def _by_modality(scores: Mapping[str, Score], modalities: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    of_image = np.array(modalities)
    names, sizes = np.unique(of_image, return_counts=True)
    return {
        str(name): {
            "captions": int(size),
            **{key: _entry(scores[key], counts, of_image == name) for key in BY_MODALITY if key in scores},
        }
        for name, size in sorted(zip(names, sizes, strict=True), key=lambda pair: (-pair[1], pair[0]))
    }


def _verdict(scores: Mapping[str, Mapping[str, Score]], counts: np.ndarray) -> dict[str, Any]:
    """Say whether the captions beat the constant one, what looking at the image adds, and which baselines are higher.

    `beats_constant` needs all of the interval of the difference above 0, and a p-value below 0.05: of few captions the
    interval is too narrow, and the randomization is not.
    """
    own = scores[""][HEADLINE]
    values = {baseline: scores[baseline][HEADLINE].value for baseline in BASELINES if baseline in scores}
    constant = compare(own, scores["constant"][HEADLINE], counts)
    beats = constant.low > 0 and constant.p_value < 1 - LEVEL
    if beats:
        relation = "beats"
    elif constant.difference > 0:
        relation = "does not surely beat"
    else:
        relation = "does NOT beat"
    sentences = [f"ROUGE-L {own.value:.4f} {relation} the best constant caption ({values['constant']:.4f})"]
    if "shuffled_images" in scores:
        gain = compare(own, scores["shuffled_images"][HEADLINE], counts)
        between = f"{gain.low:+.4f} to {gain.high:+.4f}"
        sentences.append(f"looking at the image adds {gain.difference:+.4f} ({between})")
    higher = [
        f"{BASELINES[f].description} ({value:.4f})"
        for f, value in values.items()
        if value > own.value and f != "constant"
    ]
    if higher:
        sentences.append(f"higher than the captions is {' and '.join(higher)}")
    return {"verdict": f"{'; '.join(sentences)}.", "beats_constant": beats}


def flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores by the names that the Trainer's result files have: `rougeL`, `rougeL_constant`, ...

    Of the baselines only those of ROUGE-L; all of them are in `scores.json`.
    """
    values = {name: entry["value"] for name, entry in scores["scores"].items()}
    values |= {f"{HEADLINE}_{baseline}": value for baseline, value in scores["scores"][HEADLINE]["baselines"].items()}
    return {name: value for name, value in values.items() if value is not None}


def compare_captions(
    first: Captions,
    second: Captions,
    training: Training | None = None,
    tokenizer: str | None = None,
    bertscore_model: str | None = None,
) -> dict[str, Any]:
    """Return `scores`, for each both values, their difference, its interval and p-value; and what is `missing`.

    Args:
        first: the captions of one system.
        second: those of another for the same images in the same order.
        training: the training split, for concepts.
        tokenizer: see `scoring.score`.
        bertscore_model: see `scoring.score`.
    """
    systems = {"first": first.predictions, "second": second.predictions}
    scores, missing = scores_of_systems(systems, first, training, tokenizer)
    for name, predictions in systems.items() if bertscore_model else ():
        found, reason = bertscore.bertscore(predictions, first.references, bertscore_model)
        scores[name] |= {"imageclef_bertscore": found} if found else {}
        missing |= {"imageclef_bertscore": reason} if reason else {}
    counts = resampling_counts(len(first))
    rows = {}
    for name, own in scores["first"].items():
        other = scores["second"][name]
        found = compare(own, other, counts)
        values = {"first": own.value, "second": other.value, "difference": found.difference}
        values |= {"low": found.low, "high": found.high, "p_value": found.p_value}
        rows[name] = {key: finite(value) for key, value in values.items()}
    return {"scores": rows, "missing": missing}


def read_training(captions_file: str | None, concepts_file: str | None = None) -> Training | None:
    """Read the training split from a CSV of `ID,Caption` and, for concepts, one of `ID,CUIs`; None without the first.

    Raises:
        UserError: a file cannot be read, or their ids differ.
    """
    if concepts_file and not captions_file:
        raise UserError("--train_concepts goes with --train, the CSV of ID,Caption of the training split")
    if not captions_file:
        return None
    captions = read_csv(captions_file, "Caption")
    if not captions:
        raise UserError(f"'{captions_file}' holds no captions; give a file with at least one")
    cuis = read_csv(concepts_file, "CUIs") if concepts_file else {}
    if cuis:
        check_ids(cuis, captions, concepts_file, captions_file, more=True)
    return Training(list(captions.values()), [split_cuis(cuis.get(image_id, "")) for image_id in captions])
