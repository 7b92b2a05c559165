"""The record of a run: what was run on what, from files that are read once."""

from pathlib import Path
from unittest import mock

import pytest
from helpers import make_predictions, make_record

from captioning.models.blip import BlipCaptioner
from captioning.models.image_text_to_text import ImageTextToTextCaptioner
from captioning.reporting.run_record import ROCOV2, Origin, RunRecord


COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    "given, revision, origin",
    [
        ("user/model", COMMIT, Origin("user/model", COMMIT)),
        ("user/model", "main", Origin("model")),  # a path: what came from the Hub has its commit
        ("/home/me/my data/", None, Origin("my-data")),
        ("..\\me\\start", None, Origin("start")),
        ("/", None, Origin("local")),
    ],
)
def test_an_origin_has_no_folder_of_the_machine(given, revision, origin):
    assert Origin.of(given, revision) == origin


@pytest.mark.parametrize(
    "recipe, model",
    [
        ({}, "fine-tuned from Salesforce/blip @ 0123"),
        ({"do_train": False}, "Salesforce/blip @ 0123"),
        ({"model_name_or_path": "/home/me/start", "model_revision": None}, "fine-tuned from start"),
        ({"model_name_or_path": None, "config_name": "/me/tiny.json"}, "tiny, trained from random weights"),
        ({"model_name_or_path": None, "config_name": "tiny", "do_train": False}, "tiny, random weights"),
    ],
)
def test_the_model_in_words(tmp_path, recipe, model):
    decoding = "3 beams, at most 64 new tokens, length penalty 1"
    facts = make_record(tmp_path, [], **recipe).facts(4)
    assert facts == {"model": model, "data": "the folder my-data", "decoding": decoding}


@pytest.mark.parametrize(
    "name, revision, image_id, kind, data, words",
    [
        ("phantoms", None, "test_0", "phantoms", Origin("phantoms"), "phantoms, synthetic images"),
        (ROCOV2, COMMIT, "0", "rocov2", Origin(ROCOV2, COMMIT), ROCOV2),
        ("/me/x", None, "ROCOv2_2023_test_000001", "rocov2", Origin(ROCOV2), "a local copy of ROCOv2"),
        ("me/x", COMMIT, "ROCOv2_2023_test_000001", "rocov2", Origin("me/x", COMMIT), "me/x"),
        ("me/x", COMMIT, "0", "other", Origin("me/x", COMMIT), "me/x"),
        ("/me/x", None, "0", "other", Origin("x"), "the folder x"),
    ],
)
def test_the_data(tmp_path, name, revision, image_id, kind, data, words):
    rows = make_predictions(1, image_id=[image_id])
    record = make_record(tmp_path, rows, dataset_name=name, dataset_revision=revision)
    assert (record.data_kind, record.data, record.data_in_words) == (kind, data, words)
    assert record.facts(7)["data"] == (f"{words} @ 0123456" if revision else words)


def test_each_file_is_read_once_and_what_is_in_hand_is_not_read(tmp_path, monkeypatch):
    rows = make_predictions(2)
    make_record(tmp_path, rows, [{"step": 1, "loss": 2.0}], {"test": {"captions": 2}})
    record = RunRecord(tmp_path)
    counted = mock.Mock(side_effect=open)
    monkeypatch.setattr("builtins.open", counted)
    monkeypatch.setattr("io.open", counted)  # by which pathlib opens
    for _ in range(2):
        assert record.predictions("test") == rows
        assert record.predictions("validation") == []
        assert record.scores["test"] == {"captions": 2}
        assert record.recipe["num_beams"] == 3 and record.recipe["language"] == "en"
        assert record.log_history == [{"step": 1, "loss": 2.0}]
        assert record.results == {} and record.config == {}
    opened = sorted(Path(call.args[0]).name for call in counted.call_args_list)
    assert opened == ["recipe.json", "scores.json", "test.jsonl", "trainer_state.json"]
    record.keep("validation", rows[:1], {"captions": 1})
    assert record.predictions("validation") == rows[:1]
    assert record.scores == {"test": {"captions": 2}, "validation": {"captions": 1}}


def test_the_class_of_the_model_is_that_of_the_run_or_of_the_folder(tmp_path):
    assert RunRecord(tmp_path, "llava").captioner_class is ImageTextToTextCaptioner
    assert RunRecord(tmp_path).captioner_class is BlipCaptioner
    (tmp_path / "base_config.json").write_text('{"model_type": "git"}')
    assert RunRecord(tmp_path).card_facts.tags == ("git",)
