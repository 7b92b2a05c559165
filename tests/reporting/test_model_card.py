"""The card says what the files of the output folder say, and its code does what it promises."""

import json
import re
import shutil
import warnings

import pytest
from helpers import flags, read_json, score_flags
from huggingface_hub import ModelCard
from PIL import Image

import run_captioning
from captioning.models.surface_form import SurfaceForm
from captioning.reporting.model_card import markdown, render_card, write_model_card
from captioning.reporting.run_record import RunRecord
from captioning.scoring.baselines import BASELINES
from captioning.scoring.bootstrap import num_decimals
from captioning.scoring.captions import read_predictions


@pytest.fixture(scope="module")
def finished(config_file, parquet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    prompt = """a "scan" of the patient's"""
    run_captioning.main(flags(config_file, parquet_folder, folder, prompt=prompt, max_steps=4))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


ROUGE = ("rougeL", "rouge1", "rouge2")


def change(folder, file="recipe.json", **values):
    (folder / file).write_text(json.dumps(read_json(folder / file) | values))


def render(folder, name="user/model"):
    return render_card(RunRecord(folder), name)


def metadata(folder):
    return ModelCard(render(folder)).data


def code_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.fixture
def code_repeats(raw_dataset, capsys):
    """Return a function that runs the code of a card, and checks that it prints the captions of a file."""

    def check(card, predictions):
        code = re.sub(r"Image\.open\(.*\)", 'Image.open("image.png")', code_of(card))
        rows = read_predictions(predictions)
        assert len({row["prediction"] for row in rows}) > 1, "all captions are the same: the test sees nothing"
        for row, example in zip(rows, raw_dataset["test"], strict=True):
            example["image"].save("image.png")
            capsys.readouterr()
            exec(compile(code, "card", "exec"), {})
            assert SurfaceForm.load("run").restore(capsys.readouterr().out.strip()) == row["prediction"]
        return code

    return check


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_the_code_of_the_card_repeats_the_predictions(folder, monkeypatch, code_repeats, precision):
    """With a prompt, quotes in it; autocast is for a GPU and does nothing here."""
    change(folder, **precision)
    write_model_card(RunRecord(folder))
    monkeypatch.chdir(folder.parent)
    code = code_repeats((folder / "README.md").read_text(), folder / "predictions" / "test.jsonl")
    assert ("autocast" in code) == bool(precision)


@pytest.mark.parametrize("with_images", [False, True])
def test_the_code_runs_as_pasted_and_prints_the_caption_that_the_card_states(
    folder, raw_dataset, config_file, parquet_folder, monkeypatch, capsys, with_images
):
    """On a drawing; or, where images may be published, on the first one that was captioned."""
    if with_images:
        shutil.rmtree(folder)
        run_captioning.main(flags(config_file, parquet_folder, folder, publish_images=True, max_steps=4))
    card, sample = (folder / "README.md").read_text(), read_json(folder / "sample.json")
    caption, written = sample["decoded"], sample["caption"]
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    with warnings.catch_warnings(action="error"):
        exec(compile(code_of(card), "card", "exec"), {})
    printed = capsys.readouterr()
    assert printed.out == caption + "\n" and f'The code prints:\n"{markdown(caption)}". The run writes it as' in card
    assert f'"{markdown(written)}"' in card and written == SurfaceForm.load(str(folder)).restore(caption)
    assert "deprecated" not in printed.err
    sample, first = Image.open(folder / "sample.png"), raw_dataset["test"][0]["image"]
    assert (sample.size == first.size and sample.tobytes() == first.tobytes()) == with_images
    pictures = {path.stem for path in folder.glob("examples/*.jpg")}
    assert pictures == ({"best", "median", "first", "worst"} if with_images else set())
    assert ("![worst](examples/worst.jpg)" in card) == with_images


def test_the_card_says_whether_plain_generate_suffices(folder):
    assert "`model.generate(**inputs)` alone does not" in render(folder)
    change(folder, num_beams=1)
    assert "So does `model.generate(**inputs)` without the settings" in render(folder)
    change(folder, no_repeat_ngram_size=2)
    assert "alone does not" in render(folder)


def test_data_and_license(folder, parquet_folder):
    """The strictest label of ROCOv2, and no guess where the data is the user's own."""
    data = metadata(folder)
    assert (data.license, data.datasets, data.base_model) == ("other", None, None)
    assert data.eval_results[0].dataset_type == parquet_folder.name
    assert "does not know the license" in render(folder)
    commit = "0123456789abcdef0123456789abcdef01234567"
    change(folder, dataset_name="eltorio/ROCOv2-radiology", dataset_revision=commit)
    data = metadata(folder)
    assert (data.license, data.datasets) == ("cc-by-nc-sa-4.0", ["eltorio/ROCOv2-radiology"])
    assert {result.dataset_revision for result in data.eval_results} == {commit}
    assert ".165" not in render(folder), "the run has measured a baseline"
    (folder / "scores.json").unlink()
    card = render(folder)
    assert "labels disagree between mirrors" in card and "rueckert2024rocov2" in card and ".165" in card
    change(folder, license="mit", language="de")
    assert (metadata(folder).license, metadata(folder).language) == ("mit", "de")
    change(folder, license=None, dataset_name="phantoms", dataset_revision=None)
    assert metadata(folder).license == "apache-2.0"
    change(folder, model_name_or_path="some/start", model_revision=commit, config_name=None)
    assert (metadata(folder).license, metadata(folder).base_model) == ("other", "some/start")


def test_paths_of_the_machine_are_not_in_the_card(folder):
    local = {"config_name": "/home/me/tiny.json", "model_config": None, "tokenizer_name": "/home/me/vocab"}
    change(folder, dataset_name="/home/me/my data", **local)
    card = render(folder)
    assert "/home/me" not in card and "`--config_name`" in card and "`--tokenizer_name`" in card
    change(folder, model_name_or_path="/home/me/start", config_name=None)
    card, data = render(folder), metadata(folder)
    assert "/home/me" not in card
    assert (data.datasets, data.base_model) == (None, None), "they are not of the Hub"
    assert "the folder my-data" in card and "fine-tuned from `start`" in card
    assert "local folders: `--dataset_name`, `--model_name_or_path` (to train again)" in card


def test_scores_stand_beside_split_beams_and_number_of_captions(folder):
    results = read_json(folder / "all_results.json")
    scores = read_json(folder / "scores.json")["test"]["scores"]
    cells = [f"{results[f'predict_{key}']:.{num_decimals(scores[key]['low'], scores[key]['high'])}f}" for key in ROUGE]
    loss, perplexity, length = (results[f"predict_{key}"] for key in ("loss", "perplexity", "gen_len"))
    cells += [f"{loss:.3f}", f"{perplexity:.1f}", f"{length:.1f}"]
    assert f"| test | 7 | {' | '.join(cells)} |" in render(folder)
    assert f"| epochs | {results['epoch']:.2g} (4 steps) |" in render(folder), "max_steps has set them"
    names = {"ROUGE-L": "rougeL", "ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ImageCLEF ROUGE-1": "imageclef_rouge1"}
    names["Loss"] = "loss"
    found = {result.metric_name: result.metric_value for result in metadata(folder).eval_results}
    assert found == {name: round(results[f"predict_{key}"], 4) for name, key in names.items()}
    more = {"coco_cider": 0.5, "coco_bleu4": 0.1, "coco_meteor": 0.2, "concept_f1": 0.3}
    change(folder, "all_results.json", **{f"predict_{key}": value for key, value in more.items()})
    found = {result.metric_type: result.metric_value for result in metadata(folder).eval_results}
    assert {"cider": 0.5, "bleu": 0.1, "meteor": 0.2, "f1": 0.3}.items() <= found.items()
    validation = {key: value for key, value in results.items() if not key.startswith("predict_")}
    (folder / "all_results.json").write_text(json.dumps(validation | {"eval_loss": None}))
    found = {(result.dataset_split, result.metric_name) for result in metadata(folder).eval_results}
    assert found == {("validation", name) for name in names if name != "Loss"}
    (folder / "all_results.json").write_text("{}")
    (folder / "scores.json").unlink()
    assert metadata(folder).eval_results is None
    assert "This run was not scored." in render(folder)


def test_scores_stand_beside_their_intervals_and_baselines(folder):
    scores, card = read_json(folder / "scores.json")["test"], render(folder)
    assert f"**{scores['verdict']}**" in card
    row = scores["scores"]["rougeL"]
    numbers = (row["value"], *(row["baselines"][baseline] for baseline in BASELINES))
    cells = next(line for line in card.splitlines() if line.startswith("| `rougeL`")).split(" | ")
    digits = num_decimals(row["low"], row["high"])
    assert [cells[1], *cells[3:8]] == [f"{number:.{digits}f}" for number in numbers]
    assert cells[2] == f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"
    assert cells[-1] == f"{markdown(row['signature'])} |" and r"lower\|tok" in cells[-1], "else it is many cells"
    best = max(row["baselines"], key=row["baselines"].get)
    small = next(line for line in card.splitlines() if line.startswith("| ROUGE-L |")).split(" | ")
    highest = f"{row['baselines'][best]:.{digits}f} ({BASELINES[best].name}) |"
    assert small[1:] == [f"**{cells[1]}**", cells[2], highest]
    assert markdown(scores["baselines"]["constant"]["caption"]) in card
    assert f"Not computed: `concept_f1`: {scores['missing']['concept_f1']}" in card
    (folder / "scores.json").unlink()
    assert "baseline" not in render(folder), "the run has no scores beside baselines"


def test_a_run_that_only_scored_has_its_own_settings(finished, parquet_folder, tmp_path, monkeypatch, code_repeats):
    """The record beside the scored model may have others."""
    check = tmp_path / "check"
    settings = {"num_beams": 2, "max_new_tokens": 7, "no_repeat_ngram_size": 2}
    run_captioning.main(score_flags(finished, parquet_folder, check, **settings))
    card = (check / "README.md").read_text()
    assert "`run`, scored on" in card and "alone does not" in card
    assert "| parameters |" not in card and "| image size |" not in card, "no model was saved"
    assert "| epochs |" not in card and "## Training" not in card
    monkeypatch.chdir(finished.parent)  # where the card's "run" is
    code_repeats(card, check / "predictions" / "test.jsonl")
    change(check, model_name_or_path="user/model", model_revision="0" * 40)
    card = render(check, "me/scored")
    assert 'name = "user/model"' in card and 'cached_file("me/scored", "sample.png")' in card
    change(check, num_beams=1, no_repeat_ngram_size=0)
    assert "alone does not" in render(check), "its config was not written by this run"


def test_a_recipe_from_before_it_had_hardware_and_code_has_a_card(folder):
    recipe = read_json(folder / "recipe.json")
    kept = {key: value for key, value in recipe.items() if key not in ("hardware", "code", "language", "license")}
    (folder / "recipe.json").write_text(json.dumps(kept))
    card = render(folder)
    assert "unknown threads" in card and "by the code of the run:" in card


def test_text_of_the_data_shows_as_it_is_in_a_markdown_table(folder):
    hostile = "a|b\n<script>x</script> `c` [d](https://e) $f$ \u202ereversed @g www.h.i " + "long " * 100
    shown = markdown(hostile)
    assert not {"\n", "\u202e", "<", ">"} & set(shown)
    expected = r"a\|b &lt;script&gt;x&lt;/script&gt; \`c\` \[d\](https\://e) \$f\$ reversed \@g www\.h.i long"
    assert shown.startswith(expected)
    assert len(shown) < 400 and shown.endswith("…")
    rows = read_predictions(folder / "predictions" / "test.jsonl")
    rows[0]["prediction"] = hostile
    (folder / "predictions" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [line for line in render(folder).splitlines() if line.startswith("| first |")]
    assert len(table) == 1 and len(re.findall(r"(?<!\\)\|", table[0])) == 6
