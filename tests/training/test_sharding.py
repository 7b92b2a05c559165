"""Several processes see the batches that one process sees, each row once, and end with the same losses and scores."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from helpers import (
    flags,
    losses,
    make_rows,
    outcome,
    predictions,
    read_json,
    run,
    run_ranks,
    score_flags,
    signal_when,
    start_ranks,
    without_times,
)
from processes import ROOT
from torch.utils.data import RandomSampler, SequentialSampler

from captioning.training.samplers import PaddedRows, PaddedSampler


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0",
                   "--num_processes"),
}  # fmt: skip


def launch(launcher: str, number: int, arguments: list, script="run_captioning.py", **environment: str):
    """Run a script by one of the commands that start several processes."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(number), script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> Path:
    """Splits whose sizes no number of processes divides."""
    folder = tmp_path_factory.mktemp("odd")
    DatasetDict(train=make_rows(23), validation=make_rows(11, 100), test=make_rows(7, 200)).save_to_disk(folder)
    return folder


# --- Rows and order -------------------------------------------------------------------------------------------


def test_a_blank_row_has_no_targets(captioner, splits, collator):
    captioner.set_prompt("chest radiograph")
    rows = PaddedRows(splits["train"], captioner.prompt_row)
    assert len(rows) == 24 and len(rows.__getitems__([24, 25])) == 2
    batch = collator(rows.__getitems__([3, 24, 0]))
    assert (batch["labels"][1] == -100).all()
    assert batch["attention_mask"][1].sum() == len(captioner.prompt_row) > 2
    alone = collator([splits["train"][3], splits["train"][0]])
    assert torch.equal(batch["labels"][[0, 2]][:, : alone["labels"].shape[1]], alone["labels"])
    assert torch.equal(batch["pixel_values"][[0, 2]], alone["pixel_values"])


@pytest.mark.parametrize("number", [1, 7, 8, 9, 23])
def test_an_epoch_is_a_whole_number_of_global_batches_and_holds_each_row_once(number):
    sampler = PaddedSampler(RandomSampler(range(number)), number, multiple=8, data_seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == len(sampler) == -(-number // 8) * 8
        assert sorted(orders[-1][:number]) == list(range(number))
        assert set(orders[-1][number:]) <= {number}
    assert orders[0] == orders[2]
    assert number == 1 or orders[0] != orders[1]
    assert list(PaddedSampler(SequentialSampler(range(3)), 3, 2)) == [0, 1, 2, 3]


# --- Whole runs -----------------------------------------------------------------------------------------------

TRAINING = {"num_train_epochs": 2, "logging_steps": 1, "report_to": "none", "neighbor_samples": 6}


@pytest.fixture(scope="module")
def alone(config_file, odd_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    sizes = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    run(flags(config_file, odd_folder, folder, **TRAINING | sizes))
    return folder


@pytest.mark.parametrize(
    ("number", "launcher", "options"),
    [
        pytest.param(2, "torchrun", {}, marks=pytest.mark.slow),
        (3, None, {"dataloader_num_workers": 1}),
        pytest.param(2, "accelerate", {"fast_blip": False}, marks=pytest.mark.slow),
        (2, None, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
    ],
    ids=["torchrun", "3", "accelerate, stock", "accumulation"],
)
def test_training_in_several_processes_is_that_of_one(
    config_file, odd_folder, alone, tmp_path, number, launcher, options
):
    sizes = {"per_device_train_batch_size": 6 // number, "per_device_eval_batch_size": 6 // number}
    folder = tmp_path / "run"
    arguments = flags(config_file, odd_folder, folder, **TRAINING | sizes | options)
    if launcher:
        result = launch(launcher, number, arguments)
        assert result.returncode == 0, result.stderr
    else:
        run_ranks(number, arguments)
    runs = folder, alone
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5) and len(losses(folder)) == 8
    found, expected = (read_json(run / "all_results.json") for run in runs)
    for name in without_times(expected):
        tolerance = 1e-5 if "loss" in name or "perplexity" in name else 1e-9
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=1e-9), name
    for split in ("validation", "test"):
        found, expected = ([(row["image_id"], row["prediction"]) for row in predictions(run, split)] for run in runs)
        assert found == expected
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert read_json(folder / "recipe.json")["hardware"]["processes"] == number


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_scores_of_a_model_are_the_same_in_every_digit(odd_folder, alone, tmp_path, number):
    one, several = tmp_path / "one", tmp_path / "several"
    options = {"num_beams": 2, "neighbor_samples": 6}
    run(score_flags(alone, odd_folder, one, per_device_eval_batch_size=6, **options))
    run_ranks(number, score_flags(alone, odd_folder, several, per_device_eval_batch_size=6 // number, **options))
    for name in ("scores.json", "predictions/validation.jsonl", "predictions/test.jsonl"):
        assert (one / name).read_text() == (several / name).read_text(), name
    found, expected = (read_json(path / "all_results.json") for path in (several, one))
    assert without_times(found) == without_times(expected)


def test_a_run_of_two_processes_resumes_to_the_same_weights(config_file, odd_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = TRAINING | {"per_device_train_batch_size": 3, "num_beams": 1}
    run_ranks(2, flags(config_file, odd_folder, whole, **options))
    arguments = flags(config_file, odd_folder, killed, **options)
    ranks = start_ranks(2, arguments)
    signal_when(lambda: any(killed.glob("checkpoint-*/trainer_state.json")), signal.SIGKILL, *ranks)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    assert not (killed / "all_results.json").exists(), "the run ended before it could be killed"
    errors = run_ranks(2, [*arguments, "--resume_from_checkpoint", "true"])
    assert "Resuming from" in errors[0]
    assert outcome(killed) == outcome(whole)


# --- Failures -------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(config_file, odd_folder, tmp_path) -> list:
    """The words of a run in which the process whose rank is `FAILS` fails in the second step."""
    script = tmp_path / "fails.py"
    script.write_text("""
import os, run_captioning
from captioning.command_line import exit_on_user_error
from captioning.errors import UserError
from captioning.training.trainer import CaptioningTrainer
step = CaptioningTrainer.training_step
def fail(self, *arguments):
    if self.state.global_step == 1 and os.environ["RANK"] == os.environ["FAILS"]:
        raise UserError("this one fails")
    return step(self, *arguments)
CaptioningTrainer.training_step = fail
exit_on_user_error(run_captioning.main)
""")
    return [str(script), *flags(config_file, odd_folder, tmp_path / "run", **TRAINING)]


@pytest.mark.parametrize("fails", [0, 1])
def test_no_process_hangs_when_another_fails(failing, fails):
    (script, *arguments), began = failing, time.monotonic()
    errors = run_ranks(2, arguments, code=2, script=script, FAILS=str(fails))
    assert time.monotonic() - began < 120
    assert ("error: this one fails", "error (process 1): this one fails")[fails] in errors[fails]
    assert "another process of the run has ended: its error is above" in errors[1 - fails]


@pytest.mark.slow
def test_torchrun_ends_when_one_of_its_processes_fails(failing):
    script, *arguments = failing
    result = launch("torchrun", 2, arguments, script, FAILS="1")
    assert result.returncode == 1
    assert "error (process 1): this one fails" in result.stderr


def test_the_first_process_alone_reports_a_mistake(config_file, tmp_path):
    errors = run_ranks(2, flags(config_file, tmp_path / "nothing", tmp_path / "run"), code=2)
    (line,) = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    assert "does not exist" in line
