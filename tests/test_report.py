"""Predictions on disk, the summary on the terminal, and the card."""

import json

import numpy as np
import pytest

from model_card import write_model_card
from report import read_predictions, summary, write_predictions


METRICS = {"eval_loss": 1.5, "eval_rougeL": 0.25, "predict_loss": 1.25, "predict_rougeL": 0.125, "train_loss": 3.0}


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions" / "test.jsonl"
    references = ["Left lung — clear.", "A\nbreak", "no", "fourth"]
    write_predictions(path, list("abcd"), references, ["lung clear", "a break", "yes", "x"], np.arange(4.0))
    return path


def test_predictions_have_the_keys_of_the_contract(predictions):
    rows = read_predictions(predictions)
    assert [list(row) for row in rows] == [["image_id", "reference", "prediction", "rougeL", "nll"]] * 4
    assert [row["rougeL"] for row in rows] == pytest.approx([0.8, 1.0, 0.0, 0.0])
    assert rows[0]["reference"] == "Left lung — clear."
    assert rows[3]["nll"] == 3.0


def test_predictions_appear_whole_or_not_at_all(predictions):
    before = predictions.read_text()
    with pytest.raises(ValueError, match="zip"):
        write_predictions(predictions, ["a"], ["x"], ["y"], np.arange(2.0))
    assert predictions.read_text() == before


def test_summary_shows_both_splits_and_three_examples(predictions):
    lines = summary(METRICS, predictions.parent).splitlines()
    assert lines[0].split() == ["validation", "test"]
    assert "rougeL                  0.2500      0.1250" in lines
    text = "\n".join(lines)
    assert text.count("reference ") == 3
    assert "Left lung — clear." in text
    assert "fourth" not in text


def test_summary_of_a_run_without_test_split(tmp_path):
    lines = summary({"eval_loss": 1.5}, tmp_path).splitlines()
    assert lines[0].split() == ["validation"]
    assert lines[1].split() == ["loss", "1.5000"]


def test_the_card_tells_the_scores_and_the_limits(tmp_path):
    write_model_card(str(tmp_path), METRICS)
    card = (tmp_path / "README.md").read_text()
    assert "Validation: loss 1.5000, rougeL 0.2500." in card
    assert "Test: loss 1.2500, rougeL 0.1250." in card
    assert "not for clinical use" in card
    assert json.dumps(METRICS["train_loss"]) not in card
    assert "text=" not in card
    write_model_card(str(tmp_path), METRICS, prompt='a "picture" of')
    assert """Image.open("image.png"), text='a "picture" of',""" in (tmp_path / "README.md").read_text()
