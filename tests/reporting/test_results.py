"""What a run keeps of a split: whose results stand in a folder, and what happens when the page fails."""

from unittest import mock

import numpy as np
import pytest
from helpers import flags, predictions, read_json, score_flags

import run_captioning
from captioning.errors import UserError
from captioning.reporting import results, run_record
from captioning.reporting.results import shown_with_attention
from captioning.training.output_folder import remove_other_results
from captioning.training.trainer import CaptioningTrainer


@pytest.fixture(scope="module")
def trained(config_file, parquet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_captioning.main(flags(config_file, parquet_folder, folder, num_train_epochs=1, max_train_samples=9))
    return folder


def test_a_run_does_not_read_back_its_predictions(trained, parquet_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "read_predictions", lambda path: pytest.fail(f"{path} is read back"))
    run_captioning.main(score_flags(trained, parquet_folder, tmp_path))
    card, page = ((tmp_path / file).read_text() for file in ("README.md", "report.html"))
    assert "| median |" in card and "image_0203" in page


def test_the_page_shows_attention_for_what_comes_first_in_each_of_its_orders():
    scores = [0.3] * 30 + [0.0] * 300 + [0.9, 0.8] + [0.2] * 70
    captions = ["same"] * 50 + [str(i) for i in range(352)]
    rows = [{"rougeL": s, "prediction": c} for s, c in zip(scores, captions, strict=True)]
    assert shown_with_attention(rows) == [0, 1, 2, 3, 330, 331, 30, 31, 32, 33]
    assert shown_with_attention(rows[:1]) == [0]


def test_the_attention_of_an_image_is_that_of_its_own_caption(trained, parquet_folder, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(CaptioningTrainer, "word_attention", lambda self, rows, tokens: self.captioner.decode(tokens))
    monkeypatch.setattr(results, "write_report", lambda *args, attention, **kwargs: found.update(attention))
    run_captioning.main(score_flags(trained, parquet_folder, tmp_path))
    assert found and found.items() <= {row["image_id"]: row["prediction"] for row in predictions(tmp_path)}.items()


def test_a_caption_of_nothing_but_padding_has_no_words(make_trainer, splits, processor):
    tokenizer = processor.tokenizer
    pad, sep = tokenizer.pad_token_id, tokenizer.sep_token_id
    word = tokenizer("an", add_special_tokens=False)["input_ids"][0]
    tokens = np.array([[pad, pad, pad, -100], [word, pad, word, pad], [word, sep, word, pad]])
    found = make_trainer().word_attention(splits["test"].select(range(3)), tokens)
    assert [[name for name, _ in words] for words in found] == [[], ["an", "an"], ["an"]]


def test_a_page_that_fails_costs_neither_scores_nor_card(trained, parquet_folder, tmp_path, monkeypatch, caplog):
    disk_full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(results, "write_report", disk_full)
    metrics = run_captioning.main(score_flags(trained, parquet_folder, tmp_path))
    assert "report.html cannot be written: OSError: [Errno 28] No space left on device" in caplog.text
    assert read_json(tmp_path / "predict_results.json")["predict_rougeL"] == metrics["predict_rougeL"]
    assert (tmp_path / "README.md").is_file()
    assert not (tmp_path / "report.html").exists()


def test_scores_of_another_run_do_not_stay_in_its_folder(trained, parquet_folder, tmp_path):
    run_captioning.main(score_flags(trained, parquet_folder, tmp_path, do_eval=False, write_submission=True))
    before = read_json(tmp_path / "scores.json")
    run_captioning.main(score_flags(trained, parquet_folder, tmp_path, do_predict=False))
    after = read_json(tmp_path / "scores.json")
    assert after == before | {"validation": after["validation"]}, "the same recipe"
    assert (tmp_path / "submission.csv").is_file()
    run_captioning.main(score_flags(trained, parquet_folder, tmp_path, do_predict=False, max_new_tokens=9))
    assert read_json(tmp_path / "scores.json").keys() == {"validation"}
    files = ("predictions/test.jsonl", "submission.*", "predict_results.json")
    assert not [path for file in files for path in tmp_path.glob(file)]
    assert "predict_loss" not in read_json(tmp_path / "all_results.json")
    card = (tmp_path / "README.md").read_text()
    assert "| validation split, " in card and "| test |" not in card
    run_captioning.main(score_flags(trained, parquet_folder, tmp_path, predict_with_generate=False))
    assert not [*tmp_path.glob("scores.json"), *tmp_path.glob("report.html"), *tmp_path.glob("predictions/*")]


def test_a_run_that_trains_has_new_weights_and_keeps_no_scores(tmp_path):
    recipe = {"do_train": True, "seed": 1}
    for name in ("scores.json", "model.safetensors"):
        (tmp_path / name).write_text("")
    remove_other_results(str(tmp_path), recipe, recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_baselines_come_from_as_many_training_captions_as_the_run_had(trained, parquet_folder, tmp_path):
    run_captioning.main(score_flags(trained, parquet_folder, tmp_path, do_eval=False, max_train_samples=9))
    found, again = (read_json(folder / "scores.json")["test"]["baselines"] for folder in (trained, tmp_path))
    assert again == found
    assert found["constant"]["found_among"] == "9 training captions"
    assert found["nearest_image"]["found_among"] == "9 training images"


@pytest.mark.parametrize("without", [{"do_predict": False}, {"predict_with_generate": False}])
def test_a_submission_without_captions_is_refused_before_the_work(trained, parquet_folder, tmp_path, without):
    with pytest.raises(UserError, match="write_submission needs captions of the test split"):
        run_captioning.main(score_flags(trained, parquet_folder, tmp_path, write_submission=True, **without))
