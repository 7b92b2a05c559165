"""A resumed run, and a rerun of a recipe, notice that data, tokenizer or model have changed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image
from helpers import flags, make_png, make_rows, read_json, save_captioner
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from captioning.data.sources import load_source
from captioning.errors import UserError
from captioning.training.arguments import ModelArguments
from captioning.training.fingerprint import FINGERPRINT_FILE, changes, fingerprint
from captioning.training.recipe import code_version
from run_captioning import main


SHORT = {"num_train_epochs": 1, "do_eval": False, "do_predict": False, "report_to": "none"}


def save_rows(folder: Path, **columns) -> Path:
    """Write the only split, `train`, of a dataset; `columns` replace its own."""
    shutil.rmtree(folder, ignore_errors=True)
    DatasetDict(train=make_rows(12, **columns)).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory) -> Path:
    """A folder with `data` and `run`, a finished run on it with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    main(flags(config_file, save_rows(folder / "data"), folder / "run", **SHORT))
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def resume(config, folder: Path, **options) -> None:
    main(flags(config, folder / "data", folder / "run", **SHORT | {"resume_from_checkpoint": True} | options))


ROWS = make_rows(12)[:]
PIXEL = [{"bytes": make_png(i + (i == 7) * 99), "path": None} for i in range(12)]
OTHER_CAPTION = {"caption": [*ROWS["caption"][:-1], "another caption"]}


@pytest.mark.parametrize(
    ("part", "columns"),
    [
        ("captions", OTHER_CAPTION),
        ("ids", {"image_id": [f"new_{i}" for i in range(12)]}),
        ("images", {"image": PIXEL}),
    ],
)
def test_a_resume_on_changed_rows_is_an_error_that_says_which(config_file, copied, part, columns):
    assert len(PIXEL[7]["bytes"]) == len(make_png(7)), "the size alone would show it"
    save_rows(copied / "data", **columns)
    said = rf"split 'train' has changed \(12 rows before, 12 now; other {part}\); .*--resume_despite_changes"
    with pytest.raises(UserError, match=rf"cannot resume from '.*checkpoint-3': {said}"):
        resume(config_file, copied)


def test_a_run_that_is_resumed_despite_changes_keeps_its_tokenizer(config_file, copied):
    """Embeddings of the old vocabulary would otherwise meet tokens of a new one."""
    before = AutoTokenizer.from_pretrained(copied / "run" / "checkpoint-3").get_vocab()
    save_rows(copied / "data", caption=[f"zebra quokka number {i}" for i in range(12)])
    resume(config_file, copied, resume_despite_changes=True, num_train_epochs=2)
    assert AutoTokenizer.from_pretrained(copied / "run").get_vocab() == before
    assert "quokka" not in before


def test_rows_before_and_after_are_counted(copied):
    before = {"train": read_json(copied / "run" / "recipe.json")["fingerprint"]["train"]}
    now = {"train": before["train"] | {"rows": 11, "ids": "x"}}
    assert changes(before, now) == ["split 'train' has changed (12 rows before, 11 now; other ids)"]
    assert changes({"train": 5, "unknown": 1}, now) == []  # a recipe may come from anyone


def edit_tokenizer(start: Path) -> None:
    content = read_json(start / "tokenizer.json")
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (start / "tokenizer.json").write_text(json.dumps(content))


def edit_weights(start: Path) -> None:
    weights = load_file(start / "model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, start / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "said"), [(edit_tokenizer, "the tokenizer is another"), (edit_weights, "the model is another")]
)
def test_a_resume_from_a_changed_start_is_an_error(tiny_captioner, copied, edit, said):
    start = save_captioner(tiny_captioner, copied / "start")
    options = {"model_name_or_path": start, "vocab_size": None, "output_dir": copied / "second"}
    resume(None, copied, **options | {"resume_from_checkpoint": None})
    edit(start)
    with pytest.raises(UserError, match=rf"cannot resume from '.*checkpoint-3': {said}; "):
        resume(None, copied, **options)
    resume(None, copied, **options, resume_despite_changes=True)


def test_a_run_of_an_earlier_version_resumes(config_file, copied):
    recipe = read_json(copied / "run" / "recipe.json")
    new = {"fingerprint", "model_config", "code", "use_peft", "freeze_vision_model"}
    assert new <= recipe.keys()
    known = {key: recipe[key] for key in recipe.keys() - new} | {"changed_on_resume": None}
    (copied / "run" / "recipe.json").write_text(json.dumps(known))
    (copied / "run" / "checkpoint-3" / FINGERPRINT_FILE).unlink()
    with pytest.raises(UserError, match="freeze_vision_model was False, is True; set it back"):
        resume(config_file, copied, freeze_vision_model=True)
    resume(config_file, copied)
    assert new <= read_json(copied / "run" / "recipe.json").keys()


def test_a_rerun_says_what_differs_and_goes_on(copied, caplog):
    rerun = [str(copied / "run" / "recipe.json"), "--output_dir", str(copied / "again")]
    main([*rerun, "--dataset_name", str(copied / "data"), "--max_steps", "1"])
    assert "Data, tokenizer and model are those that the recipe ran with" in caplog.text  # a copy is the same
    save_rows(copied / "data", **OTHER_CAPTION)
    main([*rerun[:-1], str(copied / "third"), "--dataset_name", str(copied / "data"), "--max_steps", "1"])
    said = "The recipe ran with something else: split 'train' has changed (12 rows before, 12 now; other captions)"
    assert said in caplog.text


def test_a_rerun_builds_the_model_of_the_recipe_though_the_file_has_changed(config_file, trained, tmp_path, caplog):
    recipe = read_json(trained / "run" / "recipe.json")
    assert recipe["model_config"] == read_json(config_file)
    changed = json.loads(config_file.read_text())
    changed["text_config"]["intermediate_size"] = 128
    (tmp_path / "tiny.json").write_text(json.dumps(changed))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"config_name": str(tmp_path / "tiny.json")}))

    def rerun(name: str, *options: str) -> tuple[int, bool]:
        main([str(tmp_path / "recipe.json"), "--output_dir", str(tmp_path / name), "--max_steps", "1", *options])
        size = read_json(tmp_path / name / "config.json")["text_config"]["intermediate_size"]
        return size, "differs from the one in the recipe, which is used" in caplog.text

    assert rerun("own") == (64, True)
    caplog.clear()
    assert rerun("flag", "--config_name", str(tmp_path / "tiny.json")) == (128, False)
    (tmp_path / "tiny.json").unlink()
    assert rerun("gone") == (64, False)


def test_the_fingerprint_depends_on_the_rows_alone(tiny_captioner, trained, tmp_path):
    """Not on their folder, nor on whether the images are files or in the table, nor on the rows of a read."""
    args = ModelArguments(config_name="tiny.json")
    rows = make_rows(20).cast_column("image", Image(decode=False)).select(range(12))
    files = []
    for row in rows:
        path = tmp_path / f"{row['image_id']}.png"
        path.write_bytes(row["image"]["bytes"])
        files.append({"bytes": None, "path": str(path)})
    columns = {"image": files, "image_id": ROWS["image_id"], "caption": ROWS["caption"]}
    of_files = Dataset.from_dict(columns, features=rows.select_columns(list(columns)).features)
    for each in (rows, of_files, load_source(str(trained / "data"))["train"]):
        found = fingerprint(DatasetDict(train=each), tiny_captioner, args)["train"]
        assert found == read_json(trained / "run" / "recipe.json")["fingerprint"]["train"]


def test_a_recipe_names_the_commit_and_the_address_of_the_code(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr("captioning.training.recipe.PROJECT", tmp_path)
    assert code_version() == {}
    (tmp_path / "CITATION.cff").write_text('title: A\nrepository-code: "https://host.example/a/b"\n')
    address = {"address": "https://host.example/a/b"}
    assert code_version() == address
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    git("tag", "v1")
    commit = address | {"commit": git("rev-parse", "HEAD").strip()}
    assert code_version() == commit | {"modified": False}
    (tmp_path / "CITATION.cff").write_text('repository-code: "https://host.example/a/b"\n')
    assert code_version() == commit | {"modified": True}
    monkeypatch.setenv("PATH", "")
    assert code_version() == address
