"""Concepts learned from the training split, and their F1."""

import numpy as np
import pytest
from helpers import phantom_rows
from sklearn.metrics import f1_score

from captioning.scoring import concepts
from captioning.scoring.concepts import ConceptExtractor, concept_f1, known_concepts


@pytest.fixture(scope="module")
def extractor():
    captions, cuis, _ = phantom_rows(600, seed=1)
    return ConceptExtractor([*captions, "A rare one"], [*cuis, ["C9999999", "nan"]])


def score(extractor, captions, cuis) -> float:
    return concept_f1(extractor.predict(captions), [known_concepts(known) for known in cuis]).value


def test_the_extractor_learns_the_phantoms_concepts(extractor):
    references, cuis, _ = phantom_rows(200, seed=2, split="test")
    assert extractor.reason == ""
    assert 0.95 < score(extractor, references, cuis) <= 1
    assert 0 < score(extractor, references[::-1], cuis) < 0.8, "captions of other images name other concepts"
    rare = [[*known, "C9999999"] for known in cuis]
    assert score(extractor, references, rare) < score(extractor, references, cuis), "rare concepts count as missed"
    assert len(extractor.concepts) == 9, "a concept of one image is left out, 'nan' is none"


def test_nested_names_are_told_apart():
    """Tools take the longest name: "pleural effusion" is one concept, "effusion" alone another."""
    rng = np.random.default_rng(0)
    names = {"pleural effusion": "C0000001", "joint effusion": "C0000002", "effusion": "C0000003", "normal": ""}
    picked = [list(names)[i] for i in rng.integers(4, size=400)]
    captions = [f"finding{number} {name}" for name, number in zip(picked, rng.integers(100, size=400), strict=True)]
    fitted = ConceptExtractor(captions, [[names[name]] for name in picked])
    assert fitted.predict([f"another {name}" for name in names]) == [{cui} - {""} for cui in names.values()]


def test_unseen_words_name_no_concept(extractor):
    assert extractor.predict(["zzz qqq", ""]) == [frozenset(), frozenset()]
    assert extractor.predict([]) == []


def test_a_concept_of_every_image_is_learned():
    captions, cuis, _ = phantom_rows(60, seed=4)
    fitted = ConceptExtractor(captions, [[*known, "C0000009"] for known in cuis])
    assert all("C0000009" in found for found in fitted.predict(captions))


def test_the_same_captions_teach_the_same(monkeypatch):
    monkeypatch.setattr(concepts, "MIN_NEGATIVES", 20)  # so that negatives are drawn
    monkeypatch.setattr(concepts, "NEGATIVES", 1)
    captions, cuis, _ = phantom_rows(200, seed=5)
    first, again = (ConceptExtractor(captions, cuis) for _ in range(2))
    assert (first._weights != again._weights).nnz == 0 and (first._intercepts == again._intercepts).all()


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (([], []), "fewer than"),
        ((["a"] * 50, [["nan"]] * 50), "fewer than"),
        ((["CT"] * 8, [["C0040405"]] * 8), "fewer than"),
        (([f"a{i}" for i in range(50)], [[f"C{i:07d}"] for i in range(50)]), "no concept has"),
        ((["\u202f"] * 50, [["C0040405"]] * 50), "no words in common"),
    ],
)
def test_too_little_to_learn_is_a_reason_not_a_traceback(pairs, reason):
    fitted = ConceptExtractor(*pairs)
    assert reason in fitted.reason
    assert fitted.predict(["CT"]) == [frozenset()]


def test_no_concept_is_made_of_nan_and_blanks():
    assert known_concepts(["nan", "", " C0040405 ", "C0040405", "CT"]) == {"C0040405"}


def test_concept_f1_is_the_mean_over_images():
    predicted = [{"A", "B"}, set(), set(), {"A"}]
    truth = [{"A", "C", "D"}, set(), {"A"}, set()]
    assert concept_f1(predicted, truth).statistics[:, 0].tolist() == [2 * 1 / (2 + 3), 1.0, 0.0, 0.0]
    assert concept_f1(predicted, truth).value == pytest.approx((0.4 + 1) / 4)


def test_concept_f1_equals_the_official_evaluators():
    """ImageCLEFmedical scores each image with scikit-learn's binary F1 over the union of both sets."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        predicted, truth = (set(rng.choice(list("ABCDEFG"), size=rng.integers(0, 5))) for _ in range(2))
        union = sorted(predicted | truth)
        marks = [[int(cui in side) for cui in union] for side in (truth, predicted)]
        expected = f1_score(*marks, zero_division=0) if union else 1.0
        assert concept_f1([predicted], [truth]).value == pytest.approx(expected)
