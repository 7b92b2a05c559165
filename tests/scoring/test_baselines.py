"""Captions of other images, and the candidates for a constant one, against naive searches."""

import numpy as np
import pytest
from helpers import make_captions, real_captions

from captioning.models import retriever
from captioning.scoring import constants
from captioning.scoring.baselines import nearest_captions, shuffled
from captioning.scoring.constants import constant_caption, typical_captions
from captioning.scoring.ngrams import ROUGE_BETA, CandidateScores, ngram_scores
from metrics import lcs_length, rouge, rouge_tokens


def test_no_caption_stays_in_its_place():
    captions = [str(i) for i in range(50)]
    moved = shuffled(captions)
    assert sorted(moved) == sorted(captions) and shuffled(captions) == moved
    assert not any(a == b for a, b in zip(captions, moved, strict=True))
    assert shuffled(["a", "b"]) == ["b", "a"] and shuffled(["a"]) == ["a"]


def test_the_constant_caption_is_that_of_a_naive_search():
    captions = real_captions(200)
    for references in (captions[:80], captions[80:]):
        scores = [rouge([text] * len(references), references)["rougeL"].mean() for text in captions[:80]]
        assert constant_caption(captions[:80], references) == captions[int(np.argmax(scores))]
    assert constant_caption(["?"], ["!"]) == "?"


def test_all_candidates_are_scored_at_once_as_one_by_one():
    captions = [*real_captions(60), "", "?!", "the the the the", "word " * 90]
    words = [rouge_tokens(caption) for caption in captions]
    found = CandidateScores(words, words)
    for i, caption in enumerate(captions):
        scores = rouge([caption] * len(captions), captions)
        own = {"rouge1": found.rouge_n(1)[i], "rouge2": found.rouge_n(2)[i], "rougeL": found.rouge_l(i)}
        assert own == pytest.approx({name: values.mean() for name, values in scores.items()}, abs=1e-12)


def test_candidates_have_the_coco_scores_of_a_system_that_repeats_them():
    references = [*(" ".join(text.lower().split()) for text in real_captions(60)), "a", "", "the the the the the"]
    candidates = [*references[:12], "a", "the the the", "a a", "of " * 69 + "of"]
    found = CandidateScores([text.split() for text in candidates], [text.split() for text in references])
    bleu, cider = found.bleu(), found.cider()
    for i, text in enumerate(candidates):
        own = {f"bleu{n}": bleu[i, n - 1] for n in range(1, 5)} | {"cider": cider[i]}
        own["rougeL"] = found.rouge_l(i, ROUGE_BETA)
        expected = ngram_scores({"": [text] * len(references)}, references)[""]
        assert own == pytest.approx({name: score.value for name, score in expected.items()}, abs=1e-12)


def test_all_references_are_compared_at_once_as_one_by_one():
    rng = np.random.default_rng(0)
    references = [list(rng.choice(list("abcdefg"), size=rng.integers(0, 30))) for _ in range(60)]
    candidates = [list(rng.choice(list("abcdefgh"), size=length)) for length in (0, 1, 5, 63, 64, 65, 100)]
    against = CandidateScores(candidates, references)
    for i, candidate in enumerate(candidates):
        assert against.lcs_lengths(i).tolist() == [lcs_length(candidate, words) for words in references]


def test_of_many_references_a_sample_is_taken(monkeypatch):
    monkeypatch.setattr(constants, "MAX_REFERENCES", 30)
    captions = make_captions(20) * 5
    drawn = constants.sampled(captions)
    assert len(drawn) == 30 and set(drawn) <= set(captions) and drawn == constants.sampled(captions) != captions[:30]


def test_each_group_has_its_own_typical_caption():
    captions = ["CT of the chest", "CT of the abdomen", "CT of the chest shows"]
    captions += ["MRI knee", "MRI of the knee", "MRI knee"]
    found = typical_captions(captions, ["CT"] * 3 + ["MRI"] * 3, fewest=3)
    assert found == {"CT": "CT of the chest", "MRI": "MRI knee"}
    assert typical_captions(captions, ["CT"] * 4 + ["MRI"] * 2, fewest=3).keys() == {"CT"}
    assert typical_captions(captions, ["CT"] * 6) == {}, "too few to call one typical"


def test_the_nearest_image_is_nearest_by_angle_from_what_all_have_in_common(monkeypatch):
    names, common = ["east", "west", "north", "south"], np.array([100.0, 50.0])
    train = np.array([[1, 0], [-1, 0], [0, 9], [0, -9]]) + common
    features = np.array([[5, 0.5], [-0.01, 0.002], [1, 3], [0.9, -1]]) + common
    assert nearest_captions(features, train, names) == names
    monkeypatch.setattr(retriever.similarities, "__defaults__", (3,))  # images at a time
    assert nearest_captions(features, train, names) == names
