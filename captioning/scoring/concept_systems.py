"""Systems that predict the concepts of images: by probabilities and thresholds, and without any training.

ImageCLEF's F1 is a mean over images, so thresholds are chosen for that mean, not concept by concept.
"""

from collections.abc import Sequence, Set

import numpy as np

from captioning.models.retriever import similarities
from captioning.scoring.baselines import Baseline
from captioning.scoring.concepts import known_concepts
from captioning.scoring.training_split import Training


THRESHOLDS = np.arange(1, 100) / 100
MIN_POSITIVES = 10  # validation images with a concept, for a threshold of its own
# By their keys in scores.json
SYSTEMS = {
    "head": Baseline("concept head", "head", "the model's concept head"),
    "neighbors": Baseline("nearest training images", "neighbors", "a vote of the nearest training images"),
    "frequent": Baseline("most frequent concepts", "frequent", "the same concepts for each image: the most frequent"),
    "captions": Baseline("predicted captions", "captions", "concepts that the predicted captions name"),
    "bound": Baseline("upper bound of the head", "bound", "the true ones among the concepts that it has learned"),
}


# --- From probabilities to concepts ---------------------------------------------------------------------------


def choose_thresholds(
    probabilities: np.ndarray, concepts: Sequence[str], truth: Sequence[Set[str]], each: bool = False
) -> list[float]:
    """Return the thresholds of C concepts that give N images the highest mean F1; of equal ones those in the middle.

    Args:
        probabilities: float `[N, C]`.
        concepts: C CUIs.
        truth: the concepts of each image, others among them.
        each: a concept of `MIN_POSITIVES` images or more gets a threshold of its own, frequent concepts first, where
            it raises the score. Else all have the best common one.
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
            chosen[c], right, number = (
                THRESHOLDS[place],
                right + change[:, place] * label[:, 0],
                number + change[:, place],
            )
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


# --- Without training -----------------------------------------------------------------------------------------


def neighbor_votes(
    features: np.ndarray, train_features: np.ndarray, image_ids: Sequence[str], training: Training, number: int
) -> tuple[list[str], np.ndarray]:
    """Return the concepts of training images, and for N images the votes `[N, C]` of those that are nearest to each.

    The vote for a concept is the share, from 0 to 1, that images with it have in the cosines of the nearest `number`
    training images with concepts. An image has no vote on itself, known by its id.

    Args:
        features: float `[N, H]` of the images.
        train_features: float `[K, H]` of those of `training` that may vote.
        image_ids: N ids.
        training: the training split.
        number: nearest images.
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
