"""The scores of concept detection are those of ImageCLEF's evaluator."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from captioning.scoring.bootstrap import interval, resampled, resampling_counts
from captioning.scoring.concept_detection import MANUAL, NAMES, concept_table, detection_scores


OTHERS = [f"C{number:07}" for number in range(1, 12)]
CUIS = sorted(MANUAL) + OTHERS


def official(predicted, truth, allowed=None) -> float:
    """ImageCLEF's mean, by sklearn: a field without concepts is split into one empty concept."""
    scores = []
    for ours, theirs in zip(predicted, truth, strict=True):
        ours = [cui.upper() for cui in ";".join(sorted(ours)).split(";")]
        theirs = [cui.upper() for cui in ";".join(sorted(theirs)).split(";")]
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
    assert {(bool(a), bool(b)) for a, b in zip(predicted, truth, strict=True)} == {
        (a, b) for a in (0, 1) for b in (0, 1)
    }
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
    assert set(official_ones.split()) == MANUAL
    assert len(NAMES) == 18


def test_manual_scores_have_their_own_truth_and_skip_images_without():
    scores = detection_scores([{"C0040405"}, {"C0040405"}, set()], [{"C0040405"}, {"C1"}, set()])
    assert scores["concept_detection_manual_f1"].value == 1
    assert scores["concept_detection_f1"].value == pytest.approx(2 / 3)
    manual = detection_scores([{"C0040405"}], [{"C0040405", "C1"}], [{"C0041618"}])
    assert manual["concept_detection_manual_f1"].value == 0


def test_scores_have_intervals_and_are_undefined_without_images():
    predicted, truth = draw(80, 3)
    counts = resampling_counts(80, 200)
    for score in detection_scores(predicted, truth).values():
        low, high = interval(resampled(score, counts))
        assert low < score.value < high
    assert np.isnan(detection_scores([set()], [set()])["concept_detection_manual_f1"].value)


def test_more_than_a_hundred_concepts_are_an_error():
    with pytest.raises(ValueError, match="more than 100"):
        detection_scores([{f"C{number}" for number in range(101)}], [set()])


def test_the_table_counts_images_of_each_concept():
    table = concept_table([{"c1", "C2"}, {"C2"}, {"C3"}], [{"C1"}, {"C2", "C1"}, set()])
    assert table == [
        {"cui": "C1", "tp": 1, "fp": 0, "fn": 1, "support": 2},
        {"cui": "C2", "tp": 1, "fp": 1, "fn": 0, "support": 1},
        {"cui": "C3", "tp": 0, "fp": 1, "fn": 0, "support": 0},
    ]
