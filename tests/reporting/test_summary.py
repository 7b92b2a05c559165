"""The summary on the terminal."""

from helpers import make_predictions, make_record

from captioning.reporting.summary import summary
from captioning.scoring.captions import Captions
from captioning.scoring.score import score


METRICS = {"eval_loss": 1.5, "eval_rougeL": 0.25, "predict_loss": 1.25, "predict_rougeL": 0.125, "train_loss": 3.0}


def test_both_splits_and_three_examples(tmp_path):
    references = ["Left lung — clear.", "A\nbreak\x1b[2J", "no", "fourth"]
    text = summary(METRICS, make_record(tmp_path, make_predictions(4, reference=references)))
    assert text.split("\n")[0].split() == ["validation", "test"]
    assert "rougeL                                  0.2500      0.1250\n" in text
    assert text.count("reference ") == 3
    assert "Left lung — clear." in text and "A break [2J" in text
    assert "fourth" not in text


def test_a_run_that_captioned_nothing(tmp_path):
    lines = summary({"eval_loss": 1.5}, make_record(tmp_path, [])).splitlines()
    assert [line.split() for line in lines] == [["validation"], ["loss", "1.5000"]]


def test_the_baselines_and_the_verdict(tmp_path):
    record = make_record(tmp_path, [], scores={"test": {"verdict": "ROUGE-L 0.1 does NOT beat it.", "missing": {}}})
    text = summary(METRICS | {"predict_rougeL_constant": 0.165, "predict_rougeL_shuffled_images": 0.1}, record)
    assert "rougeL of constant caption                   -      0.1650" in text.splitlines()
    assert "rougeL of shuffled images" in text
    assert "nearest" not in text
    assert "test: ROUGE-L 0.1 does NOT beat it." in text.splitlines()


def test_scores_that_need_java_are_named_once_where_there_is_none(tmp_path, monkeypatch):
    """Else a run ends without BLEU and METEOR, and nobody knows; the advice names no flag of another command."""
    monkeypatch.setenv("PATH", str(tmp_path))
    captions = Captions(["1", "2"], ["a cyst", "no cyst"], ["a cyst", "a nodule"], [[], []])
    found = {"verdict": "", "missing": score(captions)["missing"]}
    text = summary(METRICS, make_record(tmp_path / "run", [], scores=dict.fromkeys(("validation", "test"), found)))
    assert text.count("not computed: coco_*: `java` cannot be run (No such file or directory): install a Java") == 1
    assert "--tokenizer" not in text
