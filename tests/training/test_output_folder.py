"""A folder is written by one run at a time; runs that name no folder get one each."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import flags, run_ranks, signal_when
from processes import server

from captioning.errors import UserError
from captioning.training.output_folder import LOCK_FILE, FolderInUse, hold_folder, own_output_dir
from run_captioning import main


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `run`, with a forked worker, until it is killed."""
    (tmp_path / "run").mkdir()
    code = f"""
import os, time
from captioning.training.output_folder import hold_folder
with hold_folder({str(tmp_path / "run")!r}):
    worker = os.fork()
    print("held", flush=True)
    time.sleep(60)
"""
    process = server().start(["-c", code])
    signal_when(lambda: process.output().count(b"held") == 2, signal.SIGCONT, process)
    yield process
    process.send_signal(signal.SIGKILL)


def test_a_folder_that_a_run_writes_is_neither_written_nor_pushed_by_another(holder, tmp_path):
    new = flags(None, "phantoms", tmp_path / "run", model_name_or_path="some/model")
    said = rf"output folder '.*' is being written by process {holder.pid} on \S+; wait until it has ended"
    for arguments in (new, [*new, "--resume_from_checkpoint", "true"], ["--push_only", str(tmp_path / "run")]):
        with pytest.raises(FolderInUse, match=said):
            main(arguments)


def test_a_killed_run_leaves_no_lock_though_its_worker_lives_on(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    with hold_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).read_text().startswith("process ")
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_without_a_lock_is_written_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("captioning.training.output_folder.fcntl.flock", refuse)
    with hold_folder(tmp_path):
        assert "cannot be locked ([Errno 95] Operation not supported)" in caplog.text


def arguments_for(folder: Path, resume: str | None = None, default: bool = True) -> SimpleNamespace:
    fields = {"output_dir": str(folder), "resume_from_checkpoint": resume, "has_default_output_dir": default}
    return SimpleNamespace(**fields, do_train=True, process_index=0, world_size=1)


def test_runs_without_a_folder_of_their_own_get_one_each(tmp_path, caplog):
    caplog.set_level("INFO", "captioning")
    name = tmp_path / "model-data"
    with own_output_dir(arguments_for(name)), own_output_dir(second := arguments_for(name)):
        assert second.output_dir == f"{name}-2"  # the first is in use, and empty
    with own_output_dir(again := arguments_for(name)):
        assert again.output_dir == str(name)  # what ended before it wrote anything
    for folder in (name, tmp_path / "model-data-3"):
        folder.mkdir(exist_ok=True)
        (folder / "recipe.json").write_text("{}")
    with own_output_dir(fourth := arguments_for(name)):
        assert fourth.output_dir == f"{name}-2"
        assert f"Writing to '{name}-2': '{name}' is that of another run" in caplog.text
        with own_output_dir(fifth := arguments_for(name)):
            assert fifth.output_dir == f"{name}-4"
    with own_output_dir(named := arguments_for(name, default=False)):
        assert named.output_dir == str(name)


def test_a_run_without_a_folder_of_its_own_resumes_in_the_last_that_has_trained(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "captioning")
    name = tmp_path / "model-data"

    def begin(number: str, **recipe) -> None:
        Path(f"{name}{number}").mkdir(exist_ok=True)
        Path(f"{name}{number}", "recipe.json" if recipe else "rejected.jsonl").write_text(json.dumps(recipe))

    for number in ("", "-2", "-10", "-set"):
        begin(number, do_train=True)
    begin("-11")
    with_checkpoint = {str(name): "a", f"{name}-2": "b", f"{name}-10": "c", f"{name}-set": "d"}
    monkeypatch.setattr("captioning.training.output_folder.last_complete_checkpoint", with_checkpoint.get)
    monkeypatch.setattr("captioning.training.output_folder.checkpoint_fault", lambda folder: None)
    for resume, expected in (
        ("true", f"{name}-10"),
        (f"{name}-2/checkpoint-5", f"{name}-2"),
        (f"{name}/../model-data-2/checkpoint-5", f"{name}-2"),
        ("elsewhere/checkpoint-5", f"{name}-3"),  # all others are of other runs
    ):
        with own_output_dir(args := arguments_for(name, resume)) as checkpoint:
            assert (args.output_dir, checkpoint) == (expected, "c" if resume == "true" else resume)
    assert f"Of '{name}' to '{name}-11', '{name}-10' is continued; set --output_dir for another" in caplog.text
    begin("-11", do_train=True)  # a run that was killed before its first checkpoint
    begin("-12", do_train=False)
    with own_output_dir(args := arguments_for(name, "true")) as checkpoint:
        assert (args.output_dir, checkpoint) == (f"{name}-11", None)


@pytest.mark.parametrize("recipe", [None, "{", "[]", "[1]"])
def test_a_folder_whose_recipe_is_missing_or_damaged_is_resumed_if_it_holds_a_checkpoint(
    tmp_path, monkeypatch, recipe
):
    for number in ("", "-2", "-3"):
        (tmp_path / f"run{number}").mkdir()
        if recipe:
            (tmp_path / f"run{number}" / "recipe.json").write_text(recipe)
    checkpoints = {str(tmp_path / "run"): "a", str(tmp_path / "run-2"): "b"}
    monkeypatch.setattr("captioning.training.output_folder.last_complete_checkpoint", checkpoints.get)
    with own_output_dir(args := arguments_for(tmp_path / "run", "true")) as checkpoint:
        assert (args.output_dir, checkpoint) == (str(tmp_path / "run-2"), "b")


def test_all_processes_of_a_run_write_to_the_folder_that_the_first_chose(config_file, parquet_folder, tmp_path):
    script = Path("run_captioning.py").resolve()
    code = f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    (tmp_path / "script.py").write_text(code)
    name = f"outputs/{config_file.stem}-{parquet_folder.name}"
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "recipe.json").write_text("{}")
    options = {"max_steps": 1, "do_eval": False, "do_predict": False, "output_dir": None}
    arguments = flags(config_file, parquet_folder, None, **options)
    errors = run_ranks(2, arguments, script=str(tmp_path / "script.py"))
    assert f"Writing to '{name}-2'" in errors[0]
    models = list((tmp_path / "outputs").glob("*/model.safetensors"))
    assert models == [tmp_path / f"{name}-2" / "model.safetensors"]


def test_a_folder_that_is_removed_during_a_run_is_one_line(tmp_path):
    expected = r"output folder '.*' was removed while the run wrote to it; run again"
    with pytest.raises(UserError, match=expected), hold_folder(tmp_path):
        (tmp_path / LOCK_FILE).unlink()
        (tmp_path / "predictions" / "test.jsonl").write_text("")
    with pytest.raises(KeyError), hold_folder(tmp_path):
        raise KeyError("a fault of the program")
