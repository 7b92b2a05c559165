"""The card says what the files of the output folder say, and its code does what it promises."""

import json
import re
import shutil

import pytest
from helpers import FEW_SCORES, flags
from huggingface_hub import ModelCard

import run_captioning
from captioning.reporting.model_card import LICENSES, markdown, render, write_model_card
from captioning.scoring.baselines import BASELINES
from captioning.scoring.captions import read_predictions


@pytest.fixture(scope="module")
def finished(config_file, parquet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    run_captioning.main(
        flags(config_file, parquet_folder, folder, prompt="""a "scan" of the patient's""", max_steps=4)
    )
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def change(folder, file="recipe.json", **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def metadata(folder, name="user/model"):
    return ModelCard(render(folder, name)).data


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_the_code_of_the_card_repeats_the_predictions(folder, raw_dataset, monkeypatch, capsys, precision):
    """With a prompt, quotes in it; autocast is for a GPU and does nothing here."""
    change(folder, **precision)
    write_model_card(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert ("autocast" in code) == bool(precision)
    monkeypatch.chdir(folder.parent)
    rows = read_predictions(folder / "predictions" / "test.jsonl")
    assert len({row["prediction"] for row in rows}) > 1, "all captions are the same: the test sees nothing"
    for row, example in zip(rows, raw_dataset["test"], strict=True):
        example["image"].save("image.png")
        capsys.readouterr()
        exec(compile(code, "card", "exec"), {})
        assert capsys.readouterr().out == row["prediction"] + "\n"


def test_the_card_says_whether_plain_generate_suffices(folder):
    assert "`model.generate(pixel_values=...)` alone does not" in render(folder, "a/b")
    change(folder, num_beams=1)
    assert "So does `model.generate(**inputs)` without the settings" in render(folder, "a/b")
    change(folder, prompt=None)
    assert 'So does `model.generate(pixel_values=inputs["pixel_values"])` without' in render(folder, "a/b")
    change(folder, no_repeat_ngram_size=2)
    assert "alone does not" in render(folder, "a/b")


def test_data_and_license(folder, parquet_folder):
    """The strictest label of ROCOv2, and no guess where the data is the user's own."""
    data = metadata(folder)
    assert (data.license, data.datasets, data.base_model) == ("other", [parquet_folder.name], None)
    assert "is not known to the recipe" in render(folder, "a/b")
    commit = "0123456789abcdef0123456789abcdef01234567"
    change(folder, dataset_name="eltorio/ROCOv2-radiology", dataset_revision=commit)
    data = metadata(folder)
    assert (data.license, data.datasets) == ("cc-by-nc-sa-4.0", ["eltorio/ROCOv2-radiology"])
    assert {result.dataset_revision for result in data.eval_results} == {commit}
    (folder / "scores.json").unlink()  # else the baseline that the run measured stands there
    card = render(folder, "a/b")
    assert "labels disagree between mirrors" in card and "rueckert2024rocov2" in card and ".165" in card
    change(folder, license="mit", language="de")
    assert (metadata(folder).license, metadata(folder).language) == ("mit", "de")
    change(folder, license=None, dataset_name="phantoms", dataset_revision=None)
    assert metadata(folder).license == LICENSES["phantoms"][0] == "apache-2.0"
    change(folder, model_name_or_path="some/start", model_revision=commit, config_name=None)
    assert (metadata(folder).license, metadata(folder).base_model) == ("other", "some/start")


def test_a_local_copy_of_rocov2_is_recognised_by_its_ids(folder):
    predictions = folder / "predictions" / "test.jsonl"
    predictions.write_text(predictions.read_text().replace("image_0200", "ROCOv2_2023_test_000001"))
    assert (metadata(folder).license, metadata(folder).datasets) == ("cc-by-nc-sa-4.0", ["eltorio/ROCOv2-radiology"])


def test_paths_of_the_machine_are_not_in_the_card(folder):
    change(folder, dataset_name="/home/me/my data", config_name="/home/me/tiny.json", tokenizer_name="/home/me/vocab")
    card = render(folder, "user/model")
    assert "/home/me" not in card and "`--config_name`" in card and "`--tokenizer_name`" in card
    change(folder, model_name_or_path="/home/me/start", config_name=None)
    card = render(folder, "user/model")
    assert "/home/me" not in card
    assert (metadata(folder).datasets, metadata(folder).base_model) == (["my-data"], "start")
    assert "has to be added: `--dataset_name`, `--model_name_or_path` (to train again)" in card


def test_scores_stand_beside_split_beams_and_number_of_captions(folder):
    results = json.loads((folder / "all_results.json").read_text())
    assert f"| test | 7 | 3 | 12 | {results['predict_rougeL']:.4f} | {results['predict_rouge1']:.4f} |" in render(
        folder, "a"
    )
    assert {result.metric_value for result in metadata(folder).eval_results} == {
        results[f"predict_{name}"] for name in ("rougeL", "rouge1", "rouge2", "loss")
    }
    validation = {key: value for key, value in results.items() if not key.startswith("predict_")}
    (folder / "all_results.json").write_text(json.dumps(validation))
    assert {result.dataset_split for result in metadata(folder).eval_results} == {"validation"}
    (folder / "all_results.json").write_text("{}")
    assert metadata(folder).eval_results is None
    assert "This run was not scored." in render(folder, "a")


def test_the_card_says_what_the_scores_are_worth(folder):
    scores = json.loads((folder / "scores.json").read_text())["test"]
    card = render(folder, "user/model")
    assert f"**{scores['verdict']}**" in card
    assert "does NOT beat" in scores["verdict"], "an untrained model that beats a constant caption"
    row = scores["scores"]["rougeL"]
    numbers = (row["value"], *(row["baselines"][baseline] for baseline in BASELINES))
    cells = next(line for line in card.splitlines() if line.startswith("| `rougeL`")).split(" | ")
    assert [cells[1], *cells[3:8]] == [f"{number:.4f}" for number in numbers]
    assert cells[2] == f"{row['low']:.4f} to {row['high']:.4f}"
    assert markdown(scores["baselines"]["constant"]["caption"]) in card
    assert f"Not computed: `concept_f1`: {scores['missing']['concept_f1']}" in card
    (folder / "scores.json").unlink()
    assert "worth" not in render(folder, "user/model"), "a run of before there were baselines"


def test_a_run_that_only_scored_has_its_own_settings(finished, parquet_folder, tmp_path, raw_dataset, capsys):
    """The record beside the scored model may have others."""
    arguments = [
        "--model_name_or_path",
        str(finished),
        "--do_train",
        "false",
        "--dataset_name",
        str(parquet_folder),
        *FEW_SCORES,
    ]
    decoding = ["--num_beams", "2", "--max_new_tokens", "7", "--no_repeat_ngram_size", "2", "--use_cpu", "true"]
    run_captioning.main([*arguments, *decoding, "--output_dir", str(tmp_path / "check")])
    card = (tmp_path / "check" / "README.md").read_text()
    assert "`run`, scored on" in card and "| epochs |" not in card and "alone does not" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"run"', repr(str(finished)))
    for row, example in zip(
        read_predictions(tmp_path / "check/predictions/test.jsonl"), raw_dataset["test"], strict=True
    ):
        example["image"].save(tmp_path / "image.png")
        capsys.readouterr()
        exec(compile(code.replace("image.png", str(tmp_path / "image.png")), "card", "exec"), {})
        assert capsys.readouterr().out == row["prediction"] + "\n"
    change(tmp_path / "check", model_name_or_path="user/model", model_revision="0" * 40)
    assert 'name = "user/model"' in render(tmp_path / "check", "check")
    change(tmp_path / "check", num_beams=1, no_repeat_ngram_size=0)
    assert "alone does not" in render(tmp_path / "check", "check"), "its config was not written by this run"


def test_scores_that_are_no_numbers_are_left_out_of_the_metadata(folder):
    """The Hub refuses a card with them."""
    change(folder, "all_results.json", predict_loss=float("nan"))
    assert {result.metric_name for result in metadata(folder).eval_results} == {"ROUGE-L", "ROUGE-1", "ROUGE-2"}


def test_a_recipe_of_before_there_was_hardware_in_it(folder):
    recipe = json.loads((folder / "recipe.json").read_text())
    del recipe["hardware"], recipe["language"], recipe["license"]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert "unknown threads" in render(folder, "a/b")


def test_text_of_the_data_shows_as_it_is_in_a_markdown_table(folder):
    hostile = "a|b\n<script>x</script> `c` [d](https://e) $f$ \u202ereversed @g www.h.i " + "long " * 100
    shown = markdown(hostile)
    assert not {"\n", "\u202e", "<", ">"} & set(shown)
    assert shown.startswith(
        r"a\|b &lt;script&gt;x&lt;/script&gt; \`c\` \[d\](https\://e) \$f\$ reversed \@g www\.h.i long"
    )
    assert len(shown) < 400 and shown.endswith("…")
    rows = read_predictions(folder / "predictions" / "test.jsonl")
    rows[0]["prediction"] = hostile
    (folder / "predictions" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [line for line in render(folder, "a").splitlines() if line.startswith("| first |")]
    assert len(table) == 1 and len(re.findall(r"(?<!\\)\|", table[0])) == 6
