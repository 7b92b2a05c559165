"""The line that says what decides the number of a score."""

from importlib.metadata import version

import pytest

from captioning.scoring import TOKENIZERS, clinical, concepts
from captioning.scoring.clinical import ATTRIBUTES
from captioning.scoring.score import score
from captioning.scoring.signatures import signature


@pytest.fixture(scope="module")
def scores(captions, training):
    return score(captions, training, tokenizer=None)["scores"]


def test_each_score_has_a_signature(scores, training):
    for name, entry in scores.items():
        assert entry["signature"] == signature(name, num_training=len(training.captions)), name
    assert scores["rougeL"]["signature"] == f"case:lower|tok:ascii|stem:no|f:1|rouge_score:{version('rouge_score')}"
    assert f"train:{len(training.captions)}|" in scores["concept_f1"]["signature"]


def test_implementations_of_one_metric_have_different_signatures():
    for metric in ("rougeL", "bleu4", "cider", "meteor"):
        found = [signature(f"{prefix}_{metric}") for prefix in TOKENIZERS.values()]
        assert len({*found, signature("rougeL")}) == len(found) + 1
    assert "case:lower|tok:whitespace" in signature("nlgeval_lower_cider")
    assert signature("rouge1") != signature("imageclef_rouge1")
    assert f"pycocoevalcap:{version('pycocoevalcap')}" in signature("coco_cider")


@pytest.mark.parametrize(("module", "changed"), [(clinical, [*ATTRIBUTES, "concept"]), (concepts, ["concept"])])
def test_another_reader_has_another_signature(module, changed, monkeypatch, write):
    before = {name: signature(f"{name}_f1") for name in (*ATTRIBUTES, "concept")}
    monkeypatch.setattr(module, "__file__", write("reader.py", "another"))
    assert [name for name, text in before.items() if signature(f"{name}_f1") != text] == list(changed)


def test_of_bertscore_the_model_is_named_without_its_folder():
    pytest.importorskip("bert_score")
    text = signature("imageclef_bertscore", "/home/someone/deberta-xlarge-mnli")
    assert f"|model:deberta-xlarge-mnli|idf:references|rescale:no|bert-score:{version('bert-score')}" in text
    assert "someone" not in text
