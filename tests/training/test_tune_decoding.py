"""Decode settings chosen on validation: the best wins, a rerun keeps it, and all processes agree."""

import json

import pytest
from helpers import flags, outcome, read_json, run_ranks, save_captioner, score_flags
from transformers import GenerationConfig

import run_captioning
from captioning.errors import UserError
from captioning.training import tune_decoding
from captioning.training.arguments import CaptioningArguments
from captioning.training.decoding import DEFAULT_GRID, in_words, settings_of_grid


OWN = {"num_beams": 3, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "max_new_tokens": 12}


def test_the_winner_is_kept_by_a_rerun_and_by_a_resumed_run(config_file, parquet_folder, tmp_path, caplog):
    first, again = tmp_path / "first", tmp_path / "again"
    arguments = flags(
        config_file, parquet_folder, first, tune_decoding=True, tune_samples=5, tune_decoding_grid="num_beams=1,2"
    )
    caplog.set_level("INFO", "captioning")
    run_captioning.main(arguments)
    recipe = read_json(first / "recipe.json")
    tuned, winner = recipe["tuned_decoding"], recipe["num_beams"]
    scores = {row["decoding"].split()[0]: row["rougeL"] for row in tuned["table"]}
    assert list(scores) == ["3", "greedy", "2"]
    assert scores[{1: "greedy"}.get(winner, str(winner))] == max(scores.values())
    assert winner != tuned["before"]["num_beams"] == 3, "another model: nothing to see"
    assert GenerationConfig.from_pretrained(first).num_beams == winner
    for text in ((first / name).read_text() for name in ("README.md", "report.html")):
        assert tuned["note"] in text
        assert all(row["decoding"] in text and f"{row['rougeL']:.4f}" in text for row in tuned["table"])
    assert tuned["note"] in caplog.text and all(row["decoding"] in caplog.text for row in tuned["table"])
    before = outcome(first)
    caplog.clear()
    run_captioning.main([str(first / "recipe.json"), "--output_dir", str(again)])
    assert "Trying" not in caplog.text
    assert outcome(again) == before
    assert {**read_json(again / "recipe.json"), "hardware": None} == {**recipe, "hardware": None}
    run_captioning.main([*arguments, "--resume_from_checkpoint", "true"])
    assert "Resuming with another recipe" not in caplog.text
    assert (outcome(first)["predictions"], read_json(first / "recipe.json")) == (before["predictions"], recipe)


def test_two_processes_and_streamed_images_choose_alike(captioner, parquet_folder, tmp_path):
    model, options = save_captioner(captioner, tmp_path / "model"), {"tune_decoding": True, "tune_samples": 5}
    alone, both = tmp_path / "alone", tmp_path / "both"
    run_captioning.main(score_flags(model, parquet_folder, alone, **options))
    run_ranks(2, score_flags(model, parquet_folder, both, streaming=True, **options))
    one, two = (read_json(folder / "recipe.json") for folder in (alone, both))
    assert one["tuned_decoding"] == two["tuned_decoding"]
    assert len(one["tuned_decoding"]["table"]) == 9
    assert (alone / "predictions/test.jsonl").read_text() == (both / "predictions/test.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "winner"), [({}, 2), ({4: 0.50004}, 2), ({4: 0.5002}, 4)], ids=["tie", "in the fifth digit", "better"]
)
def test_of_equals_the_cheaper_wins(make_trainer, splits, tmp_path, monkeypatch, changes, winner):
    trainer = make_trainer(tune_decoding=True, tune_decoding_grid=[f"num_beams={n}" for n in (5, 2, 4)])
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"tune_decoding": True}))

    def score_settings(trainer, rows, configs):
        return [{"decoding": in_words(c), "gen_len": 9.0, "rougeL": changes.get(c.num_beams, 0.5)} for c in configs]

    monkeypatch.setattr(tune_decoding, "score_settings", score_settings)
    tune_decoding.tune_decoding(trainer, splits["validation"])
    assert trainer.generation_config.num_beams == trainer.model.generation_config.num_beams == winner
    assert "tune_decoding" not in read_json(tmp_path / "run" / "recipe.json")


def test_a_grid_is_the_run_itself_and_each_part_of_it():
    assert len(settings_of_grid(OWN, DEFAULT_GRID)) == 9
    found = settings_of_grid(OWN, ["num_beams=1,2 length_penalty=1,2", "no_repeat_ngram_size=0,3"])
    short = [(row["num_beams"], row["length_penalty"], row["no_repeat_ngram_size"]) for row in found]
    assert short == [(3, 1.0, 0), (1, 1.0, 0), (2, 1.0, 0), (2, 2.0, 0), (3, 1.0, 3)]  # greedy has no length penalty


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tune_decoding_grid": ["beams=3"]}, "'beams=3' is not like 'num_beams=3,5 length_penalty=1,2'"),
        ({"tune_decoding_grid": ["num_beams=2.5"]}, "'num_beams=2.5' is not like"),
        ({"tune_decoding_grid": ["max_new_tokens=9"]}, "it takes num_beams, "),
        ({"tune_decoding_grid": ["num_beams=" + ",".join(map(str, range(1, 102)))]}, "100 combinations at most"),
        ({"tune_decoding_grid": ["num_beams=999"]}, "num_beams is 999"),
        ({"tune_decoding_grid": ["min_new_tokens=65"]}, "exceeds max_new_tokens 64"),
        ({"metric_for_best_model": "loss"}, "does not change the loss"),
        ({"predict_with_generate": False}, "needs captions of the validation split"),
        ({"do_eval": False}, "needs captions of the validation split"),
        ({"tune_samples": 0}, "tune_samples is 0"),
        ({"tune_decoding": False, "tuned_decoding": {"before": 3}}, "tuned_decoding is not what a run writes"),
    ],
)
def test_what_cannot_be_tried_is_named(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        CaptioningArguments(output_dir=str(tmp_path), **{"tune_decoding": True} | values)
