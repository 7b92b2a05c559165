"""Decode settings chosen on validation: the best wins, a rerun keeps it, and all processes agree."""

import json

import pytest
from helpers import flags, outcome, read_json, run_ranks, save_captioner, score_flags
from transformers import GenerationConfig

import run_captioning
from captioning.errors import UserError
from captioning.training import tune_decoding
from captioning.training.arguments import CaptioningArguments
from captioning.training.decoding import DEFAULTS, in_words, settings_of_grid


WRITTEN = {"before": {}, "metric": "rougeL", "note": "", "table": []}


def test_the_winner_is_kept_by_a_rerun_and_by_a_resumed_run(config_file, parquet_folder, tmp_path, caplog):
    first, again = tmp_path / "first", tmp_path / "again"
    options = {"tune_decoding": True, "tune_samples": 5, "tune_decoding_grid": "num_beams=1,2"}
    arguments = flags(config_file, parquet_folder, first, **options)
    caplog.set_level("INFO", "captioning")
    run_captioning.main(arguments)
    recipe = read_json(first / "recipe.json")
    tuned, winner = recipe["tuned_decoding"], recipe["num_beams"]
    scores = [row["rougeL"] for row in tuned["table"]]
    assert [row["decoding"].split()[0] for row in tuned["table"]] == ["3", "greedy", "2"]
    assert scores[[3, 1, 2].index(winner)] == max(scores)
    assert winner != tuned["before"]["num_beams"] == 3, "another model: nothing to see"
    assert GenerationConfig.from_pretrained(first).num_beams == winner
    for text in ((first / "README.md").read_text(), (first / "report.html").read_text(), caplog.text):
        assert tuned["note"] in text
        assert all(row["decoding"] in text and f"{row['rougeL']:.4f}" in text for row in tuned["table"])
    before = outcome(first)
    caplog.clear()
    run_captioning.main([str(first / "recipe.json"), "--output_dir", str(again)])
    assert "Trying" not in caplog.text
    assert outcome(again) == before
    checkpoints = [GenerationConfig.from_pretrained(path) for path in again.glob("checkpoint-*")]
    assert {config.num_beams for config in checkpoints} == {3}, "by which they were evaluated"
    assert {**read_json(again / "recipe.json"), "hardware": None} == {**recipe, "hardware": None}
    run_captioning.main([*arguments, "--resume_from_checkpoint", "true"])
    assert "Resuming with another recipe" not in caplog.text
    assert (outcome(first)["predictions"], read_json(first / "recipe.json")) == (before["predictions"], recipe)


def test_two_processes_and_streamed_images_choose_alike(captioner, parquet_folder, tmp_path):
    model, options = save_captioner(captioner, tmp_path / "model"), {"tune_decoding": True, "tune_samples": 5}
    folders = tmp_path / "alone", tmp_path / "both"
    run_captioning.main(score_flags(model, parquet_folder, folders[0], **options))
    run_ranks(2, score_flags(model, parquet_folder, folders[1], streaming=True, **options))
    one, two = (read_json(folder / "recipe.json")["tuned_decoding"] for folder in folders)
    assert one == two and len(one["table"]) == 9
    assert len({(folder / "predictions/test.jsonl").read_text() for folder in folders}) == 1


@pytest.mark.parametrize(
    ("score_of_4", "greater", "winner"),
    [(0.5, True, 2), (0.50004, True, 2), (0.5002, True, 4), (0.5002, False, 2), (0.4, False, 4)],
)
def test_of_equals_the_cheaper_wins(make_trainer, splits, tmp_path, monkeypatch, score_of_4, greater, winner):
    trainer = make_trainer(
        greater_is_better=greater, tune_decoding=True, tune_decoding_grid=[f"num_beams={n}" for n in (5, 2, 4)]
    )
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"tune_decoding": True}))

    def score_settings(trainer, rows, configs):
        scores = [score_of_4 if config.num_beams == 4 else 0.5 for config in configs]
        return [{"decoding": in_words(c), "gen_len": 9, "rougeL": s} for c, s in zip(configs, scores, strict=True)]

    monkeypatch.setattr(tune_decoding, "score_settings", score_settings)
    tune_decoding.tune_decoding(trainer, splits["validation"])
    assert trainer.generation_config.num_beams == trainer.model.generation_config.num_beams == winner


def test_a_grid_is_the_run_itself_and_each_part_of_it():
    found = settings_of_grid(
        DEFAULTS | {"num_beams": 3}, ["num_beams=1,2 length_penalty=1,2", "no_repeat_ngram_size=0,3"]
    )
    short = [(row["num_beams"], row["length_penalty"], row["no_repeat_ngram_size"]) for row in found]
    assert short == [(3, 1.0, 0), (1, 1.0, 0), (2, 1.0, 0), (2, 2.0, 0), (3, 1.0, 3)]  # greedy has no length penalty


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tune_decoding_grid": ["beams=3"]}, "'beams=3' is not like 'num_beams=3,5 length_penalty=1,2'"),
        ({"tune_decoding_grid": ["max_new_tokens=9"]}, "it takes num_beams, "),
        ({"tune_decoding_grid": ["num_beams=" + ",".join(map(str, range(1, 102)))]}, "100 combinations at most"),
        ({"tune_decoding_grid": ["num_beams=1 num_beams=2"]}, "each once"),
        ({"tune_decoding_grid": ["num_beams=999"]}, "num_beams is 999"),
        ({"tune_decoding_grid": ["min_new_tokens=65"]}, "exceeds max_new_tokens 64"),
        ({"metric_for_best_model": "loss"}, "does not change the loss"),
        ({"predict_with_generate": False}, "needs captions of the validation split"),
        ({"do_eval": False}, "needs captions of the validation split"),
        ({"tune_decoding": False, "tuned_decoding": {"before": 3}}, "tuned_decoding is not what a run writes"),
        *(
            ({"tune_decoding": False, "tuned_decoding": WRITTEN | other}, "tuned_decoding is not what a run writes")
            for other in ({"table": 3}, {"table": [{"decoding": "x"}]}, {"metric": "<b>"}, {"note": "\033[2J"})
        ),
    ],
)
def test_what_cannot_be_tried_is_named(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        CaptioningArguments(output_dir=str(tmp_path), **{"tune_decoding": True} | values)
