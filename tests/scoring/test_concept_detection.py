"""The scores of concept detection are those of ImageCLEF's evaluator; concepts from probabilities and near images."""

from itertools import product

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from captioning.models.concept_head import concepts_above
from captioning.scoring.bootstrap import interval, resampled, resampling_counts
from captioning.scoring.concept_detection import (
    MANUAL,
    NAMES,
    THRESHOLDS,
    choose_thresholds,
    concept_table,
    detection_scores,
    neighbor_votes,
)
from captioning.scoring.training_split import Training


CONCEPTS = ["C0000001", "C0000002", "C0000003", "C0000004"]
CUIS = sorted(MANUAL) + [f"C{number:07}" for number in range(1, 12)]


# --- Scores ---------------------------------------------------------------------------------------------------


def official(predicted, truth, allowed=None) -> float:
    """ImageCLEF's mean, by sklearn: a field without concepts is split into one empty concept."""
    scores = []
    for pair in zip(predicted, truth, strict=True):
        ours, theirs = ([cui.upper() for cui in ";".join(sorted(own)).split(";")] for own in pair)
        if allowed:
            ours, theirs = ([cui for cui in cuis if cui in allowed] for cuis in (ours, theirs))
        if theirs:
            every = sorted({*ours, *theirs})
            vectors = ([int(cui in cuis) for cui in every] for cuis in (theirs, ours))
            scores.append(f1_score(*vectors, average="binary"))
    return float(np.mean(scores))


def draw(number: int, seed: int) -> tuple[list[set[str]], list[set[str]]]:
    rng = np.random.default_rng(seed)
    truth = [set(rng.choice(CUIS, rng.integers(0, 6), replace=False)) for _ in range(number)]
    kept = [{cui for cui in known if rng.random() < 0.7} for known in truth]
    predicted = [own | set(rng.choice(CUIS, rng.integers(0, 3), replace=False)) for own in kept]
    predicted = [{cui.lower() if rng.random() < 0.2 else cui for cui in own} for own in predicted]
    return [own | {""} if rng.random() < 0.1 else own for own in predicted], truth  # a field that ends in ";"


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_that_of_the_official_evaluator(seed):
    predicted, truth = draw(200, seed)
    assert {(bool(a), bool(b)) for a, b in zip(predicted, truth, strict=True)} == {*product((False, True), repeat=2)}
    scores = detection_scores(predicted, truth)
    assert scores["concept_detection_f1"].value == pytest.approx(official(predicted, truth), abs=1e-12)
    assert scores["concept_detection_manual_f1"].value == pytest.approx(official(predicted, truth, MANUAL), abs=1e-12)


def test_precision_and_recall_are_of_all_pairs():
    predicted, truth = draw(100, 9)
    predicted, truth = ([own - {""} for own in side] for side in (predicted, truth))
    vectors = [[[cui in {c.upper() for c in own} for cui in CUIS] for own in side] for side in (truth, predicted)]
    scores = detection_scores(predicted, truth)
    assert scores["concept_detection_precision"].value == pytest.approx(precision_score(*vectors, average="micro"))
    assert scores["concept_detection_recall"].value == pytest.approx(recall_score(*vectors, average="micro"))


def test_the_manual_concepts_are_the_official_ones():
    official_ones = (
        "C0002978 C0040405 C0024485 C0032743 C0041618 C1306645 C1140618 C0037949 C0030797 C0023216 C0037303 C0817096 "
        "C0006141 C0000726 C0920367"
    )
    assert set(official_ones.split()) == MANUAL and len(NAMES) == 18


def test_manual_scores_have_their_own_truth_and_skip_images_without():
    scores = detection_scores([{"C0040405"}, {"C0040405"}, set()], [{"C0040405"}, {"C1"}, set()])
    assert scores["concept_detection_manual_f1"].value == 1
    assert scores["concept_detection_f1"].value == pytest.approx(2 / 3)
    manual = detection_scores([{"C0040405"}], [{"C0040405", "C1"}], [{"C0041618"}])
    assert manual["concept_detection_manual_f1"].value == 0


def test_scores_have_intervals_and_are_undefined_without_images():
    counts = resampling_counts(80, 200)
    for score in detection_scores(*draw(80, 3)).values():
        low, high = interval(resampled(score, counts))
        assert low < score.value < high
    assert np.isnan(detection_scores([set()], [set()])["concept_detection_manual_f1"].value)


def test_more_than_a_hundred_concepts_are_an_error():
    with pytest.raises(ValueError, match="more than 100"):
        detection_scores([{f"C{number}" for number in range(101)}], [set()])


def test_the_table_counts_images_of_each_concept():
    table = concept_table([{"c1", "C2"}, {"C2"}, {"C3"}], [{"C1"}, {"C2", "C1"}, set()])
    rows = [["C1", 1, 0, 1, 2], ["C2", 1, 1, 0, 1], ["C3", 0, 1, 0, 0]]
    assert table == [dict(zip(("cui", "tp", "fp", "fn", "support"), row, strict=True)) for row in rows]


# --- Systems --------------------------------------------------------------------------------------------------


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
    concepts = [f"C{i:07}" for i in range(300)]
    assert concepts_above(np.linspace(0.4, 0.9, 300)[None], concepts, 0.5) == [concepts[:199:-1]]
    assert concepts_above(np.array([[0.2, 0.6, 0.7]]), CONCEPTS[:3], [0.1, 0.9, 0.7]) == [["C0000003", "C0000001"]]


def training(cuis, features, ids):
    return Training(["a"] * len(cuis), cuis, features, ["a"] * len(cuis), cuis, ids)


def test_the_votes_of_the_nearest_images_are_weighted_by_their_cosines(number=3):
    rng = np.random.default_rng(0)
    features, others = rng.normal(size=(40, 6)) + 5, rng.normal(size=(5, 6)) + 5
    cuis = [[CONCEPTS[i % 3]] * (i % 4 > 0) + [CONCEPTS[3]] * (i % 8 == 1) for i in range(40)]
    others[0] = features[7]
    ids, own_ids = [f"i{i}" for i in range(40)], ["i7", "a", "b", "c", "d"]
    concepts, votes = neighbor_votes(others, features, own_ids, training(cuis, features, ids), number)
    assert concepts == CONCEPTS
    centered = features - features.mean(axis=0)
    for vote, image_id, own in zip(votes, own_ids, others - features.mean(axis=0), strict=True):
        cosines = centered @ own / np.linalg.norm(centered, axis=1) / np.linalg.norm(own)
        pool = [i for i in range(40) if cuis[i] and ids[i] != image_id]
        nearest = sorted(pool, key=cosines.tolist().__getitem__)[-number:]
        shares = [sum(cosines[i] for i in nearest if cui in cuis[i]) for cui in CONCEPTS]
        assert vote == pytest.approx(np.array(shares) / cosines[nearest].sum(), abs=1e-6)


def test_more_neighbors_than_images_are_all_of_them():
    features = np.eye(4)
    known = training([["C0000001"], [], ["C0000002"], []], features, "abcd")
    concepts, votes = neighbor_votes(features[:1], features, ["x"], known, 9)
    assert concepts == CONCEPTS[:2] and votes.tolist() == [[1, 0]]  # the cosine with the other is negative
