"""The training curve, and the summary on the terminal."""

import json

import numpy as np
import pytest
from PIL import Image as PIL

from captioning.reporting.curves import draw_training_curve
from captioning.reporting.summary import summary
from captioning.scoring.captions import Captions, write_predictions


METRICS = {"eval_loss": 1.5, "eval_rougeL": 0.25, "predict_loss": 1.25, "predict_rougeL": 0.125, "train_loss": 3.0}


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions" / "test.jsonl"
    references = ["Left lung — clear.", "A\nbreak", "no", "fourth"]
    captions = Captions(list("abcd"), ["lung clear", "a break", "yes", "x"], references, [[]] * 4)
    write_predictions(path, captions, np.arange(4.0))
    return path


def test_summary_shows_both_splits_and_three_examples(predictions):
    lines = summary(METRICS, predictions.parent.parent).splitlines()
    assert lines[0].split() == ["validation", "test"]
    assert "rougeL                        0.2500      0.1250" in lines
    text = "\n".join(lines)
    assert text.count("reference ") == 3
    assert "Left lung — clear." in text
    assert "fourth" not in text


def test_summary_of_a_run_without_test_split(tmp_path):
    lines = summary({"eval_loss": 1.5}, tmp_path).splitlines()
    assert lines[0].split() == ["validation"]
    assert lines[1].split() == ["loss", "1.5000"]


def test_the_training_curve_is_drawn_from_the_log(tmp_path):
    log = [{"step": 5, "loss": 2.0}, {"step": 5, "eval_loss": 2.1, "eval_rougeL": 0.1}, {"step": 9, "loss": 1.0}]
    draw_training_curve(tmp_path)
    assert not list(tmp_path.iterdir()), "a run that did not train has no curve"
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    draw_training_curve(tmp_path)
    first = (tmp_path / "training_curve.png").read_bytes()
    assert min(PIL.open(tmp_path / "training_curve.png").size) > 200
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log[:2]}))
    draw_training_curve(tmp_path)
    assert (tmp_path / "training_curve.png").read_bytes() != first


def test_summary_shows_the_baselines_and_the_verdict(predictions):
    folder = predictions.parent.parent
    (folder / "scores.json").write_text(json.dumps({"test": {"verdict": "ROUGE-L 0.1 does NOT beat it."}}))
    text = summary(METRICS | {"predict_rougeL_constant": 0.165, "predict_rougeL_shuffled_images": 0.1}, folder)
    assert "rougeL of constant                 -      0.1650" in text.splitlines()
    assert "rougeL of other images" in text
    assert "nearest" not in text
    assert "test: ROUGE-L 0.1 does NOT beat it." in text.splitlines()
