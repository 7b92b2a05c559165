"""To the Hub and back, by the unmodified client against the loopback Hub of `hub_server`."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import save_vision_model
from helpers import flags, outcome, predictions, read_json, save_captioner, score_flags, without_times
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from processes import ROOT

import run_captioning
from captioning.errors import UserError
from captioning.hub.privacy import without_local_paths
from captioning.hub.repository import Repository
from captioning.hub.revisions import pin_revision
from captioning.models.surface_form import SurfaceForm
from captioning.reporting.model_card import write_model_card
from captioning.reporting.run_record import RunRecord
from captioning.training.recipe import parse_arguments


PUSH = ["--push_to_hub", "--hub_model_id", "tester/model", "--hub_strategy"]


@pytest.fixture
def run(hub, home, served):
    """Return a function that runs the script as a user of that Hub and asserts its exit status."""
    return lambda arguments, code=0, **environment: served[2].run(
        ["run_captioning.py", *arguments], code, environment=environment
    )


@pytest.fixture(scope="module")
def start(tiny_captioner, tmp_path_factory) -> Path:
    """A folder of a tiny model to start from."""
    return save_captioner(tiny_captioner, tmp_path_factory.mktemp("start") / "start")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def local_run(home, start, parquet_folder):
    """Flags of a run whose model, data and output are all below the home folder."""
    shutil.copytree(start, home / "start")
    shutil.copytree(parquet_folder, home / "data")
    return flags(None, home / "data", home / "out" / "run", model_name_or_path=home / "start")


@pytest.fixture(scope="module")
def trained(start, parquet_folder, tmp_path_factory) -> Path:
    """The output folder of a finished run that was not pushed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_captioning.main(flags(None, parquet_folder, folder, model_name_or_path=start))
    return folder


@pytest.fixture
def finished(trained, home) -> Path:
    return shutil.copytree(trained, home / "out" / "run")


@pytest.fixture
def push(run, finished):
    """Return a function that pushes the finished run into a repository, and asserts its exit status."""
    return lambda name="tester/model", **options: run(["--push_only", finished, "--hub_model_id", name], **options)


# --- Push -----------------------------------------------------------------------------------------------------


def test_a_run_is_pushed_whole_without_secrets_and_a_stranger_repeats_it(hub, home, run, local_run, raw_dataset):
    result = run([*local_run, *PUSH, "checkpoint"])
    assert "Pushed: " in result.stdout
    assert hub.problems == []
    pushed, folder = hub.files("tester/model"), home / "out" / "run"
    commits = hub.commits("tester/model")
    assert commits[-1].message == "End of training"
    assert any(commit.message.startswith("Training, step ") for commit in commits)
    assert {
        "README.md", "recipe.json", "model.safetensors", "config.json", "generation_config.json",
        "processor_config.json", "tokenizer.json", "all_results.json", "predict_results.json", "trainer_state.json",
        "training_curve.png", "scores.json", "predictions/test.jsonl", "predictions/validation.jsonl",
        "sample.png", "sample.json", "surface_form.json", "last-checkpoint/surface_form.json",
        "last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json", "last-checkpoint/model.safetensors",
    } <= pushed.keys()  # fmt: skip
    assert (folder / "report.html").is_file()
    assert "report.html" not in pushed, "it holds images, which may not be the user's to publish"
    for name in ("model.safetensors", "all_results.json", "predictions/test.jsonl", "README.md", "scores.json"):
        assert pushed[name] == (folder / name).read_bytes()
    assert not list(folder.glob(".push-*"))
    # Secrets and paths: the sentinels are in the environment and in what stays at home, and not in what was sent
    assert home.name.encode() in (folder / "recipe.json").read_bytes()
    assert home.name.encode() in (folder / "training_args.bin").read_bytes()
    assert pushed["model.safetensors"] in hub.received
    stored = [content for commit in commits for content in commit.files.values()]
    for secret in (hub.token, home.name, str(home.parent)):
        assert not any(secret.encode() in sent for sent in hub.received + stored)
    # A stranger pastes the code of the card into a Python that knows nothing of this project
    code = re.search(r"```python\n(.*?)```", pushed["README.md"].decode(), re.DOTALL)[1]
    python = {"cwd": home, "env": hub.environment(home / "stranger"), "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", code], **python)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == json.loads(pushed["sample.json"])["decoded"]
    # ... and takes an image of their own
    raw_dataset["test"][3]["image"].save(home / "image.png")
    code = re.sub(r"Image\.open\(.*\)", 'Image.open("image.png")', code)
    result = subprocess.run([sys.executable, "-c", code], **python)
    assert SurfaceForm.load(str(folder)).restore(result.stdout) == predictions(folder)[3]["prediction"]


def test_the_card_has_the_numbers_of_the_run_and_its_worst_caption(push, finished, parquet_folder):
    """The model-index makes the round trip through the Hub's own parser."""
    push()
    results = read_json(finished / "all_results.json")
    metadata = ModelCard.load(finished / "README.md").data
    name, parsed = model_index_to_eval_results(metadata.to_dict()["model-index"])
    assert (name, metadata.base_model, metadata.datasets) == ("model", None, None), "neither is on the Hub"
    assert {result.dataset_type for result in parsed} == {parquet_folder.name}
    assert {(result.metric_name, result.metric_value) for result in parsed} >= {
        (name, round(results[f"predict_{key}"], 4))
        for name, key in (("ROUGE-L", "rougeL"), ("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("Loss", "loss"))
    }
    assert {(result.task_type, result.dataset_split) for result in parsed} == {("image-to-text", "test")}
    card = (finished / "README.md").read_text()
    worst = min(predictions(finished), key=lambda row: row["rougeL"])
    assert any(line.startswith("| worst ") and f"{worst['rougeL']:.2f}" in line for line in card.splitlines())
    for text in ("Not for clinical use", "| test | 7 |", "3 beams, at most 12", "hf://tester/model/recipe.json"):
        assert text in card


def test_a_run_that_cannot_be_pushed_is_complete_on_disk(hub, home, run, local_run):
    hub.fail("any", 401)
    result = run([*local_run, *PUSH, "every_save"], code=2)
    reason = "401, the token is not accepted"
    assert f"Nothing can be pushed now: {reason}" in result.stderr
    folder = home / "out" / "run"
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: the model is complete in '{folder}' but not on the Hub: {reason}")
    assert {"model.safetensors", "README.md", "all_results.json", "recipe.json"} <= files_of(folder).keys()
    hub.heal()
    run(line.split("push it later with: python run_captioning.py ")[1].split())
    assert hub.files("tester/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert 'name = "tester/model"' in hub.files("tester/model")["README.md"].decode()


@pytest.mark.parametrize(
    ("step", "status", "reason"),
    [
        ("create", 409, "409, the name 'tester/model' is taken; set another, such as --hub_model_id tester/model-2"),
        ("validate", 400, "400, the Hub rejects the card: Invalid metadata in README.md. - No license"),
        ("commit", 429, "429, too many requests"),
        ("commit", 500, "500, a fault of the Hub"),
        ("commit", "drop", "the Hub cannot be reached, or the connection broke"),
    ],
)
def test_a_fault_is_one_line_with_its_reason_and_nothing_is_lost(hub, push, finished, step, status, reason):
    before = files_of(finished)
    later = {"Retry-After": "3600"} if status == 429 else None  # is not waited for
    hub.fail(step, status, message="No license" if status == 400 else "", headers=later)
    result = push(code=2)
    assert "Traceback" not in result.stderr
    assert f"is complete in '{finished}' but not on the Hub: {reason}" in result.stderr.splitlines()[-1]
    after = files_of(finished)
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} <= {"README.md"}
    hub.heal()
    assert "Pushed: " in push().stdout


def test_transient_faults_are_retried(hub, push):
    """The client retries uploads; the three calls that it does not are retried here."""
    for step, status in (("create", 500), ("validate", 503), ("upload", "drop"), ("commit", 429)):
        hub.fail(step, status, times=1)
    assert "Pushed: " in push().stdout
    assert "predictions/test.jsonl" in hub.files("tester/model")
    assert hub.problems == []


def test_a_checkpoint_that_cannot_be_pushed_is_a_warning(hub, run, local_run):
    hub.fail("commit", 403, times=1)
    result = run([*local_run, "--push_to_hub", "--hub_model_id", "tester/model"])
    assert "Training, step 6 is not on the Hub: 403, the token may not do this" in result.stderr
    commit = hub.commits("tester/model")[-1]
    assert commit.message == "End of training"
    assert f"Verified: tester/model at {commit.oid} loads, and is what was pushed" in result.stderr


def test_a_model_that_comes_back_from_the_hub_otherwise_is_a_warning(hub, run, local_run, home, start):
    """A warning: the run has not failed. Weights are compared, and the caption of the sample."""
    hub.replaced["model.safetensors"] = (start / "model.safetensors").read_bytes()
    result = run([*local_run, *PUSH, "end"])
    what = f"tester/model at {hub.commits('tester/model')[-1].oid}"
    caption = read_json(home / "out" / "run" / "sample.json")["caption"]
    assert f"Not verified: {what} is not what was pushed: model.safetensors differs; its caption of" in result.stderr
    assert "its caption of sample.png is '" in result.stderr and f"', not '{caption}'" in result.stderr


@pytest.mark.parametrize(
    ("step", "replaced", "reason"),
    [
        (None, {}, "Verified: tester/model at {} loads, and is what was pushed"),
        (
            None,
            {"tokenizer_config.json": b"{}"},
            "Not verified: tester/model at {} is not what was pushed: tokenizer_",
        ),
        (None, {"config.json": b"{}"}, "Not verified: tester/model at {} cannot be loaded back: "),
        ("resolve", {}, "Not verified: tester/model at {} cannot be loaded back: 403, the token may not do this"),
    ],
)
def test_a_push_of_a_finished_run_is_loaded_back(hub, push, finished, step, replaced, reason):
    hub.replaced |= replaced
    if step:
        hub.fail(step, 403)
    result = push()
    assert "Pushed: " in result.stdout
    assert reason.format(hub.commits("tester/model")[-1].oid) in result.stderr
    assert not list(finished.glob(".push-*"))


def test_a_private_path_stops_a_push_before_a_byte_leaves(hub, push, finished):
    path = finished / "predictions" / "test.jsonl"
    rows = predictions(finished)
    rows[2]["image_id"] = "/mnt/scans/of someone/1.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = push(code=2).stderr.splitlines()[-1]
    assert "'predictions/test.jsonl', line 3, holds a path, '/mnt/scans/of someone/1.png': shorten it in" in line
    assert f"--push_only {finished}" in line
    assert not any(b"scans" in content for content in hub.received)
    assert not hub.requests, "no repository is made for it either"


def test_no_network_and_no_token(push, finished):
    assert "but not on the Hub: 401, there is no token" in push(code=2, HF_TOKEN="").stderr.splitlines()[-1]
    with pytest.raises(UserError, match="but not on the Hub: offline mode: HF_HUB_OFFLINE is set"):
        run_captioning.main(["--push_only", str(finished)])  # `conftest.py` sets it


def test_the_model_of_another_run_is_not_replaced(hub, push, finished):
    hub.add_repository("tester/taken", {"config.json": b"{}", "README.md": b"mine"})
    hub.add_repository("tester/blank", {".gitattributes": b"", "README.md": b"made by hand"})
    line = push("tester/taken", code=2).stderr
    assert "'tester/taken' holds another model; set another, such as --hub_model_id tester/taken-2;" in line
    assert line.endswith(f"run_captioning.py --push_only {finished} --hub_model_id tester/taken-2\n")
    line = push("other/model", code=2).stderr
    assert "403, the token may not do this" in line
    assert "'other' may be another's; set another, such as --hub_model_id model; push it later with" in line
    assert hub.files("tester/taken") == {"config.json": b"{}", "README.md": b"mine"}
    for name in ("tester/blank", "tester/blank", "new-name"):  # the second time into what the first has pushed
        push(name)
    assert "model.safetensors" in hub.files("tester/blank")
    assert "model.safetensors" in hub.files("tester/new-name"), "a name without a user is the user's own"
    assert 'name = "tester/new-name"' in hub.files("tester/new-name")["README.md"].decode()
    recipe = read_json(finished / "recipe.json")
    (finished / "recipe.json").write_text(json.dumps(recipe | {"dataset_name": "phantoms"}))
    assert "holds another model" in push("tester/blank", code=2).stderr


def test_the_methods_of_the_trainer_push_as_the_script_does(captioner, splits, finished, monkeypatch):
    """T15, T16: called by hand, they must not upload what the stock ones do, nor replace the card."""
    pushed, card = [], (finished / "README.md").read_bytes()
    monkeypatch.setattr(run_captioning, "push_finished_run", lambda *arguments: pushed.append(arguments))
    arguments = flags(None, "phantoms", finished, model_name_or_path="some/start", hub_model_id="tester/model")
    trainer = run_captioning.make_trainer(captioner, splits, *parse_arguments(arguments)[1:])
    trainer.create_model_card()
    assert (finished / "README.md").read_bytes() == card
    trainer.push_to_hub()
    assert pushed == [(str(finished), "tester/model", None)]


def test_an_edited_card_keeps_all_but_its_name_and_what_a_killed_push_left_is_cleared(hub, push, finished):
    (finished / ".push-abc" / "last-checkpoint").mkdir(parents=True)
    card = finished / "README.md"
    edited = card.read_text().replace(
        "## Data and license", "## Data and license\n\nFrom our hospital, where we run it."
    )
    card.write_text(edited)
    assert "was edited and is pushed as it is" in push().stderr
    for name in ("tester/model", "tester/other"):
        push(name)
        pushed = hub.files(name)["README.md"].decode()
        assert pushed == card.read_text()
        assert "From our hospital, where we run it." in pushed
        assert f'name = "{name}"' in pushed and f"hf://{name}/recipe.json --model_name_or_path {name} --do" in pushed
        assert ModelCard(pushed).data.model_name == name.split("/")[1]
    assert "tester/model" not in pushed and '"run"' not in pushed
    assert not list(finished.glob(".push-*"))


def test_a_finished_adapter_is_pushed_later(hub, home, run, local_run):
    folder, name = home / "out" / "run", "tester/adapter"
    run([*local_run, "--use_peft", "--max_steps", "1"])
    run(["--push_only", folder, "--hub_model_id", name])
    assert {"adapter_model.safetensors", "adapter_config.json", "surface_form.json"} <= hub.files(name).keys()


def test_a_merged_model_is_not_taken_for_the_adapter_of_its_checkpoints(hub, home, run, local_run):
    folder, name = home / "out" / "run", "tester/model"
    run([*local_run, "--use_peft", "--merge_lora", *PUSH, "every_save"])
    pushed = hub.files(name)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & pushed.keys()
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    run(score_flags(name, home / "data", home / "scored"))
    assert predictions(home / "scored") == predictions(folder)


def test_push_only_wants_a_finished_run(hub, home, run):
    for arguments, reason in (
        (["--push_only", home], "holds no finished run, it has no model.safetensors; give an output folder"),
        (["--push_only", home, "--num_beams", "3"], "unknown flag '--num_beams'"),
        (["--push_only"], "expected one argument"),
    ):
        result = run(arguments, code=2)
        assert reason in result.stderr and len(result.stderr.splitlines()) == 1
    assert hub.requests == []


def test_training_resumes_from_the_checkpoint_on_the_hub_and_a_local_run_asks_it_nothing(hub, home, run, local_run):
    run([*local_run, *PUSH, "all_checkpoints"])
    whole = outcome(home / "out" / "run")
    shutil.rmtree(home / "out")
    for path, content in hub.files("tester/model").items():
        if path.startswith("checkpoint-6/"):
            (home / path).parent.mkdir(exist_ok=True)
            (home / path).write_bytes(content)
    hub.requests.clear()
    run([*local_run, "--resume_from_checkpoint", home / "checkpoint-6"])
    assert hub.requests == []
    assert (home / "out" / "run" / "README.md").is_file()
    resumed = outcome(home / "out" / "run")
    assert all(resumed[part] == whole[part] for part in ("weights", "predictions"))


# --- Reproduce ------------------------------------------------------------------------------------------------


def test_a_hub_run_is_pinned_and_repeated_from_its_pushed_recipe(hub, home, run, start, parquet_folder):
    """Model and data come from the Hub by name; the recipe in the repository is enough to run it again."""
    model_commit = hub.add_repository("some/start", files_of(start))
    data_commit = hub.add_repository("some/data", files_of(parquet_folder), kind="dataset")
    run([*flags(None, "some/data", home / "run", model_name_or_path="some/start"), *PUSH, "end"])
    assert [commit.message for commit in hub.commits("tester/model")][1:] == ["End of training"]
    recipe = json.loads(hub.files("tester/model")["recipe.json"])
    assert (recipe["model_revision"], recipe["dataset_revision"]) == (model_commit, data_commit)
    assert "hub_model_id" not in recipe and "push_to_hub" not in recipe
    metadata = ModelCard(hub.files("tester/model")["README.md"].decode()).data
    assert (metadata.base_model, metadata.datasets) == ("some/start", ["some/data"])
    assert metadata.eval_results[0].dataset_revision == data_commit
    hub.add_repository("some/start", files_of(start) | {"README.md": b"moved on"})
    other = {path: content for path, content in files_of(parquet_folder).items() if "test" in path}
    hub.add_repository("some/data", other, kind="dataset")
    result = run(["hf://tester/model/recipe.json", "--output_dir", home / "again"])
    assert "may differ" not in result.stderr
    assert outcome(home / "again") == outcome(home / "run")
    # The second command of the card: the scores alone
    address = ["hf://tester/model", "--model_name_or_path", "tester/model", "--do_train", "false"]
    run([*address, "--output_dir", home / "check"])
    assert (home / "check/predictions/test.jsonl").read_bytes() == (home / "run/predictions/test.jsonl").read_bytes()
    scores = without_times(read_json(home / "check/all_results.json"))
    assert scores.items() <= without_times(read_json(home / "run/all_results.json")).items()
    # History rewritten: the pinned commits are gone
    now = hub.commits("some/start")[-1].oid
    hub.drop_history("some/start")
    shutil.rmtree(home / "huggingface")
    result = run(["hf://tester/model/recipe.json", "--output_dir", home / "third"], code=2)
    assert f"has moved: revision {model_commit} is not there, its main branch is at {now}" in result.stderr
    hub.drop_history("some/data", kind="dataset")
    result = run(["hf://tester/model", "--output_dir", home / "third", "--model_revision", "main"], code=2)
    assert f"dataset 'some/data' has moved: revision {data_commit} is not there" in result.stderr


def test_the_commit_of_a_retriever_is_pinned_and_its_local_path_is_not_pushed(hub, home, run, start, parquet_folder):
    save_vision_model(home / "vit")
    commit = hub.add_repository("some/vit", files_of(home / "vit"))
    short = {"model_name_or_path": start, "max_steps": 1, "do_eval": False, "eval_strategy": "no"}
    run(flags(None, parquet_folder, home / "run", retriever="some/vit", **short))
    recipe = read_json(home / "run/recipe.json")
    assert (recipe["retriever"], recipe["retriever_revision"]) == ("some/vit", commit)
    (home / "vit/README.md").write_text("moved on")
    hub.add_repository("some/vit", files_of(home / "vit"))
    hub.drop_history("some/vit")
    shutil.rmtree(home / "huggingface")
    result = run([home / "run/recipe.json", "--output_dir", home / "again"], code=2)
    assert f"retriever 'some/vit' has moved: revision {commit} is not there" in result.stderr
    assert "set --retriever_revision to that commit" in result.stderr
    run([*flags(None, parquet_folder, home / "local", retriever=home / "vit", **short), *PUSH, "end"])
    assert json.loads(hub.files("tester/model")["recipe.json"])["retriever"] == "./vit"


def test_an_adapter_is_pushed_without_paths_and_loaded_by_a_stranger_and_scored_again(
    hub, home, run, start, parquet_folder
):
    """Its base is on the Hub under a name; the next one's is a folder of this machine, which stays here."""
    commit = hub.add_repository("some/start", files_of(start))
    values = {"use_peft": True, "num_train_epochs": 1, "learning_rate": 3e-2}
    common = flags(None, parquet_folder, home / "run", model_name_or_path="some/start", **values)
    assert "Verified: tester/model" in run([*common, *PUSH, "every_save"]).stderr
    pushed = hub.files("tester/model")
    config = json.loads(pushed["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/start", commit)
    assert "adapter_model.safetensors" in pushed and "model.safetensors" not in pushed
    metadata = ModelCard(pushed["README.md"].decode()).data
    found = metadata.library_name, metadata.base_model, metadata.base_model_relation
    assert found == ("peft", "some/start", "adapter")
    code = re.search(r"```python\n(.*?)```", pushed["README.md"].decode(), re.DOTALL)[1]
    python = {"cwd": home, "env": hub.environment(home / "stranger"), "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", code], **python)
    assert result.stdout.rstrip("\n") == json.loads(pushed["sample.json"])["decoded"], result.stderr
    again = ["hf://tester/model", "--model_name_or_path", "tester/model", "--do_train", "false"]
    run([*again, "--dataset_name", parquet_folder, "--output_dir", home / "check"])
    assert (home / "check/predictions/test.jsonl").read_bytes() == (home / "run/predictions/test.jsonl").read_bytes()

    local = shutil.copytree(start, home / "base")
    hub.reset()
    common = flags(None, parquet_folder, home / "other", model_name_or_path=local, **values)
    run([*common, *PUSH, "checkpoint"])
    stored = [content for entry in hub.commits("tester/model") for content in entry.files.values()]
    assert json.loads(hub.files("tester/model")["adapter_config.json"])["base_model_name_or_path"] == "./base"
    assert "last-checkpoint/adapter_model.safetensors" in hub.files("tester/model")
    assert not any(home.name.encode() in content for content in hub.received + stored)


def test_a_recipe_on_the_hub_is_read_with_care(hub, run):
    bad = {"model_name_or_path": "some/start", "output_dir": "/etc", "push_to_hub": True}
    hub.add_repository("some/model", {"recipe.json": json.dumps(bad).encode(), "config.json": b"{}"})
    local = {"model_name_or_path": "some/start", "dataset_name": "./scans"}
    hub.add_repository("some/local", {"recipe.json": json.dumps(local).encode()})
    for address, reason in (
        (
            "hf://some/local",
            "dataset_name is './scans', a local path, which a recipe from the Hub must not name; add --da",
        ),
        ("hf://some/model/recipe.json", "sets 'output_dir'; a recipe from the Hub must not"),
        ("hf://some/model/other.json", "the repository has no file 'other.json'"),
        ("hf://some/nothing/recipe.json", "there is no such repository, or it is private"),
        ("hf://some/model@v9/recipe.json", "there is no revision 'v9'"),
        ("hf://model", "is not an address; write hf://<user>/<model>/recipe.json"),
    ):
        result = run([address], code=2)
        assert len(result.stderr.splitlines()) == 1
        assert reason in result.stderr


def test_a_commit_that_is_answered_with_another_has_moved(monkeypatch):
    """What a mirror or a cache before the Hub may do; the Hub itself does not, so its answer is a stand-in."""
    monkeypatch.setattr(HfApi, "repo_info", lambda self, *args, **kwargs: SimpleNamespace(sha="1" * 40))
    with pytest.raises(UserError, match=f"moved: revision {'0' * 40} is not there, its main branch is at {'1' * 40}"):
        pin_revision("some/model", "0" * 40)
    assert pin_revision("some/model", "1" * 40) == "1" * 40
    assert pin_revision("some/model", "main") == "1" * 40


def test_a_repository_whose_contents_cannot_be_read_is_not_replaced(hub, push):
    """The guard of another's model must not give way to a fault."""
    hub.add_repository("tester/taken", {"recipe.json": b"{}", "model.safetensors": b"mine"})
    for step in ("info", "resolve"):
        hub.fail(step, 403)
        assert "what 'tester/taken' holds cannot be read: 403" in push("tester/taken", code=2).stderr
        hub.heal()
    assert "holds another model" in push("tester/taken", code=2).stderr
    assert hub.files("tester/taken")["model.safetensors"] == b"mine"


def test_a_silent_server_does_not_hold_up_the_run(served, finished):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = f"""
from captioning.hub import client, repository
client.TIMEOUT = 0.5
client.limit_waiting()
repository = repository.Repository({str(finished)!r}, "a/b")
repository._api.endpoint = "http://127.0.0.1:{silent.getsockname()[1]}"
repository.push(print)
"""
        result = served[2].run(["-c", code], code=1, timeout=60)
    assert "the Hub has been silent for 0.5 s: POST " in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_push_ends_it_at_once_with_the_command_that_pushes(served, finished, number):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = f"""
import functools, signal
import run_captioning
from captioning.command_line import exit_on_user_error
from captioning.hub import repository
repository.HfApi = functools.partial(repository.HfApi, endpoint="http://127.0.0.1:{silent.getsockname()[1]}")
exit_on_user_error(lambda: run_captioning.main(["--push_only", {str(finished)!r}, "--hub_model_id", "a/b"]))
"""
        process = served[2].start(["-c", code])
        silent.accept()
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert errors.strip().splitlines()[-1].startswith(f"error: stopped by {number.name} during the push")
    assert errors.rstrip().endswith(f"python run_captioning.py --push_only {finished} --hub_model_id a/b")


def test_the_name_of_the_repository_is_checked_before_training(home, local_run):
    with pytest.raises(UserError, match="hub_model_id 'no such name'"):
        run_captioning.main([*local_run, *PUSH[:2], "no such name"])
    assert not (home / "out" / "run" / "model.safetensors").exists()


def test_a_folder_with_an_odd_name_is_pushed_under_a_fitting_one_and_privately_if_asked(hub, run, finished):
    folder = finished.rename(finished.with_name('R\u00f6ntgen "x"'))
    write_model_card(RunRecord(folder))
    run(["--push_only", folder, "--hub_private_repo"])
    assert 'name = "tester/Rontgen-x"' in hub.files("tester/Rontgen-x")["README.md"].decode()
    assert hub.repositories["model", "tester/Rontgen-x"].private


def test_a_private_repository_without_a_token_names_the_login(hub, home, run, start, parquet_folder):
    hub.add_repository("some/start", files_of(start), private=True)
    hub.add_repository("some/data", files_of(parquet_folder), kind="dataset", private=True)
    for model, data in (("some/start", parquet_folder), (start, "some/data")):
        result = run(flags(None, data, home / "run", model_name_or_path=model), code=2, HF_TOKEN="")
        line = result.stderr.splitlines()[-1]
        assert "the Hub has no such repository, or it is private: check the name, or run `hf auth login`" in line
    hub.fail("any", 403, headers={"X-Error-Code": "GatedRepo"})
    result = run(flags(None, parquet_folder, home / "run", model_name_or_path="some/start"), code=2)
    assert "it is gated: accept its terms on its page of the Hub, and `hf auth login` with a token" in result.stderr


# --- Without a server -----------------------------------------------------------------------------------------


def test_paths_of_this_machine_are_taken_out_of_a_recipe():
    recipe = {
        "config_name": (str(ROOT / "recipes" / "configs" / "blip_small.json"), "./recipes/configs/blip_small.json"),
        "dataset_name": ("/data/secret/rocov2", "./rocov2"),
        "tokenizer_name": ("relative/vocab", "relative/vocab"),
        "model_name_or_path": ("outputs/base", "./outputs/base"),
        "optim_args": ("file=/secret/x,y=../../secret/z", "file=./x,y=./z"),
        "lr_scheduler_kwargs": ({"path": "/a/b"}, {"path": "./b"}),
        "prompt": ("/ findings", "/ findings"),
    }
    public = json.loads(without_local_paths(json.dumps({name: given for name, (given, _) in recipe.items()})))
    assert public == {name: expected for name, (_, expected) in recipe.items()}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("run 1", "run-1"),
        ("Röntgen", "Rontgen"),
        ("a--b..c", "a-b-c"),
        ("x.git", "x"),
        ("模型", None),
        ("модель-2", None),
    ],
)
def test_the_name_of_a_folder_becomes_that_of_a_repository_or_is_asked_for(tmp_path, folder, name):
    if name:
        assert Repository(tmp_path / folder).model_id == name
        return
    with pytest.raises(UserError, match="no repository can be named after the folder"):
        run_captioning.main([*flags(None, "none", tmp_path / folder, model_name_or_path="none"), "--push_to_hub"])
    assert not (tmp_path / folder).exists(), "nothing was loaded or written before"


@pytest.mark.parametrize(
    ("license", "mend"),
    [("MIT", "mit"), ("apache2.0", "apache-2.0"), ("cc-by-nc-sa-4", "cc-by-nc-sa-4.0"), ("our own terms", "'other'$")],
)
def test_a_license_that_the_hub_does_not_know_is_refused_at_the_start(license, mend):
    arguments = ["--model_name_or_path", "some/start"]
    with pytest.raises(UserError, match=f"license '{license}' is not one that the Hub knows.*{mend}"):
        parse_arguments([*arguments, "--license", license])
    assert parse_arguments([*arguments, "--license", "other"])[1].license == "other"
