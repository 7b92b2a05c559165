"""Retrieved captions from a training to one's own images: the same in every stage, named, and never pushed."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from families import save_tiny, save_vision_model
from helpers import flags, losses, outcome, predictions, read_json, run_ranks, score_flags, signal_when, start

import run_captioning
from captioning.errors import UserError
from captioning.hub.repository import Repository
from captioning.inference.model import InferenceModel
from captioning.inference.writer import Writer
from captioning.models.retriever import Retriever
from captioning.reporting import results
from captioning.training.recipe import parse_arguments


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny("llava", folder / "llava")
    save_vision_model(folder / "vit")
    return folder


@pytest.fixture(scope="module")
def train_flags(models, parquet_folder):
    """Return a function from an output folder to the flags of a training with retrieved captions."""
    values = {"model_name_or_path": models / "llava", "vocab_size": None, "logging_steps": 1, "num_train_epochs": 1}
    values |= {"retriever": models / "vit", "retrieved_captions": 2}
    return lambda folder, **more: flags(None, parquet_folder, folder, **values | more)


@pytest.fixture(scope="module")
def trained(train_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_captioning.main(train_flags(folder))
    return folder


def test_recipe_card_page_and_predictions_name_what_was_retrieved(trained, raw_dataset, monkeypatch, capsys):
    recipe = read_json(trained / "recipe.json")
    assert (recipe["retrieved_captions"], recipe["retriever"].endswith("vit")) == (2, True)
    captions = dict(zip(raw_dataset["train"]["image_id"], raw_dataset["train"]["caption"], strict=True))
    card, page = ((trained / name).read_text() for name in ("README.md", "report.html"))
    for row in predictions(trained):
        assert len(set(row["retrieved"])) == 2 and set(row["retrieved"]) <= captions.keys()
        for image_id in row["retrieved"]:
            assert f'["{image_id}","{captions[image_id]}"]' in page.replace('", "', '","')
    assert "found by vit" in card and "**This code does\nnot: it gives other captions" in card
    assert "`--retriever`" in card and "token for token" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert not any(caption in code for caption in captions.values()), "they may be private"
    monkeypatch.chdir(trained.parent)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out == read_json(trained / "sample.json")["caption"] + "\n"


def test_a_rerun_and_a_run_that_only_scores_give_the_same_and_encode_no_image_again(
    trained, train_flags, parquet_folder, models, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(Retriever, "features", lambda self, images: pytest.fail("encoded again"))
    run_captioning.main([str(trained / "recipe.json"), "--output_dir", str(tmp_path / "again")])
    assert outcome(tmp_path / "again") == outcome(trained)
    scored = score_flags(trained, parquet_folder, tmp_path / "check", neighbor_samples=5)  # of the baseline alone
    with_captions = ["--retriever", str(models / "vit"), "--retrieved_captions", "2"]
    metrics = run_captioning.main([*scored, *with_captions])
    assert predictions(tmp_path / "check") == predictions(trained)
    assert metrics["predict_loss"] == read_json(trained / "all_results.json")["predict_loss"]
    assert not (tmp_path / "check/retrieval").exists(), "there is no model in this folder"
    assert "was trained with --retrieved_captions" not in caplog.text
    without = run_captioning.main(score_flags(trained, parquet_folder, tmp_path / "without"))
    assert "The model was trained with --retrieved_captions 2, this run has 0" in caplog.text
    assert abs(without["predict_loss"] - metrics["predict_loss"]) > 1e-3


def test_ones_own_images_are_captioned_as_by_the_run_also_in_the_demo_and_by_a_checkpoint(
    trained, raw_dataset, caplog
):
    model = InferenceModel(str(trained))
    images = raw_dataset["test"]["image"][:]
    assert [one.caption for one in model.describe(images)] == [row["prediction"] for row in predictions(trained)]
    *_, last = Writer(model).write(images[0], model.generation_config)
    assert last.alternatives[0].caption == predictions(trained)[0]["prediction"]
    captioner = model.captioner
    tokens, *_ = captioner.tokenize([predictions(trained)[0]["reference"]], 64)
    with model.computing():
        nll = captioner.nll_of_captions(captioner.model, model.collate(images[:1]), tokens)
    assert float(nll) == pytest.approx(predictions(trained)[0]["nll"], rel=1e-5)
    checkpoint = next(trained.glob("checkpoint-*"))
    assert InferenceModel(str(checkpoint)).retrieval.number == 2
    assert "similar images" not in caplog.text


def test_without_the_folder_a_line_says_that_captions_are_written_without(trained, raw_dataset, tmp_path, caplog):
    pushed = shutil.copytree(trained, tmp_path / "pushed", ignore=shutil.ignore_patterns("retrieval"))
    model = InferenceModel(str(pushed))
    warned = [record.message for record in caplog.records if "similar images" in record.message]
    assert len(warned) == 1 and "2 similar images" in warned[0] and "'retrieval', which is never pushed" in warned[0]
    assert model.retrieval is None and model.digest() != InferenceModel(str(trained)).digest()
    images = raw_dataset["test"]["image"][:]
    with model.computing():
        plain = model.captioner.collate(images, [[]] * len(images))
        assert model.collate(images)["input_ids"].tolist() == plain["input_ids"].tolist()


def test_a_retriever_that_is_gone_or_another_is_a_line_with_a_mend_that_there_is(trained, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    other = save_vision_model(tmp_path / "other", seed=1)
    for retriever, fault in {str(tmp_path / "gone"): "cannot be loaded", other: "another"}.items():
        (moved / "recipe.json").write_text(json.dumps(read_json(trained / "recipe.json") | {"retriever": retriever}))
        with pytest.raises(UserError, match=rf"^model '.*moved': .*{fault}.*; correct 'retriever' in recipe.json, or"):
            InferenceModel(str(moved))


def test_the_captions_of_the_training_are_not_pushed(trained):
    with Repository(trained, "tester/model")._stage_run() as stage:
        names = {str(path.relative_to(stage)) for path in Path(stage).rglob("*")}
    assert {"model.safetensors", "recipe.json", "predictions/test.jsonl"} <= names
    assert not [name for name in names if "retrieval" in name]


def test_a_training_without_retrieved_captions_leaves_none_of_an_earlier_run_in_its_folder(
    trained, train_flags, tmp_path
):
    shutil.copytree(trained / "retrieval", tmp_path / "run/retrieval")
    shutil.copy(trained / "recipe.json", tmp_path / "run")
    more = {"retrieved_captions": None, "retriever": None, "max_steps": 1, "do_eval": False, "do_predict": False}
    run_captioning.main(train_flags(tmp_path / "run", **more))
    assert not list((tmp_path / "run/retrieval").iterdir())
    assert InferenceModel(str(tmp_path / "run")).retrieval is None


def test_concept_neighbors_take_the_features_of_the_retrieval(trained, train_flags, tmp_path, monkeypatch):
    used, detect = [], results.detect_concepts

    def detecting(*args):
        used.append(args[-1].shape)
        return detect(*args)

    monkeypatch.setattr(results, "detect_concepts", detecting)
    monkeypatch.setattr(Retriever, "features", lambda self, images: pytest.fail("encoded again"))
    run_captioning.main(train_flags(tmp_path / "run", retrieved_captions=0))
    assert used == [(10, 32), (7, 32)]
    assert not (tmp_path / "run/retrieval").exists()
    assert "retrieved" not in predictions(tmp_path / "run")[0]


@pytest.mark.parametrize(
    "values, fault",
    [
        ({"retriever": None}, r"retrieved_captions needs a model that does not change .*; set --retriever"),
        ({"streaming": True}, r"retrieved_captions needs the features of all images first; leave out --streaming"),
        ({"retrieved_captions": -1}, r"retrieved_captions is -1"),
        (
            {"model_name_or_path": None, "config_name": "recipes/configs/blip_small.json"},
            "starts from a trained model",
        ),
    ],
)
def test_what_cannot_work_is_a_line_before_anything_is_loaded(train_flags, tmp_path, values, fault):
    with pytest.raises(UserError, match=fault):
        parse_arguments(train_flags(tmp_path / "run", **values))


def test_a_family_that_takes_none_is_refused_before_the_data_is_read(train_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(run_captioning, "load_data", lambda *args: pytest.fail("the data was read"))
    save_tiny("paligemma", tmp_path / "model")
    with pytest.raises(UserError, match="a paligemma takes no retrieved captions"):
        run_captioning.main(train_flags(tmp_path / "run", model_name_or_path=tmp_path / "model"))


@pytest.mark.parametrize(
    "more",
    [
        {"use_peft": True, "learning_rate": 3e-2},
        {"objective": "self_critical", "num_samples": 2, "learning_rate": 1e-5},
        {"concept_loss_weight": "auto", "min_concept_count": 2},
    ],
    ids=["lora", "self_critical", "concepts"],
)
def test_other_ways_to_train_have_them_too(train_flags, raw_dataset, tmp_path, more):
    folder = tmp_path / "run"
    run_captioning.main(train_flags(folder, max_steps=2, do_eval=False, eval_strategy="no", **more))
    found = [one.caption for one in InferenceModel(str(folder)).describe(raw_dataset["test"]["image"][:])]
    assert found == [row["prediction"] for row in predictions(folder)]
    assert predictions(folder)[0]["retrieved"]


def test_a_resume_with_another_retriever_is_refused(train_flags, models, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(models / "vit", tmp_path / "vit")
    command = train_flags(folder, retriever=tmp_path / "vit", max_steps=1, do_eval=False, do_predict=False)
    run_captioning.main(command)
    shutil.rmtree(tmp_path / "vit")
    save_vision_model(tmp_path / "vit", seed=1)
    with pytest.raises(UserError, match=r"cannot resume from .*: the retriever is another"):
        run_captioning.main([*command, "--resume_from_checkpoint", "true"])


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_weights_and_two_processes_train_as_one(trained, train_flags, tmp_path):
    command = train_flags(tmp_path / "killed", save_steps=2, save_strategy="steps", load_best_model_at_end=False)
    process = start(command)
    signal_when(lambda: (tmp_path / "killed/checkpoint-2/trainer_state.json").is_file(), signal.SIGKILL, process)
    process.communicate()
    run_captioning.main([*command, "--resume_from_checkpoint", "true"])
    assert outcome(tmp_path / "killed")["weights"] == outcome(trained)["weights"]
    run_ranks(2, train_flags(tmp_path / "two", per_device_train_batch_size=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-4)
    assert predictions(tmp_path / "two")[0]["retrieved"] == predictions(trained)[0]["retrieved"]
