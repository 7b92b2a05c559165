"""Concepts from probabilities, from the nearest images."""

from itertools import product

import numpy as np
import pytest

from captioning.models.concept_head import concepts_above
from captioning.scoring.concept_systems import (
    THRESHOLDS,
    choose_thresholds,
    neighbor_votes,
)
from captioning.scoring.training_split import Training


CONCEPTS = ["C0000001", "C0000002", "C0000003", "C0000004"]


@pytest.fixture
def images():
    """Probabilities `[60, 3]` that tell something, and true concepts, one of which nobody predicts."""
    rng = np.random.default_rng(0)
    labels = rng.random((60, 4)) < [0.7, 0.4, 0.3, 0.2]
    probabilities = np.clip(labels[:, :3] * [0.5, 0.2, 0.1] + rng.random((60, 3)) * [0.6, 0.3, 0.2], 0, 1)
    return probabilities, [frozenset(np.array(CONCEPTS)[row]) for row in labels], labels


def mean_f1(probabilities, thresholds, labels) -> float:
    predicted = np.pad(probabilities >= thresholds, ((0, 0), (0, 1)))
    precision, recall = ((labels & predicted).sum(1) / np.maximum(part.sum(1), 1) for part in (predicted, labels))
    harmonic = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return np.where((labels | predicted).any(axis=1), harmonic, 1.0).mean()


def test_the_common_threshold_has_the_highest_mean_f1(images):
    probabilities, truth, labels = images
    chosen = choose_thresholds(probabilities, CONCEPTS[:3], truth)
    scores = {threshold: mean_f1(probabilities, threshold, labels) for threshold in THRESHOLDS}
    assert len(set(chosen)) == 1 and len(chosen) == 3
    assert scores[chosen[0]] == pytest.approx(max(scores.values()), abs=1e-12)


def test_thresholds_of_their_own_raise_the_score_where_there_are_enough_images(images):
    probabilities, truth, labels = images
    common = choose_thresholds(probabilities, CONCEPTS[:3], truth)
    own = choose_thresholds(probabilities, CONCEPTS[:3], truth, each=True)
    assert mean_f1(probabilities, own, labels) > mean_f1(probabilities, common, labels) + 0.05
    best = max(mean_f1(probabilities, tried, labels) for tried in product(THRESHOLDS[4::10], repeat=3))
    assert mean_f1(probabilities, own, labels) > best - 0.02
    few = choose_thresholds(probabilities[:9], CONCEPTS[:3], truth[:9], each=True)
    assert len(set(few)) == 1


def test_of_equal_thresholds_that_in_the_middle_is_taken():
    assert choose_thresholds(np.array([[0.2], [0.8]]), CONCEPTS[:1], [set(), {CONCEPTS[0]}]) == [0.51]


def test_at_most_a_hundred_concepts_are_predicted_the_most_probable_first():
    probabilities = np.linspace(0.4, 0.9, 300)[None]
    concepts = [f"C{i:07}" for i in range(300)]
    assert concepts_above(probabilities, concepts, 0.5) == [concepts[:199:-1]]
    assert concepts_above(np.array([[0.2, 0.6, 0.7]]), CONCEPTS[:3], [0.1, 0.9, 0.7]) == [["C0000003", "C0000001"]]


# --- Without training -----------------------------------------------------------------------------------------


def training(cuis, features, ids):
    return Training(["a"] * len(cuis), cuis, features, ["a"] * len(cuis), cuis, ids)


def test_the_votes_of_the_nearest_images_are_weighted_by_their_cosines(number=3):
    rng = np.random.default_rng(0)
    features, others = rng.normal(size=(40, 6)) + 5, rng.normal(size=(5, 6)) + 5
    cuis = [[CONCEPTS[i % 3]] * (i % 4 > 0) + [CONCEPTS[3]] * (i % 8 == 1) for i in range(40)]
    others[0] = features[7]
    ids = [f"i{i}" for i in range(40)]
    concepts, votes = neighbor_votes(
        others, features, ["i7", "a", "b", "c", "d"], training(cuis, features, ids), number
    )
    assert concepts == CONCEPTS
    mean = features.mean(axis=0)
    for row, (image_id, other) in enumerate(zip(["i7", "a", "b", "c", "d"], others, strict=True)):
        own, cosines = other - mean, {}
        for i in (i for i in range(40) if cuis[i] and ids[i] != image_id):
            train = features[i] - mean
            cosines[i] = own @ train / np.linalg.norm(own) / np.linalg.norm(train)
        nearest = sorted(cosines, key=cosines.get)[-number:]
        total = sum(cosines[i] for i in nearest)
        expected = [sum(cosines[i] for i in nearest if cui in cuis[i]) / total for cui in CONCEPTS]
        assert votes[row] == pytest.approx(expected, abs=1e-6)


def test_more_neighbors_than_images_are_all_of_them():
    features = np.eye(4)
    known = training([["C0000001"], [], ["C0000002"], []], features, "abcd")
    concepts, votes = neighbor_votes(features[:1], features, ["x"], known, 9)
    assert concepts == CONCEPTS[:2] and votes.tolist() == [[1, 0]]  # the cosine with the other is negative
