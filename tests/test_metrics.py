"""The scores, against `rouge_score` itself and Google's published cases."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
from helpers import SHARED, make_captions, real_captions
from rouge_score import rouge_scorer
from transformers import EvalPrediction

import metrics
from metrics import (
    METRIC_NAMES,
    ROUGE_TYPES,
    CaptionMetric,
    compute_metrics,
    imageclef_normalize,
    imageclef_rouge1,
    lcs_length,
    rouge,
)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network is unplugged")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("source", [make_captions, real_captions])
def test_rouge_equals_rouge_score_to_the_last_bit(source):
    captions = source(600)
    order = np.random.default_rng(0).permutation(len(captions))
    words = [captions[i].split() for i in order]
    # Half of each caption and half of another, so that scores of all sizes occur; and what breaks formulas
    predictions = [f"{text[: len(text) // 2]} {' '.join(w[::2])}" for text, w in zip(captions, words, strict=True)]
    predictions += ["", "?!", captions[0], "", "the the the"]
    captions += [captions[1], captions[2], "", "", "the"]
    scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=False)
    expected = [scorer.score(reference, text) for text, reference in zip(predictions, captions, strict=True)]
    means = CaptionMetric().compute(predictions=predictions, references=captions)
    for name, values in rouge(predictions, captions).items():
        assert values.tolist() == [score[name].fmeasure for score in expected]
        assert means[name] == pytest.approx(values.mean(), abs=1e-12)


def test_rouge_by_hand():
    scores = rouge(["the left lung is clear"], ["left lung clear"])
    expected = [2 * p * r / (p + r) for p, r in ((3 / 5, 3 / 3), (1 / 4, 1 / 2), (3 / 5, 3 / 3))]
    assert [scores[name][0] for name in ROUGE_TYPES] == pytest.approx(expected)
    assert rouge(["nodules"], ["nodule"])["rouge1"][0] == 0, "words are not stemmed"
    assert rouge(["clear lung left"], ["left lung clear"])["rougeL"][0] == pytest.approx(1 / 3)


def test_rouge_equals_the_published_cases():
    folder = SHARED / "google_rouge"
    if not folder.is_dir():
        pytest.skip("Google's ROUGE cases are not beside the project")
    predictions = (folder / "prediction.txt").read_text().splitlines()
    references = (folder / "target.txt").read_text().splitlines()
    cases = json.loads((folder / "expected.json").read_text())["cases"]
    cases = [own for own in cases if own["metric"] in ROUGE_TYPES and not own["use_stemmer"] and "line" in own]
    assert len(cases) >= 4
    for case in cases:
        score = rouge([predictions[case["line"]]], [references[case["line"]]])[case["metric"]][0]
        assert score == pytest.approx(case["fmeasure"], abs=5e-6), case  # they are given to five digits


def test_the_common_subsequence_is_that_of_the_usual_table():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (list(rng.integers(4, size=rng.integers(0, 90))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert lcs_length(a, b) == table[-1, -1]


def test_predictions_and_references_must_be_as_many():
    for score in (rouge, imageclef_rouge1):
        with pytest.raises(ValueError, match="zip"):
            score(["a"], ["a", "b"])


# --- ImageCLEF ------------------------------------------------------------------------------------------------


def test_imageclef_normalizes_in_the_official_order():
    assert imageclef_normalize("A 3.5-cm Mass (arrow), 12th!") == "a numbernumbercm mass arrow numberth"
    assert imageclef_normalize("٣ x_y É") == "number xy é", "all decimal digits, ASCII punctuation only"


def test_imageclef_rouge1_equals_the_official_evaluators():
    """`evaluator.py` of 2026 scores the normalized pair by evaluate's ROUGE, which is rouge_score."""
    captions = real_captions()[:800]
    predictions = [" ".join(text.split()[::2]) for text in captions[::-1]]
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False)
    pairs = [(imageclef_normalize(r), imageclef_normalize(p)) for p, r in zip(predictions, captions, strict=True)]
    expected = [scorer.score(*pair)["rouge1"].fmeasure for pair in pairs]
    assert imageclef_rouge1(predictions, captions).tolist() == expected
    assert np.mean(expected) != rouge(predictions, captions)["rouge1"].mean()


def test_imageclef_scores_two_empty_captions_1():
    assert imageclef_rouge1(["", "", "a", "?"], ["", "a", "", "!"]).tolist() == [1.0, 0.0, 0.0, 0.0]


# --- The metric -----------------------------------------------------------------------------------------------


def test_the_file_is_a_metric_for_evaluate_with_the_network_unplugged(no_network):
    references = make_captions(20)
    predictions = references[::-1]
    metric = evaluate.load(str(Path(metrics.__file__)))
    metric.add_batch(predictions=predictions[:10], references=references[:10])
    metric.add_batch(predictions=predictions[10:], references=references[10:])
    assert metric.compute() == CaptionMetric().compute(predictions=predictions, references=references)


def test_compute_metrics_weighs_captions_by_their_tokens_and_scores_the_generated_ones():
    found = SimpleNamespace(nll=np.array([1.0, 90.0]), num_tokens=np.array([1, 9]), captions=None)
    loss = compute_metrics(EvalPrediction(found, ["a", "b"]))
    assert loss == {"loss": pytest.approx(91 / 10), "perplexity": pytest.approx(np.exp(9.1))}
    found.captions = ["an effusion", "chest radiograph shows an effusion", "an effusion", "an effusion"]
    found.num_new_tokens = np.array([3, 8, 3, 4])
    scores = compute_metrics(EvalPrediction(found, ["an effusion"] * 4))
    assert scores.keys() == set(METRIC_NAMES)
    assert scores["rougeL"] == pytest.approx((3 + 2 * (2 / 5) * 1 / (2 / 5 + 1)) / 4)
    assert (scores["gen_len"], scores["unique_captions"]) == (4.5, 0.5)
    found = SimpleNamespace(nll=np.array([1e6]), num_tokens=np.array([1]), captions=None)  # of a diverged model
    assert np.isfinite(compute_metrics(EvalPrediction(found, ["a"]))["perplexity"])
