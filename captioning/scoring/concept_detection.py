"""ImageCLEFmedical's other task: the concepts (CUIs) of each image, scored as its evaluator of 2026 does.

The formulas are those of `concept_detection/evaluator.py` in github.com/taubsity/clef-caption-evaluation-2026: case
does not count, and an image without concepts for which none is predicted scores 1. F1 is a mean over images, so
thresholds are chosen for that mean, not concept by concept.
"""

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from captioning.errors import UserError
from captioning.models.concept_head import MAX_CONCEPTS
from captioning.models.retriever import similarities
from captioning.scoring.baselines import Baseline
from captioning.scoring.bootstrap import Score, resampling_counts
from captioning.scoring.captions import check_ids, read_csv
from captioning.scoring.concepts import known_concepts
from captioning.scoring.constants import best_concepts
from captioning.scoring.score import finite, score_entry
from captioning.scoring.signatures import signature
from captioning.scoring.training_split import Training


# ROCOv2's manual concepts. The official second score is of the first 15: modalities, body parts
NAMES = {
    "C0002978": "angiogram",
    "C0040405": "computed tomography",
    "C0024485": "magnetic resonance imaging",
    "C0032743": "positron emission tomography",
    "C0041618": "ultrasonography",
    "C1306645": "plain X-ray",
    "C0920367": "optical coherence tomography",
    "C1140618": "upper extremity",
    "C0037949": "vertebral column",
    "C0030797": "pelvis",
    "C0023216": "lower extremity",
    "C0037303": "cranium",
    "C0817096": "chest",
    "C0006141": "breast",
    "C0000726": "abdomen",
    "C1999039": "anterior-posterior",
    "C1996865": "postero-anterior",
    "C0205129": "sagittal",
}
MANUAL = frozenset([*NAMES][:15])
KINDS = {"concept_detection": None, "concept_detection_manual": MANUAL}
PARTS = ("f1", "precision", "recall")
EMPTY = frozenset({""})
Concepts = Sequence[Set[str]]  # of each image
# What predicts them, by the keys in scores.json
SYSTEMS = {
    "head": Baseline("concept head", "head", "the model's concept head"),
    "neighbors": Baseline("nearest training images", "neighbors", "a vote of the nearest training images"),
    "frequent": Baseline("most frequent concepts", "frequent", "the same concepts for each image: the most frequent"),
    "captions": Baseline("predicted captions", "captions", "concepts that the predicted captions name"),
    "bound": Baseline("upper bound of the head", "bound", "the true ones among the concepts that it has learned"),
}
THRESHOLDS = np.arange(1, 100) / 100
MIN_POSITIVES = 10  # validation images with a concept, for a threshold of its own


# --- Scores ---------------------------------------------------------------------------------------------------


def detection_scores(predicted: Concepts, truth: Concepts, manual_truth: Concepts | None = None) -> dict[str, Score]:
    """Return F1, precision and recall of N images, of all concepts and of the `MANUAL` ones.

    F1 is the mean over images of the F1 of two sets, precision and recall are of all pairs of image and concept.
    Images without a manual concept do not count for the scores of these, whose truth is that of `concepts_manual.csv`
    or, by default, `truth`, which has them too. "" is a concept as well, as where a field ends in ";".

    Raises:
        ValueError: there are not as many predictions as images, or more than `MAX_CONCEPTS` of one.
    """
    if max(map(len, predicted), default=0) > MAX_CONCEPTS:
        raise ValueError(f"an image has more than {MAX_CONCEPTS} concepts")
    scores = {}
    for name, kept in KINDS.items():
        pairs = zip(predicted, (kept and manual_truth) or truth, strict=True)
        pairs = [(_upper(ours, kept), _upper(theirs, kept)) for ours, theirs in pairs]
        # An empty field is one empty concept to the evaluator
        fields = pairs if kept else [(a or EMPTY, b or EMPTY) for a, b in pairs]
        f1 = np.array([2 * len(a & b) / max(len(a) + len(b), 1) for a, b in fields])
        counted = np.array([kept is None or bool(b) for _, b in pairs])
        sizes = [(len((a & b) - EMPTY), len(a - EMPTY), len(b - EMPTY)) for a, b in pairs]
        right, ours, theirs = np.array(sizes).reshape(-1, 3).T
        fractions = ((f1, np.ones(len(pairs))), (right, ours), (right, theirs))
        for part, (above, below) in zip(PARTS, fractions, strict=True):
            sums = np.stack([above * counted, below * counted], axis=1)
            scores[f"{name}_{part}"] = Score(sums.astype(float), _ratio)
    return scores


def detection_entries(predicted: Concepts, truth: Concepts, manual_truth: Concepts | None = None) -> dict[str, Any]:
    """Return `detection_scores` as `scores.json` has them: value, interval, signature."""
    counts, scores = resampling_counts(len(truth)), detection_scores(predicted, truth, manual_truth)
    return {name: score_entry(own, counts) | {"signature": signature(name)} for name, own in scores.items()}


def _upper(concepts: Set[str], kept: Set[str] | None = None) -> frozenset[str]:
    found = frozenset(concept.upper() for concept in concepts)
    return found if kept is None else found & kept


def _ratio(sums: np.ndarray, number: int) -> np.ndarray:
    return sums[..., 0] / np.where(sums[..., 1] == 0, np.nan, sums[..., 1])


def concept_table(predicted: Concepts, truth: Concepts) -> list[dict[str, Any]]:
    """Return for each concept, the most frequent first, `cui`, `tp`, `fp`, `fn` and `support`, all in images."""
    pairs = [(_upper(ours) - EMPTY, _upper(theirs) - EMPTY) for ours, theirs in zip(predicted, truth, strict=True)]
    right = Counter(cui for ours, theirs in pairs for cui in ours & theirs)
    found = Counter(cui for ours, _ in pairs for cui in ours)
    support = Counter(cui for _, theirs in pairs for cui in theirs)
    rows = []
    for cui in found | support:
        wrong, missed = found[cui] - right[cui], support[cui] - right[cui]
        rows.append({"cui": cui, "tp": right[cui], "fp": wrong, "fn": missed, "support": support[cui]})
    return sorted(rows, key=lambda row: (-row["support"], row["cui"]))


# --- Files ----------------------------------------------------------------------------------------------------


def score_concepts(
    predictions: str, references: str, manual: str | None = None, training: str | None = None
) -> dict[str, Any]:
    """Score concepts of any system, all files CSVs of `ID,CUIs`.

    `manual` has the truth of the manual concepts, by default those among `references`; `training`, the concepts of the
    training split, is for the baseline.

    Returns:
        `images`, `scores` as in `scores.json`, `constant` (concepts of the baseline by score), `concepts`.

    Raises:
        UserError: a file cannot be read, ids differ, or an image has a concept twice or more than `MAX_CONCEPTS`.
    """
    truth, found = _read_concepts(references), _read_concepts(predictions, is_checked=True)
    check_ids(found, truth, predictions, references)
    of_manual = _read_concepts(manual) if manual else truth
    check_ids(of_manual, truth, manual or references, references, more=True)
    sides = [*truth.values()], [of_manual[image_id] for image_id in truth]
    predicted, constants = [found[image_id] for image_id in truth], {}
    entries = {name: entry | {"baselines": {}} for name, entry in detection_entries(predicted, *sides).items()}
    if training:
        known = [*_read_concepts(training).values()]
        for kind, only in KINDS.items():
            own = [_upper(concepts, only) - EMPTY for concepts in known]
            constants[kind] = best_concepts([concepts for concepts in own if concepts or only is None])
            values = detection_scores([set(constants[kind])] * len(truth), *sides)
            for part in PARTS:
                entries[f"{kind}_{part}"]["baselines"]["constant"] = finite(values[f"{kind}_{part}"].value)
    table = concept_table(predicted, sides[0])
    return {"images": len(truth), "scores": entries, "constant": constants, "concepts": table}


def _read_concepts(path: str, is_checked: bool = False) -> dict[str, frozenset[str]]:
    """Return by id the concepts of a CSV of `ID,CUIs`, fields taken apart as by the official evaluator."""
    concepts = {}
    for image_id, text in read_csv(path, "CUIs").items():
        parts = [cui.strip() for cui in text.split(";")]
        if is_checked and len(set(parts)) < len(parts):
            raise UserError(f"'{path}': image '{image_id}' has a concept twice; keep one")
        if is_checked and len(parts) > MAX_CONCEPTS:
            raise UserError(f"'{path}': image '{image_id}' has {len(parts)} concepts; keep at most {MAX_CONCEPTS}")
        concepts[image_id] = frozenset(parts)
    return concepts


def holds_concepts(path: str) -> bool:
    """Tell whether a file is a CSV of concepts, by its first line."""
    with open(path, "rb") as file:
        line = file.readline(100).removeprefix(b"\xef\xbb\xbf").lower()
    return line.translate(None, b'" \r\n') == b"id,cuis"


# --- Systems: from probabilities to concepts, and without training --------------------------------------------


def choose_thresholds(
    probabilities: np.ndarray, concepts: Sequence[str], truth: Sequence[Set[str]], each: bool = False
) -> list[float]:
    """Return the thresholds of C concepts that give N images the highest mean F1; of equal ones those in the middle.

    `probabilities` are float `[N, C]`; `truth` may have other concepts, too. All have the best common threshold; with
    `each`, one of `MIN_POSITIVES` images or more has its own where that raises the score, frequent concepts first.
    """
    labels, num_true = _indicators(truth, concepts), np.array([len(known) for known in truth])
    passes = (probabilities >= threshold for threshold in THRESHOLDS)
    values = np.array([_mean_f1((labels & own).sum(axis=1), own.sum(axis=1), num_true) for own in passes])
    chosen = np.full(len(concepts), THRESHOLDS[_middle(values)])
    predicted, best = probabilities >= chosen, values.max()
    right, number = (labels & predicted).sum(axis=1), predicted.sum(axis=1)
    positives = labels.sum(axis=0)
    for c in np.argsort(-positives, kind="stable")[: (positives >= MIN_POSITIVES).sum()] if each else ():
        own, label = probabilities[:, [c]] >= THRESHOLDS, labels[:, [c]]
        change = own.astype(int) - predicted[:, [c]]  # [N, thresholds]
        values = _mean_f1(right[:, None] + change * label, number[:, None] + change, num_true[:, None])
        if values.max() > best:
            place, best = _middle(values), values.max()
            chosen[c] = THRESHOLDS[place]
            right, number = right + change[:, place] * label[:, 0], number + change[:, place]
    return chosen.tolist()


def _mean_f1(right: np.ndarray, predicted: np.ndarray, num_true: np.ndarray) -> np.ndarray:
    """Return the mean F1 of N images, `[...]`, from numbers of concepts `[N, ...]`."""
    both = predicted + num_true
    return np.where(both, 2 * right / np.maximum(both, 1), 1.0).mean(axis=0).round(12)


def _middle(values: np.ndarray) -> int:
    best = np.flatnonzero(values == values.max())
    return int(best[len(best) // 2])


def _indicators(sets: Sequence[Set[str]], concepts: Sequence[str]) -> np.ndarray:
    """Return which of N sets has which of C concepts, bool `[N, C]`."""
    column, found = {cui: c for c, cui in enumerate(concepts)}, np.zeros((len(sets), len(concepts)), bool)
    for row, own in enumerate(sets):
        found[row, [column[cui] for cui in own if cui in column]] = True
    return found


def neighbor_votes(
    features: np.ndarray, train_features: np.ndarray, image_ids: Sequence[str], training: Training, number: int
) -> tuple[list[str], np.ndarray]:
    """Return the concepts of training images, and for N images the votes `[N, C]` of those that are nearest to each.

    The vote for a concept is the share, from 0 to 1, that images with it have in the cosines of the nearest `number`
    training images with concepts. An image has no vote on itself, known by its id. Features are float `[N, H]` of the
    images, and `[K, H]` of those of `training` that may vote.
    """
    known = [known_concepts(cuis) for cuis in training.neighbor_cuis]
    pool = np.flatnonzero([bool(own) for own in known])
    concepts = sorted(set().union(*known))
    labels = _indicators([known[row] for row in pool], concepts).astype(np.float32)
    place = {training.neighbor_ids[row]: i for i, row in enumerate(pool)}
    votes = []
    for start, cosines in similarities(features, train_features):
        weights = cosines[:, pool].clip(min=0)
        for row, image_id in enumerate(image_ids[start : start + len(weights)]):
            if image_id in place:
                weights[row, place[image_id]] = 0
        if number < len(pool):
            weakest = np.argpartition(-weights, number - 1, axis=1)[:, number:]
            np.put_along_axis(weights, weakest, 0, axis=1)
        votes.append(weights @ labels / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12))
    return concepts, np.concatenate(votes)
