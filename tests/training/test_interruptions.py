"""Runs that are killed, stopped or out of space leave whole files, and resume as if nothing had happened."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from multiprocessing import popen_fork
from pathlib import Path

import multiprocess
import pytest
import torch
from datasets import Dataset
from helpers import flags, make_rows, outcome, run, signal_when, start
from processes import server
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Seq2SeqTrainer

from captioning import files
from captioning.command_line import STOP_SIGNALS, exit_on_user_error, on_stop_signals
from captioning.errors import Stopped, UserError, as_user_error
from captioning.training import safeguards
from captioning.training.checkpoints import last_complete_checkpoint
from captioning.training.trainer import CaptioningTrainer
from run_captioning import main


def assert_whole(folder: Path) -> None:
    """Whatever file is there under its own name is whole."""
    for path in (*folder.glob("*.json"), *folder.glob("predictions/*.jsonl"), *folder.glob("rejected.jsonl")):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.keys()
    page = folder / "report.html"
    assert not page.is_file() or page.read_text().rstrip().endswith("</html>")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_whole_files_and_resumes(config_file, parquet_folder, tmp_path):
    """One moment, in the middle of training, is also in `test_end_to_end.py`."""
    options = {"num_train_epochs": 3, "resume_from_checkpoint": True, "num_beams": 2, "neighbor_samples": 8}
    arguments = partial(flags, config_file, parquet_folder, save_total_limit=1, **options)
    run(arguments(tmp_path / "first"))  # fills the caches of the data
    began = time.monotonic()
    run(arguments(tmp_path / "whole"))
    seconds = time.monotonic() - began
    expected = outcome(tmp_path / "whole")
    draw, moments, killed, stages = random.Random(0), 20, 0, set()
    for moment in range(moments):
        folder = tmp_path / f"killed-{moment}"
        process = start(arguments(folder))
        time.sleep(seconds * (moment + draw.random()) / moments)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if folder.is_dir():
            assert_whole(folder)
            stages.add((len(list(folder.glob("checkpoint-*"))), (folder / "model.safetensors").is_file()))
        run(arguments(folder))
        assert outcome(folder) == expected, f"killed at moment {moment} of {moments}"
        assert not list(folder.rglob("*.tmp"))
    assert killed > moments / 2, "most runs ended before they could be killed"
    assert len(stages) > 2, "all runs were killed in the same stage"


def error_line(errors: str) -> str:
    """Return the one line that tells of an error, which stands on a line of its own, without a traceback."""
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error")]
    assert len(lines) == 1, errors
    return lines[0]


def terminate_when(condition, arguments: list[str]) -> str:
    """Start a run, send it SIGTERM once `condition()` holds, and return the error that it ends with."""
    process = start(arguments)
    signal_when(condition, signal.SIGTERM, process)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    return error_line(errors)


def test_sigterm_saves_a_checkpoint_and_says_how_to_go_on(config_file, parquet_folder, tmp_path):
    options = {"num_train_epochs": 3, "logging_steps": 1, "per_device_train_batch_size": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(flags(config_file, parquet_folder, whole, **options))
    arguments = flags(config_file, parquet_folder, stopped, **options)
    last = terminate_when(lambda: any(stopped.glob("checkpoint-*/trainer_state.json")), arguments)
    step = re.match(r"error: stopped by SIGTERM after step (\d+) of .*--resume_from_checkpoint true", last)[1]
    assert last_complete_checkpoint(str(stopped)) == str(stopped / f"checkpoint-{step}")
    assert not (stopped / "model.safetensors").exists()
    run([*arguments, "--resume_from_checkpoint", "true"])
    assert all(outcome(stopped)[part] == outcome(whole)[part] for part in ("weights", "predictions"))


@pytest.fixture
def heard(monkeypatch):
    """Have no signal ignored, as a shell ignores them for what it starts in the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def do_at(monkeypatch):
    """Return a function that has another called before a method of the Trainer, and given its result."""

    def do(method: str, before=lambda trainer: None, after=lambda trainer, result: result) -> None:
        original = getattr(CaptioningTrainer, method)

        def replacement(self, *args, **kwargs):
            before(self)
            return after(self, original(self, *args, **kwargs))

        monkeypatch.setattr(CaptioningTrainer, method, replacement)

    return do


@pytest.fixture
def signal_at(do_at, heard):
    """Return a function that has a signal sent when a method of the Trainer is called in a step."""

    def send_at(method: str, step: int | None = None, number: int = signal.SIGTERM) -> None:
        do_at(method, lambda trainer: step in (None, trainer.state.global_step) and os.kill(os.getpid(), number))

    return send_at


@pytest.mark.parametrize(
    ("number", "step", "evaluated"), [("TERM", 2, []), ("INT", 2, []), ("HUP", 2, []), ("USR1", 5, [6])]
)
def test_a_signal_stops_before_the_next_step_and_after_the_evaluation_of_a_finished_epoch(
    make_trainer, signal_at, capfd, number, step, evaluated
):
    """The run that goes on from the end of an epoch begins the next one, and would never make up for it."""
    number = signal.Signals[f"SIG{number}"]
    trainer = make_trainer(num_train_epochs=2, per_device_train_batch_size=4, logging_steps=1, save_total_limit=1)
    signal_at("training_step", step, number)
    with pytest.raises(Stopped, match=rf"{number.name} after step {step + 1} of 12.*checkpoint-{step + 1}") as stopped:
        trainer.train()
    assert (stopped.value.number, signal.getsignal(number)) == (number, signal.SIG_DFL)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == evaluated
    assert trainer.state.best_global_step == (evaluated[0] if evaluated else None)
    assert last_complete_checkpoint(trainer.args.output_dir).endswith(f"checkpoint-{step + 1}")
    assert ("Ctrl-C again ends it at once" in capfd.readouterr().err) == (number == signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_while_workers_start_saves_a_checkpoint(
    make_trainer, heard, monkeypatch, capfd, number
):
    """A terminal signals the workers too, and so does Slurm: the step that goes on needs their rows."""
    launch = popen_fork.Popen._launch

    def launch_and_signal(self, *args):
        launch(self, *args)
        group = [self.pid] if trainer.stop_on_signal.received else [self.pid, os.getpid()]
        subprocess.run(["kill", f"-{number}", *map(str, group)], check=True)  # not by the parent, whose SIGTERM counts

    trainer = make_trainer(num_train_epochs=1, dataloader_num_workers=2, per_device_train_batch_size=4)
    monkeypatch.setattr(popen_fork.Popen, "_launch", launch_and_signal)
    with pytest.raises(Stopped, match="after step 1 of 6"):
        trainer.train()
    assert last_complete_checkpoint(trainer.args.output_dir).endswith("checkpoint-1")
    assert "Traceback" not in capfd.readouterr().err


def test_processes_that_check_rows_end_with_the_command_and_without_a_word(heard, capfd):
    def interrupt():
        processes.extend(multiprocess.active_children())
        for process in (*(process.pid for process in processes), os.getpid()):
            os.kill(process, signal.SIGINT)

    processes: list = []
    threading.Timer(1, interrupt).start()
    with pytest.raises(SystemExit):
        exit_on_user_error(lambda: make_rows(4).map(lambda row: time.sleep(60), num_proc=2))
    assert len(processes) > 1
    assert not any(process.is_alive() for process in processes)
    assert error_line(capfd.readouterr().err).startswith("error: stopped by SIGINT; ")


def start_main(code: str):
    """Start a process whose `main` is this code."""
    head = """
import multiprocessing, os, signal, threading, time
from captioning.command_line import exit_on_user_error, on_stop_signals
def main():
"""
    return server().start(["-c", f"{head}{textwrap.indent(code, '    ')}\nexit_on_user_error(main)"])


def test_a_second_ctrl_c_ends_the_process_at_once():
    process = start_main("""
with on_stop_signals(lambda number: print("first", flush=True)):
    print("ready", flush=True)
    time.sleep(60)
""")
    for word in (b"ready", b"first"):
        signal_when(lambda word=word: word in process.output(), signal.SIGINT, process)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output.split()) == (128 + signal.SIGINT, ["ready", "first"])
    assert error_line(errors).startswith("error: ended by a second SIGINT; complete checkpoints are kept")


def test_an_output_folder_that_is_removed_is_one_line_beside_tensorboard(config_file, parquet_folder, tmp_path):
    folder = tmp_path / "run"
    process = start(flags(config_file, parquet_folder, folder, num_train_epochs=50, logging_steps=1))
    signal_when(lambda: any(folder.glob("checkpoint-*/trainer_state.json")), 0, process)
    folder.rename(tmp_path / "removed")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert " was removed " in error_line(errors)


def test_a_signal_while_a_process_is_forked_is_one_line():
    """Python prints and drops an exception that is raised there."""
    process = start_main("""
mask = signal.pthread_sigmask
def send_and_unblock(how, numbers):
    if how == signal.SIG_UNBLOCK and numbers:
        os.kill(os.getpid(), signal.SIGINT)
    mask(how, numbers)
signal.pthread_sigmask = send_and_unblock
multiprocessing.get_context("fork").Process(target=os.getpid).start()
time.sleep(60)
""")
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert error_line(errors).startswith("error: stopped by SIGINT; ")


def test_an_upload_goes_on_after_a_signal_and_ends_by_another():
    process = start_main("""
threading.Thread(target=time.sleep, args=(60,)).start()
print("ready", flush=True)
time.sleep(60)
""")
    signal_when(lambda: b"ready" in process.output(), signal.SIGINT, process)
    signal_when(lambda: b"error: " in process.output(error=True), signal.SIGINT, process)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert error_line(errors).endswith("an upload still goes on, a signal ends it")


def test_what_nohup_ignores_stays_ignored(heard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with on_stop_signals(lambda number: None):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_sigterm_in_the_last_evaluation_ends_the_run_when_its_model_is_saved(
    config_file, parquet_folder, tmp_path, signal_at
):
    signal_at("evaluation_loop")
    arguments = {"num_train_epochs": 1, "save_strategy": "no", "load_best_model_at_end": False}
    with pytest.raises(Stopped, match="after step 6 of 6"):
        main(flags(config_file, parquet_folder, tmp_path / "run", **arguments))
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_sigterm_while_a_split_is_scored_is_one_line_and_the_run_goes_on(config_file, parquet_folder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(flags(config_file, parquet_folder, whole))
    arguments = flags(config_file, parquet_folder, stopped)
    last = terminate_when((stopped / "train_results.json").exists, arguments)
    assert last.startswith("error: stopped by SIGTERM; ")
    assert not (stopped / "predict_results.json").exists()
    assert_whole(stopped)
    run([*arguments, "--resume_from_checkpoint", "true"])
    assert outcome(stopped) == outcome(whole)


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(files.os, "replace", None)
    with pytest.raises(TypeError):
        files.write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_any_command_and_its_handler_is_restored(heard, capsys, number):
    def swallowing():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Exception:
            pytest.fail("an except clause of a library caught it")

    with pytest.raises(SystemExit) as error:
        exit_on_user_error(swallowing)
    assert error.value.code == 128 + number
    assert capsys.readouterr().err.startswith(f"error: stopped by {number.name}; ")
    assert signal.getsignal(number) == signal.SIG_DFL


# --- Full disk and memory -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_resumes(config_file, parquet_folder, tmp_path, small_disk):
    folder = small_disk / "run"
    arguments = flags(config_file, parquet_folder, folder, num_train_epochs=8, save_total_limit=20)
    assert error_line(run(arguments, code=2).stderr).startswith(f"error: no space left to write '{folder}")
    checkpoint = last_complete_checkpoint(str(folder))
    assert checkpoint
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = run([*arguments, "--resume_from_checkpoint", "true"])
    assert f"Resuming from {checkpoint}" in resumed.stderr


def test_a_full_cache_is_named_as_that(small_disk, capsys):
    def main():
        with as_user_error("dataset 'a' cannot be loaded"):
            rows = Dataset.from_dict({"text": ["a" * 10_000] * 300})
            rows.map(lambda row: {"copy": row["text"]}, cache_file_name=str(small_disk / "cache.arrow"))

    with pytest.raises(SystemExit):
        exit_on_user_error(main)
    assert error_line(capsys.readouterr().err).startswith(f"error: no space left in the cache '{small_disk}'; ")


def test_an_output_folder_that_is_removed_gets_the_next_checkpoint_and_one_line(make_trainer, do_at):
    do_at("training_step", lambda trainer: trainer.state.global_step == 1 and shutil.rmtree(trainer.args.output_dir))
    trainer = make_trainer(num_train_epochs=2, per_device_train_batch_size=4)
    with pytest.raises(UserError, match=r"output folder '.*' was removed during the training; a checkpoint is saved"):
        trainer.train()
    assert last_complete_checkpoint(trainer.args.output_dir).endswith("checkpoint-6")


def state(**fields):
    """Return a function that sets fields of a checkpoint's `trainer_state.json`."""

    def edit(checkpoint: Path) -> None:
        path = checkpoint / "trainer_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def cut_weights(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: value[:1].clone() for name, value in weights.items()}, checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: (folder / "trainer_state.json").write_text("{"), "trainer_state.json is missing or damaged"),
        (state(global_step="abc"), "trainer_state.json is missing or damaged"),
        (state(log_history=[1]), "trainer_state.json is missing or damaged"),
        (state(unknown=1), "trainer_state.json is missing or damaged"),
        (state(epoch="x"), "trainer_state.json is missing or damaged"),
        (state(max_steps=None), "trainer_state.json is missing or damaged"),
        (state(train_batch_size="x"), "trainer_state.json is missing or damaged"),
        (state(stateful_callbacks=[]), "trainer_state.json is missing or damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is missing or damaged"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (
            lambda folder: save_file({"weight": torch.ones(9)}, folder / "model.safetensors"),
            "the weights in '.*' are not those of this model: .* missing or unknown, such as ",
        ),
        (cut_weights, "the weights in '.*' are not those of this model: RuntimeError"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(short_run, tmp_path, edit, said):
    arguments, checkpoint = short_run
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    edit(tmp_path / "checkpoint-2")
    options = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]
    with pytest.raises(UserError, match=said):
        main([*arguments, *options])


@pytest.mark.parametrize("damaged", ["{", "[1]", "5"])
def test_metrics_are_written_whatever_all_results_holds(make_trainer, damaged):
    trainer = make_trainer()
    files = [Path(trainer.args.output_dir) / f"{name}_results.json" for name in ("all", "eval")]
    files[0].parent.mkdir(exist_ok=True)
    files[0].write_text(damaged)
    trainer.save_metrics("eval", {"eval_loss": 1.5})
    assert [json.loads(file.read_text()) for file in files] == [{"eval_loss": 1.5}] * 2


@pytest.fixture(scope="module")
def short_run(config_file, parquet_folder, tmp_path_factory):
    """The flags of a run, and its checkpoint."""
    folder = tmp_path_factory.mktemp("short") / "run"
    options = {"max_steps": 2, "do_eval": False, "do_predict": False, "num_train_epochs": None, "report_to": "none"}
    arguments = flags(config_file, parquet_folder, folder, **options)
    main(arguments)
    return arguments, folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "a/b.bin"), "no space left to write 'a/b.bin'"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left to write "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "per_device_train_batch_size 4"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--gradient_checkpointing true"),
    ],
)
def test_full_memory_and_disk_are_one_line(tmp_path, error, expected):
    with pytest.raises(UserError, match=expected), safeguards.full_is_user_error(str(tmp_path), 4, "train"):
        raise error


@pytest.mark.parametrize("probe", [None, errno.EIO, errno.ENOSPC])
def test_what_torch_cannot_write_is_a_full_disk_only_if_nothing_else_fits(tmp_path, monkeypatch, probe):
    def refuse(**kwargs):
        raise OSError(probe, "refused")

    if probe:
        monkeypatch.setattr(safeguards.tempfile, "TemporaryFile", refuse)
    error = RuntimeError("PytorchStreamWriter failed writing file")
    full = safeguards.full_is_user_error(str(tmp_path), 4, "train")
    with pytest.raises((RuntimeError, UserError)) as raised, full:
        raise error
    assert (raised.value is error) == (probe != errno.ENOSPC)
    assert not list(tmp_path.iterdir())


def test_a_gpu_out_of_memory_names_batch_size_and_flags(make_trainer, do_at):
    """No GPU here: torch's own error is raised in its place."""

    def out_of_memory(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    trainer = make_trainer(per_device_train_batch_size=3, per_device_eval_batch_size=5)
    for method in ("compute_loss", "prediction_step"):
        do_at(method, out_of_memory)
    with pytest.raises(UserError, match=r"per_device_train_batch_size 3; .*--auto_find_batch_size"):
        trainer.train()
    with pytest.raises(UserError, match=r"per_device_eval_batch_size 5; .*--num_beams"):
        trainer.evaluate()


# --- NaN and infinity ------------------------------------------------------------------------------------------


STEPS = {"per_device_train_batch_size": 4, "save_strategy": "steps", "eval_strategy": "no"}
STEPS |= {"load_best_model_at_end": False}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_of_nan_or_infinity_ends_the_run_and_names_its_images(make_trainer, do_at, value):
    trainer = make_trainer(max_steps=6, save_steps=2, train_sampling_strategy="sequential", **STEPS)
    trainer.data_collator.with_ids = True
    do_at("compute_loss", after=lambda trainer, loss: loss * value if trainer.state.global_step == 4 else loss)
    image_ids = ", ".join(trainer.train_dataset["image_id"][16:20])
    with pytest.raises(UserError, match=rf"the loss of step 5 is (nan|inf), at the images {image_ids};.*checkpoint-4"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_a_long_image_id_is_cut_and_not_left_out(make_trainer, monkeypatch):
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(UserError, match=rf"at the images {'x' * 199}…;"):
        make_trainer().training_step(None, {"image_id": ["x" * 999]})


def test_a_checkpoint_never_holds_weights_that_are_nan(make_trainer, do_at):
    def spoil_gradients(trainer, loss):
        if trainer.state.global_step == 2:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    trainer = make_trainer(num_train_epochs=1, save_steps=1, **STEPS)
    do_at("compute_loss", after=spoil_gradients)
    with pytest.raises(UserError, match=r"step 3 made weights NaN or infinite.*checkpoint-2"):
        trainer.train()
    assert last_complete_checkpoint(trainer.args.output_dir).endswith("checkpoint-2")


def test_a_learning_rate_without_bounds_is_one_line(config_file, parquet_folder, tmp_path):
    with pytest.raises(UserError, match=r"the loss of step .* is (nan|inf).*there is no checkpoint yet"):
        main(flags(config_file, parquet_folder, tmp_path / "run", learning_rate=1e30, max_grad_norm=0))
