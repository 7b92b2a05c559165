"""Predictions on disk."""

import numpy as np
import pytest

from predictions import read_predictions, write_predictions


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
