"""The script as its user runs it: whole output folders, reruns, runs killed in the middle, and mistakes."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import DatasetDict, Image
from helpers import (
    SHARED,
    flags,
    make_rows,
    outcome,
    predictions,
    read_json,
    read_lines,
    run,
    score_flags,
    signal_when,
    start,
    without_times,
)
from processes import ROOT
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipProcessor, GenerationConfig

import run_captioning
from captioning.errors import UserError
from captioning.models.surface_form import SurfaceForm
from captioning.scoring.baselines import nearest_captions, shuffled
from captioning.scoring.captions import read_captions
from captioning.scoring.submission import check_submission
from metrics import rouge


@pytest.fixture(scope="module")
def finished(config_file, parquet_folder, tmp_path_factory):
    """The output folder, metrics and standard output of a whole run, started as a user starts it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = [sys.executable, "run_captioning.py", *flags(config_file, parquet_folder, folder)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, read_json(folder / "all_results.json"), result.stdout


class Stock:
    """A saved model as stock transformers loads it."""

    def __init__(self, folder):
        self.model, loading = BlipForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values())
        self.model.eval()
        self.processor = BlipProcessor.from_pretrained(folder)
        self.settings, self.surface_form = GenerationConfig.from_pretrained(folder), SurfaceForm.load(str(folder))

    def pixel_values(self, images):
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def caption(self, image, prompt=None, **settings) -> str:
        inputs = self.processor(images=image, text=prompt, return_tensors="pt")
        settings = settings or {"generation_config": self.settings}
        tokens = self.model.generate(**inputs, **settings)[0]
        start = len(inputs["input_ids"][0]) - 1 if prompt else 0
        return self.surface_form.restore(self.processor.decode(tokens[start:], skip_special_tokens=True).strip())

    def nll(self, image, caption, prompt="") -> tuple[float, int]:
        """Return the loss summed over the tokens of the caption, without those of the prompt, and their count."""
        input_ids = self.processor.tokenizer(f"{prompt} {caption}", return_tensors="pt")["input_ids"]
        labels = input_ids.clone()
        prompt_length = len(self.processor.tokenizer(prompt)["input_ids"]) - 1  # [CLS] and the prompt
        labels[:, :prompt_length] = -100
        input_ids[:, 0] = self.model.config.text_config.bos_token_id
        with torch.no_grad():
            loss = self.model(pixel_values=self.pixel_values(image), input_ids=input_ids, labels=labels).loss
        num_tokens = labels.shape[1] - prompt_length
        return float(loss) * num_tokens, num_tokens


@pytest.fixture(scope="module")
def stock(finished) -> Stock:
    return Stock(finished[0])


@pytest.fixture(scope="module")
def scored(finished, parquet_folder, tmp_path_factory):
    """The output folder and standard error of a run that only scores the finished model."""
    folder = tmp_path_factory.mktemp("scored")
    return folder, run(score_flags(finished[0], parquet_folder, folder, write_submission=True)).stderr


# --- A whole run ----------------------------------------------------------------------------------------------


def test_the_output_folder_is_whole(finished):
    folder, metrics, _ = finished
    expected = """
        README.md training_curve.png report.html recipe.json rejected.jsonl model.safetensors config.json
        generation_config.json processor_config.json tokenizer.json trainer_state.json train_results.json
        eval_results.json predict_results.json all_results.json scores.json predictions/validation.jsonl
        predictions/test.jsonl checkpoint-12/trainer_state.json surface_form.json checkpoint-12/surface_form.json
    """
    assert all((folder / name).is_file() for name in expected.split())
    assert list(folder.rglob("events.out.tfevents*")), "no TensorBoard log"
    for prefix in ("eval_", "predict_"):
        names = ("loss", "perplexity", "rouge1", "rouge2", "rougeL", "gen_len", "unique_captions")
        assert {prefix + name for name in names} <= metrics.keys()
        assert metrics[prefix + "perplexity"] == pytest.approx(np.exp(metrics[prefix + "loss"]))
    assert [len(predictions(folder, split)) for split in ("validation", "test")] == [10, 7]


def test_the_run_ends_with_a_table_and_three_captions(finished):
    _, metrics, stdout = finished
    assert f"{metrics['predict_rougeL']:.4f}" in stdout
    assert stdout.count("  reference ") == stdout.count("  prediction ") == 3


def test_scores_are_written_beside_their_baselines(finished, raw_dataset):
    folder, metrics, stdout = finished
    scores = read_json(folder / "scores.json")
    assert list(scores) == ["validation", "test"]
    for prefix, split in (("eval_", "validation"), ("predict_", "test")):
        found = scores[split]["scores"]["rougeL"]
        assert metrics[f"{prefix}rougeL"] == pytest.approx(found["value"], abs=1e-12)
        assert found["low"] <= found["value"] <= found["high"]
        assert all(metrics[f"{prefix}rougeL_{name}"] == value for name, value in found["baselines"].items())
        assert scores[split]["baselines"]["constant"]["caption"] in raw_dataset["train"]["caption"]
        assert scores[split]["baselines"]["nearest_image"]["found_among"] == "24 training images"
        assert scores[split]["verdict"] in stdout
    rows = predictions(folder)
    assert [row["cui"] for row in rows] == [["C1306645", "C0817096"], []] * 3 + [[]]
    page = (folder / "report.html").read_text()
    assert all(row["image_id"] in page for row in rows)
    assert "image_0100" not in page, "the page shows the test split"


def test_the_nearest_image_is_found_by_features_of_the_vision_model(finished, stock, raw_dataset):
    _, metrics, _ = finished
    features = {}
    for split in ("train", "test"):
        with torch.no_grad():
            seen = stock.model.vision_model(stock.pixel_values(list(raw_dataset[split]["image"])))
        features[split] = seen.last_hidden_state[:, 1:].mean(dim=1).numpy()
    captions = nearest_captions(features["test"], features["train"], raw_dataset["train"]["caption"])
    assert len(set(captions)) > 1
    expected = rouge(captions, raw_dataset["test"]["caption"])["rougeL"].mean()
    assert metrics["predict_rougeL_nearest_image"] == pytest.approx(expected, abs=1e-12)


def test_the_caption_of_another_image_is_what_the_model_writes_for_it(finished, stock, raw_dataset):
    """`shuffled_images` moves captions; a model that is shown the images in that order writes these very ones."""
    _, metrics, _ = finished
    captions = [stock.caption(row["image"]) for row in shuffled(list(raw_dataset["test"]))]
    expected = rouge(captions, raw_dataset["test"]["caption"])["rougeL"].mean()
    assert metrics["predict_rougeL_shuffled_images"] == pytest.approx(expected, abs=1e-12)


def test_a_saved_model_is_scored_alone(finished, scored):
    """The training split is only read, for the baselines."""
    again = read_json(scored[0] / "all_results.json")
    expected = {name: value for name, value in finished[1].items() if name.startswith(("eval_", "predict_"))}
    assert without_times(again) == without_times(expected)
    assert not (scored[0] / "model.safetensors").exists()


def test_baselines_without_training_images_or_training_split(finished, parquet_folder, tmp_path):
    folder, metrics, _ = finished

    def score(name, dataset=parquet_folder, **values):
        return run_captioning.main(score_flags(folder, dataset, tmp_path / name, do_eval=False, **values))

    fewer = score("fewer", neighbor_samples=0)
    assert fewer["predict_rougeL_constant"] == metrics["predict_rougeL_constant"]
    assert "predict_rougeL_nearest_image" not in fewer
    (tmp_path / "alone" / "data").mkdir(parents=True)
    shutil.copy(parquet_folder / "data" / "test-00000-of-00001.parquet", tmp_path / "alone" / "data")
    assert score("out", tmp_path / "alone")["predict_rougeL"] == metrics["predict_rougeL"]
    found = read_json(tmp_path / "out" / "scores.json")["test"]["baselines"]["constant"]
    assert found["found_among"] == "the references themselves (7)"


def test_a_submission_is_written_in_the_order_of_the_data(finished, scored, raw_dataset, tmp_path):
    references = tmp_path / "truth.csv"
    image_ids = raw_dataset["test"]["image_id"][:]
    references.write_text("ID,Caption\n" + "".join(f"{image_id},x\n" for image_id in image_ids))
    for name in ("submission.csv", "submission.zip"):
        assert check_submission(str(scored[0] / name), str(references)) == []
    captions = read_captions(str(scored[0] / "submission.csv"), str(references))
    assert captions.predictions == [row["prediction"] for row in predictions(scored[0])]
    assert captions.image_ids == image_ids, "of the test split, not of validation"
    assert not (finished[0] / "submission.csv").exists(), "only where it is asked for"


def test_the_best_checkpoint_is_kept_by_rouge(finished):
    folder, metrics, _ = finished
    state = read_json(folder / "trainer_state.json")
    scores = [entry["eval_rougeL"] for entry in state["log_history"] if "eval_rougeL" in entry]
    assert len(scores) == 2
    assert state["best_metric"] == max(scores) == metrics["eval_rougeL"]


def test_stock_transformers_repeats_predictions_and_losses(finished, stock, raw_dataset):
    folder, metrics, _ = finished
    rows, losses = predictions(folder), []
    for row, example in zip(rows, raw_dataset["test"], strict=True):
        assert (row["image_id"], row["reference"]) == (example["image_id"], example["caption"])
        assert row["prediction"] == stock.caption(example["image"])
        assert row["rougeL"] == pytest.approx(rouge([row["prediction"]], [example["caption"]])["rougeL"][0])
        losses.append(stock.nll(example["image"], example["caption"]))
        assert row["nll"] == pytest.approx(losses[-1][0], rel=1e-5)
    total, tokens = np.sum(losses, axis=0)
    assert metrics["predict_loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert metrics["predict_rougeL"] == pytest.approx(np.mean([row["rougeL"] for row in rows]), abs=1e-9)


def test_captions_are_written_as_the_training_captions_are_unless_the_flag_says_no(finished, parquet_folder, tmp_path):
    run_captioning.main(score_flags(finished[0], parquet_folder, tmp_path, restore_surface_form=False))
    rows, decoded = ([row["prediction"] for row in predictions(folder)] for folder in (finished[0], tmp_path))
    form = SurfaceForm.load(str(finished[0]))
    assert rows == [form.restore(text) for text in decoded] != decoded
    bounds = [read_json(folder / "scores.json")["test"]["scores"] for folder in (finished[0], tmp_path)]
    assert [bound["rougeL"]["tokenizer"] for bound in bounds] == [1, 1]


def test_a_prompt_is_given_in_training_and_generation_alike(config_file, parquet_folder, raw_dataset, tmp_path):
    """Stock BLIP, given the same prompt, repeats predictions and losses; the prompt is not a target."""
    prompt = "chest radiograph"
    run_captioning.main(flags(config_file, parquet_folder, tmp_path, prompt=prompt, num_train_epochs=1))
    stock = Stock(tmp_path)
    for row, example in zip(predictions(tmp_path), raw_dataset["test"], strict=True):
        assert row["prediction"] == stock.caption(example["image"], prompt)
        assert row["nll"] == pytest.approx(stock.nll(example["image"], example["caption"], prompt)[0], rel=1e-5)


def test_a_run_is_repeated_by_its_recipe(finished, tmp_path):
    folder, _, _ = finished
    result = run([folder / "recipe.json", "--output_dir", tmp_path / "again", "--use_cpu", "true"])
    assert "may differ" not in result.stderr
    assert outcome(tmp_path / "again") == outcome(folder)


def test_scores_with_other_settings_are_kept_out_of_the_folder_of_a_run(finished, parquet_folder):
    folder, _, _ = finished
    before = outcome(folder)
    with pytest.raises(UserError, match=r"holds a trained model.*set another --output_dir"):
        run_captioning.main(score_flags(folder, parquet_folder, folder, max_new_tokens=9))
    assert outcome(folder) == before


def test_other_settings_than_those_of_the_model_are_logged(finished, scored, parquet_folder, tmp_path, caplog):
    run_captioning.main(score_flags(finished[0], parquet_folder, tmp_path, num_beams=2, max_new_tokens=9))
    assert "The model's own scores are with num_beams 3, not 2; for them, --num_beams 3" in caplog.text
    assert "The model's own scores are with max_new_tokens 12, not 9" in caplog.text
    assert "own scores" not in scored[1]


def test_other_packages_and_hardware_are_logged_before_training(finished, tmp_path, caplog):
    recipe = read_json(finished[0] / "recipe.json")
    recipe["package_versions"]["torch"] = "1.0"
    recipe["hardware"]["device"] = "NVIDIA H100"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    run_captioning.main([str(tmp_path / "recipe.json"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"])
    assert "The recipe ran with package torch '1.0', here is '2.13.0" in caplog.text
    assert "The recipe ran with hardware device 'NVIDIA H100', here is 'cpu'" in caplog.text
    assert caplog.text.count("may differ") == 2


def test_a_greedy_run_is_what_plain_generate_does(config_file, parquet_folder, raw_dataset, tmp_path):
    """By the defaults that the model is saved with, which do not reach a run with beams that starts from it."""
    greedy, beams = tmp_path / "greedy", tmp_path / "beams"
    values = {"num_beams": 1, "max_new_tokens": 25, "min_new_tokens": 5, "do_eval": False}
    run_captioning.main(flags(config_file, parquet_folder, greedy, **values))
    stock = Stock(greedy)
    for row, example in zip(predictions(greedy), raw_dataset["test"], strict=True):
        assert row["prediction"] == stock.caption(example["image"], do_sample=False)
    run_captioning.main(flags(None, parquet_folder, beams, max_steps=1, model_name_or_path=greedy))
    text = read_json(beams / "config.json")["text_config"]
    assert not {"max_new_tokens", "min_new_tokens"} & text.keys()


def test_a_tokenizer_without_the_two_tokens_of_blip_is_enough(finished, scored, parquet_folder, tmp_path):
    """As those of BLIP's checkpoints on the Hub."""
    folder = shutil.copytree(finished[0], tmp_path / "model")
    saved, config = (read_json(folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in ("[DEC]", "[ENC]")]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    config = {name: value for name, value in config.items() if name not in ("bos_token", "extra_special_tokens")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    left = BlipProcessor.from_pretrained(folder).tokenizer
    assert left.bos_token is None and len(left) == len(BlipProcessor.from_pretrained(finished[0]).tokenizer) - 2
    run_captioning.main(score_flags(folder, parquet_folder, tmp_path / "run"))
    assert predictions(tmp_path / "run") == predictions(scored[0])


def test_captions_must_be_learned_from_images(config_file, tmp_path):
    """Captions that only the image tells apart: a run that does not look, or shuffles, cannot score them right."""
    shades = {"black image": 0, "gray image of the middle": 128, "white image without any structure": 255}

    def rows(number):
        names = [list(shades)[i % 3] for i in range(number)]
        images = [np.full((32, 32), shades[name], np.uint8) for name in names]
        return make_rows(number, image=images, caption=names)

    data, values = tmp_path / "shades", {"num_train_epochs": 12, "learning_rate": 5e-3, "do_eval": False}
    DatasetDict(train=rows(48), validation=rows(6), test=rows(9)).save_to_disk(data)
    metrics = run_captioning.main(flags(config_file, data, tmp_path / "run", **values))
    assert metrics["predict_rougeL"] > 0.99
    assert metrics["predict_unique_captions"] == pytest.approx(3 / 9)


def test_rows_are_checked_by_several_processes(config_file, tmp_path):
    """With rows of its own: those that another run has checked come from the cache."""
    rows = make_rows(9, 700)
    DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / "data")
    result = run(flags(config_file, tmp_path / "data", tmp_path, preprocessing_num_workers=3, do_train=False))
    assert "num_proc=3" in result.stderr


def test_options_reach_the_run(config_file, parquet_folder, tmp_path):
    values = {
        "image_size": 48, "label_smoothing": 0.2, "max_caption_length": 8, "activation_checkpointing": True,
        "num_beams": 1, "min_new_tokens": 5, "no_repeat_ngram_size": 2, "dataloader_num_workers": 1,
        "max_train_samples": 8, "max_eval_samples": 3, "max_predict_samples": 2,
    }  # fmt: skip
    folder = tmp_path / "run"
    given = {name.replace("activation", "gradient"): value for name, value in values.items()}
    metrics = run_captioning.main(flags(config_file, parquet_folder, folder, max_steps=2, **given))
    assert values.items() <= read_json(folder / "recipe.json").items()
    config = read_json(folder / "config.json")
    assert config["vision_config"]["image_size"] == 48
    assert BlipProcessor.from_pretrained(folder).image_processor.size["height"] == 48
    assert config["text_config"]["label_smoothing"] == 0.2
    assert metrics["predict_gen_len"] >= 5
    assert read_json(folder / "trainer_state.json")["epoch"] == 1.0, "two steps of 4 rows are the 8 training rows"
    assert [len(predictions(folder, split)) for split in ("validation", "test")] == [3, 2]


def test_a_run_may_measure_losses_alone(config_file, parquet_folder, tmp_path):
    values = {"max_steps": 2, "predict_with_generate": False}
    metrics = run_captioning.main(flags(config_file, parquet_folder, tmp_path / "run", **values))
    assert metrics["predict_loss"] and "predict_rougeL" not in metrics
    assert not (tmp_path / "run" / "predictions").exists()


def test_a_frozen_vision_tower_stays_as_it_was(config_file, parquet_folder, tmp_path):
    values = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    values |= {"max_steps": 2, "do_eval": False, "do_predict": False}

    def changed(freeze: bool) -> set[str]:
        """Train, and return the parts of the model that the second step has changed."""
        folder = tmp_path / str(freeze)
        run_captioning.main(flags(config_file, parquet_folder, folder, freeze_vision_model=freeze, **values))
        first, last = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
        return {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}

    assert changed(freeze=True) == {"text_decoder"}
    assert changed(freeze=False) == {"text_decoder", "vision_model"}


@pytest.mark.slow
def test_real_radiographs_end_with_the_whole_folder(config_file, tmp_path):
    dataset = SHARED / "chest_xrays_rocov2_schema"
    if not dataset.is_dir():
        pytest.skip("the real radiographs are not beside the project")
    metrics = run_captioning.main(flags(config_file, dataset, tmp_path / "run", num_train_epochs=1))
    assert metrics["predict_loss"] < np.log(200)
    assert len(predictions(tmp_path / "run")) == 16


# --- Killed and resumed ---------------------------------------------------------------------------------------


def kill_when(condition, arguments: list[str]) -> None:
    process = start(arguments)
    signal_when(condition, signal.SIGKILL, process)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def test_a_run_killed_in_the_middle_and_resumed_ends_as_if_never_killed(config_file, parquet_folder, tmp_path):
    arguments = {"num_train_epochs": 4, "logging_steps": 5, "gradient_accumulation_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = run(flags(config_file, parquet_folder, whole, **arguments))
    resume = [*flags(config_file, parquet_folder, killed, **arguments), "--resume_from_checkpoint", "true"]
    kill_when((killed / "recipe.json").exists, resume)  # before there is any checkpoint
    kill_when((killed / "checkpoint-6" / "trainer_state.json").exists, resume)
    (killed / "checkpoint-9").mkdir(exist_ok=True)  # as a run that is killed while saving leaves it
    (killed / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    (killed / "checkpoint-9" / "trainer_state.json").unlink(missing_ok=True)
    result = run(resume)
    assert "checkpoint-9 is incomplete and is skipped" in result.stderr
    assert f"Resuming from {killed / 'checkpoint-6'}" in result.stderr
    first_epoch = "'epoch': '1'}"  # of the evaluation that ends it: the resumed run must not train it again
    assert first_epoch in uninterrupted.stdout + uninterrupted.stderr
    assert first_epoch not in result.stdout + result.stderr
    assert outcome(killed) == outcome(whole)


def test_a_finished_run_is_not_trained_over_by_accident(finished, config_file, parquet_folder):
    folder, _, _ = finished
    before = outcome(folder)
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run.*--resume_from_checkpoint true"):
        run_captioning.main(flags(config_file, parquet_folder, folder))
    assert outcome(folder) == before


def test_a_resumed_run_logs_what_changed_in_its_recipe(config_file, parquet_folder, tmp_path, caplog):
    folder = tmp_path / "run"
    run_captioning.main(flags(config_file, parquet_folder, folder, num_train_epochs=1))
    resume = {"num_train_epochs": 1, "resume_from_checkpoint": True, "num_beams": 2}
    run_captioning.main(flags(config_file, parquet_folder, folder, **resume))
    assert "Resuming with another recipe: num_beams was 3, is 2" in caplog.text
    assert read_json(folder / "recipe.json")["changed_on_resume"] == {"num_beams": [3, 2]}
    assert r"| changed on resume | num\_beams 3, then 2 |" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match=r"cannot resume in .*: image_size was None, is 64"):
        run_captioning.main(flags(config_file, parquet_folder, folder, **resume, image_size=64))


# --- Mistakes -------------------------------------------------------------------------------------------------


def test_a_mistake_ends_with_status_2_and_one_line(config_file, parquet_folder, tmp_path):
    result = run(flags(config_file, parquet_folder, tmp_path / "run", num_beams=0), code=2)
    assert result.stderr.splitlines() == ["error: num_beams is 0; set --num_beams from 1 to 256"]
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": "./nowhere"}, "dataset './nowhere' does not exist"),
        ({"config_name": "nowhere.json"}, "config 'nowhere.json' cannot be loaded"),
        ({"max_caption_length": 65}, "max_caption_length 65 exceeds the model's 64 text positions"),
        ({"max_new_tokens": 64}, "set --max_new_tokens to 63 or less"),
        ({"image_size": 33}, "image_size 33 is not a multiple of the model's patch size 8; set --image_size to 32"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint 'nowhere' is not a complete checkpoint"),
        ({"output_dir": "/dev/null/run"}, "output folder '/dev/null/run' cannot be written"),
        ({"optim_args": "x"}, "the optimizer cannot be built: .*check --optim and --optim_args"),
        ({"lr_scheduler_kwargs": '{"foo": 1}'}, "the schedule cannot be built: .*check --lr_scheduler_type"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": "x"}'},
            "the schedule cannot be built",
        ),
        ({"tokenizer_name": "./nowhere"}, "tokenizer './nowhere' cannot be loaded"),
    ],
    ids=lambda values: next(iter(values)) if isinstance(values, dict) else "",
)
def test_mistakes_are_named_with_their_mend(config_file, parquet_folder, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        run_captioning.main(flags(config_file, parquet_folder, tmp_path / "run", **values))


def test_missing_and_empty_splits_are_named(config_file, raw_dataset, tmp_path):
    incomplete = DatasetDict({split: raw_dataset[split] for split in ("train", "validation")})
    incomplete.save_to_disk(str(tmp_path / "incomplete"))
    with pytest.raises(UserError, match=r"only train, validation; draw it .*, or set --do_predict false"):
        run_captioning.main(flags(config_file, tmp_path / "incomplete", tmp_path / "run"))
    empty = DatasetDict({**raw_dataset, "validation": raw_dataset["validation"].select([])})
    empty.save_to_disk(str(tmp_path / "empty"))
    (tmp_path / "parquet").mkdir()
    for split, rows in empty.items():
        rows.to_parquet(str(tmp_path / "parquet" / f"{split}-0.parquet"))
    for folder in ("empty", "parquet"):
        with pytest.raises(UserError, match=r"'validation' is empty|\"validation\" corresponds to no data"):
            run_captioning.main(flags(config_file, tmp_path / folder, tmp_path / "run"))


@pytest.mark.parametrize("values", [{"config_name": "."}, {"config_name": None, "model_name_or_path": "./nowhere"}])
def test_a_mistake_in_the_model_does_not_wait_for_the_check_of_the_rows(
    config_file, parquet_folder, tmp_path, monkeypatch, values
):
    monkeypatch.setattr(run_captioning, "check_rows", lambda *arguments, **options: pytest.fail("rows were checked"))
    with pytest.raises(UserError, match=r"cannot be loaded|does not describe a BLIP"):
        run_captioning.main(flags(config_file, parquet_folder, tmp_path / "run", **values))


def test_bad_rows_are_rejected_and_the_run_goes_on(config_file, tmp_path):
    test = make_rows(7, start=200)
    images = [dict(image) for image in test.cast_column("image", Image(decode=False))["image"]]
    images[2] = {"bytes": b"<html>", "path": None}
    test = make_rows(7, start=200, image=images, caption=["\u202f", *test["caption"][1:]])
    train = make_rows(7, image=[images[2], *images[:2], *images[3:]], caption=["Zzz.", *["A cyst."] * 6])
    DatasetDict(train=train, validation=make_rows(4, 100), test=test).save_to_disk(str(tmp_path / "data"))
    arguments = flags(config_file, tmp_path / "data", tmp_path / "run", max_steps=1)
    with pytest.raises(UserError, match="2 of 7 rows cannot be used"):
        run_captioning.main([*arguments, "--max_rejected_fraction", "0.2"])
    run_captioning.main([*arguments, "--max_rejected_fraction", "0.3"])
    rejected = read_lines(tmp_path / "run" / "rejected.jsonl")
    assert [(entry["split"], entry["row"]) for entry in rejected] == [("train", 0), ("test", 0), ("test", 2)]
    vocabulary = read_json(tmp_path / "run" / "tokenizer.json")["model"]["vocab"]
    assert "c" in vocabulary and "z" not in vocabulary, "the tokenizer is trained on rows that passed the check"
    ids = [row["image_id"] for row in predictions(tmp_path / "run")]
    assert ids == [f"image_{i:04d}" for i in (201, 203, 204, 205, 206)]
