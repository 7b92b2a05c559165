"""JSON that we write is JSON: NaN and infinity, which other readers refuse, are null, and our readers take that."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import flags, read_json, save_captioner, score_flags

import run_captioning
from captioning.__main__ import main as command
from captioning.errors import UserError
from captioning.files import to_json
from captioning.models.blip import BlipCaptioner
from captioning.models.load import load_captioner
from captioning.reporting.model_card import render_card
from captioning.reporting.run_record import RunRecord
from captioning.training.trainer import CaptioningTrainer


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_nan_and_infinity_become_null_at_any_depth():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (np.float64("inf"), "NaN", None, True, 3)}]}
    assert strict(to_json(value)) == {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True, 3]}]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_whose_losses_are_not_finite_leaves_json_alone(
    config_file, parquet_folder, tmp_path, monkeypatch, capsys, value
):
    nll, step = BlipCaptioner.caption_nll, CaptioningTrainer._clip_grad_norm
    monkeypatch.setattr(BlipCaptioner, "caption_nll", lambda *arguments: nll(*arguments) * value)
    monkeypatch.setattr(
        CaptioningTrainer, "_clip_grad_norm", lambda *arguments: step(*arguments) * value
    )  # as in fp16
    folder = tmp_path / "run"
    options = {"metric_for_best_model": "loss", "num_train_epochs": 1, "logging_steps": 1, "num_beams": 1}
    run_captioning.main(flags(config_file, parquet_folder, folder, **options))
    files = [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]
    assert len(files) > 15
    for path in files:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(text)
    state = read_json(next(folder.glob("checkpoint-*/trainer_state.json")))
    assert state["best_metric"] is None and state["log_history"][0]["grad_norm"] is None
    assert read_json(folder / "all_results.json")["predict_loss"] is None
    assert strict((folder / "predictions" / "test.jsonl").read_text().splitlines()[0])["nll"] is None
    card = render_card(RunRecord(folder), folder.name)
    assert card == (folder / "README.md").read_text(), "as written in the run, from memory"
    printed = capsys.readouterr().out
    assert "rougeL" in printed and "| test |" in card and (folder / "report.html").is_file()
    for text in (card.replace("infinity", ""), printed):
        assert not {"nan", "inf"} & set(text.lower().replace("|", " ").split())
    run_captioning.main(score_flags(folder, parquet_folder, tmp_path / "again", num_beams=1, do_eval=False))
    capsys.readouterr()
    command(["score", str(folder / "predictions" / "test.jsonl"), "--json", "--tokenizer", "none"])
    strict(capsys.readouterr().out)


WEIGHT = "text_decoder.bert.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_model_with_weights_of_nan_or_infinity_is_refused_when_it_is_loaded(
    captioner, parquet_folder, tmp_path, value
):
    weights = captioner.model.get_parameter(WEIGHT).data
    weights[1] = 3e38  # large weights, whose sum overflows, are weights
    assert load_captioner(str(save_captioner(captioner, tmp_path / "large")))
    weights[0, 2] = value
    save_captioner(captioner, tmp_path / "broken")
    message = f"model '{tmp_path / 'broken'}': '{WEIGHT}' holds NaN or infinity; give a checkpoint from before"
    with pytest.raises(UserError, match=message):
        run_captioning.main(score_flags(tmp_path / "broken", parquet_folder, tmp_path / "run"))


def test_a_checkpoint_with_weights_of_nan_is_not_resumed_from(make_trainer):
    arguments = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    trainer = make_trainer(max_steps=1, **arguments)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-1"
    with torch.no_grad():
        trainer.model.get_parameter(WEIGHT)[0] = math.nan
    trainer.model.save_pretrained(checkpoint)
    with pytest.raises(UserError, match=f"'{checkpoint}': '{WEIGHT}' holds NaN"):
        make_trainer(max_steps=2, **arguments).train(resume_from_checkpoint=checkpoint)
