"""All scores of a set of captions beside their baselines, and the command `metrics.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer

from captioning.data import phantoms
from captioning.errors import UserError
from captioning.reporting import score_table
from captioning.reporting.score_table import table
from captioning.scoring import score as score_module
from captioning.scoring.baselines import BASELINES
from captioning.scoring.bootstrap import Score
from captioning.scoring.captions import Captions
from captioning.scoring.score import Training, flat, score
from metrics import rouge


ROOT = Path(__file__).parents[2]


def phantom_rows(number: int, seed: int, split: str = "train") -> tuple[list[str], list[list[str]], np.ndarray]:
    """Captions, concepts, and features that tell one combination of attributes from another, as an image would."""
    rng = np.random.default_rng(seed)
    sets = phantoms.combinations(split)
    drawn = rng.integers(len(sets), size=number)
    cuis = [[phantoms.CUIS[sets[i]["modality"]], phantoms.CUIS[sets[i]["region"]]] for i in drawn]
    values = sorted({str(value) for each in phantoms.combinations("train") for value in each.values()})
    features = [[float(str(value) in map(str, sets[i].values())) for value in values] for i in drawn]
    return [phantoms.reword(sets[i], rng) for i in drawn], cuis, np.array(features)


@pytest.fixture(scope="module")
def training():
    captions, cuis, features = phantom_rows(300, seed=0)
    return Training(captions, cuis, features, captions)


@pytest.fixture(scope="module")
def rows():
    """What is true of 120 images: captions, concepts, features."""
    return phantom_rows(120, seed=1, split="test")


@pytest.fixture(scope="module")
def captions(rows):
    """A good system: the oracle, which knows what is there and words it anew."""
    references, cuis, _ = rows
    return Captions([f"id{i}" for i in range(120)], phantoms.oracle_captions(references, seed=5), references, cuis)


@pytest.fixture(scope="module")
def scores(captions, training, rows):
    return score(captions, training, rows[2], tokenizer=None)


def with_predictions(captions: Captions, predictions: list[str]) -> Captions:
    return Captions(captions.image_ids, predictions, captions.references, captions.cuis)


# --- Scores, baselines, intervals --------------------------------------------------------------------------------


def test_each_score_has_its_interval_and_every_baseline(scores):
    assert list(scores["baselines"]) == list(BASELINES)
    for name, entry in scores["scores"].items():
        assert list(entry["baselines"]) == list(BASELINES), name
        if entry["value"] is not None:
            assert entry["low"] <= entry["value"] <= entry["high"], name
    assert {"rouge1", "rouge2", "rougeL", "imageclef_rouge1", "modality_f1", "concept_f1"} <= scores["scores"].keys()
    assert scores["scores"]["measurement_f1"]["value"] is None, "phantoms have no measurements"
    assert scores["captions"] == 120


def test_the_values_are_means_of_rouge_score(captions, scores):
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    pairs = list(zip(captions.references, captions.predictions, strict=True))
    expected = np.mean([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])
    assert scores["scores"]["rougeL"]["value"] == pytest.approx(expected, abs=1e-12)


def test_each_baseline_is_the_score_of_its_captions(captions, scores, training):
    baselines = scores["scores"]["rougeL"]["baselines"]
    constant = scores["baselines"]["constant"]["caption"]
    assert constant in training.captions
    expected = rouge([constant] * 120, captions.references)["rougeL"].mean()
    assert baselines["constant"] == pytest.approx(expected, abs=1e-12)
    best = max(rouge([text] * 300, training.captions)["rougeL"].mean() for text in training.captions)
    assert rouge([constant] * 300, training.captions)["rougeL"].mean() == pytest.approx(best, abs=1e-12)
    assert set(scores["baselines"]["typical_of_modality"]["captions"]) == {"CT", "X-ray", "MRI", "ultrasound"}


def test_baselines_are_ordered_by_what_they_know(scores):
    """Shuffled references know nothing; a constant the style; the modality's caption more; the nearest image most."""
    baselines = scores["scores"]["rougeL"]["baselines"]
    assert baselines["shuffled_references"] < baselines["constant"] < baselines["typical_of_modality"]
    assert baselines["typical_of_modality"] < baselines["nearest_image"]
    assert scores["scores"]["modality_f1"]["baselines"]["typical_of_modality"] == 1
    assert scores["scores"]["modality_f1"]["baselines"]["nearest_image"] > 0.9
    assert baselines["shuffled_images"] == pytest.approx(baselines["shuffled_references"], abs=0.05)


def test_a_system_that_looks_beats_its_baselines(scores):
    assert scores["beats_constant"]
    assert "beats the best constant caption" in scores["verdict"]
    assert "NOT" not in scores["verdict"]
    gain = scores["scores"]["rougeL"]["value"] - scores["scores"]["rougeL"]["baselines"]["shuffled_images"]
    assert f"looking at the image adds {gain:+.4f}" in scores["verdict"]
    assert scores["scores"]["concept_f1"]["value"] > 0.95
    assert scores["scores"]["concept_f1"]["upper_bound"] > 0.95


def test_a_system_that_does_not_look_is_said_not_to_beat_a_constant(captions, training):
    poor = score(with_predictions(captions, ["An axial image."] * 120), training, None, tokenizer=None)
    assert not poor["beats_constant"]
    assert "does NOT beat the best constant caption" in poor["verdict"]
    assert "looking at the image adds +0.0000" in poor["verdict"]
    assert "the most typical caption of the true modality" in poor["verdict"], "a higher baseline is named"
    assert poor["unique_captions"] == pytest.approx(1 / 120)


def test_a_system_near_the_constant_is_not_said_to_beat_it(captions, training, scores):
    constant = scores["baselines"]["constant"]["caption"]
    predictions = [constant] * 120
    predictions[0] = captions.references[0]
    near = score(with_predictions(captions, predictions), training, None, tokenizer=None)
    assert not near["beats_constant"]
    assert "does not surely beat the best constant caption" in near["verdict"]


def test_without_a_training_split_the_baselines_are_made_of_the_references(captions):
    alone = score(captions, tokenizer=None)
    assert alone["baselines"]["constant"]["caption"] in captions.references
    assert "references themselves" in alone["baselines"]["constant"]["found_among"]
    assert "nearest_image" not in alone["baselines"]
    assert "training split" in alone["missing"]["concept_f1"]


def test_scores_by_modality_are_those_of_its_captions(captions, scores):
    modalities = scores["modalities"]
    assert sum(own["captions"] for own in modalities.values()) == 120
    rows = [i for i, cuis in enumerate(captions.cuis) if phantoms.CUIS["CT"] in cuis]
    assert modalities["CT"]["captions"] == len(rows)
    expected = rouge([captions.predictions[i] for i in rows], [captions.references[i] for i in rows])["rougeL"].mean()
    assert modalities["CT"]["rougeL"]["value"] == pytest.approx(expected)
    assert modalities["CT"]["rougeL"]["low"] < expected < modalities["CT"]["rougeL"]["high"]
    assert "concept_f1" in modalities["CT"]


def test_scores_are_the_same_each_time_and_fit_for_json(captions, training, rows, scores):
    again = score(captions, training, rows[2], tokenizer=None)
    assert json.dumps(again, allow_nan=False) == json.dumps(scores, allow_nan=False)


def test_one_caption_can_be_scored():
    single = score(Captions(["a"], ["a cat"], ["a dog"], [[]]), tokenizer=None)
    assert single["scores"]["rougeL"]["value"] == pytest.approx(0.5)
    assert single["baselines"].keys() == {"constant", "typical_of_modality"}, "there is no other image"
    assert single["scores"]["rougeL"]["low"] is None, "one caption has no interval"
    json.dumps(single, allow_nan=False)
    table(single)


@pytest.mark.parametrize("number", [1, 3])
def test_of_a_few_captions_none_is_said_to_beat_a_constant(number, captions, training):
    few = Captions(*(column[:number] for column in vars(captions).values()))
    found = score(with_predictions(few, few.references), training, None, tokenizer=None)
    assert found["scores"]["rougeL"]["value"] == 1 > found["scores"]["rougeL"]["baselines"]["constant"]
    assert not found["beats_constant"]
    assert "does not surely beat" in found["verdict"]
    assert ("looking at the image" in found["verdict"]) == (number > 1)


def test_the_names_of_the_result_files(scores):
    names = flat(scores)
    assert names["rougeL"] == scores["scores"]["rougeL"]["value"]
    assert names["rougeL_shuffled_images"] == scores["scores"]["rougeL"]["baselines"]["shuffled_images"]
    assert {f"rougeL_{baseline}" for baseline in BASELINES} <= names.keys()
    assert all(isinstance(value, float) for value in names.values()), "a score that is not defined is left out"


def test_coco_metrics_stand_beside_their_baselines_under_their_own_names(captions, training):
    if not shutil.which("java"):
        pytest.skip("there is no Java runtime")
    found = score(captions, training, None, tokenizer="ptb")
    assert found["missing"] == {}
    for name in ("coco_bleu1", "coco_bleu4", "coco_cider", "coco_rougeL", "coco_meteor"):
        entry = found["scores"][name]
        assert entry["low"] < entry["value"] < entry["high"], name
        assert entry["baselines"]["constant"] < entry["value"], name
        assert entry["baselines"].keys() == {*BASELINES} - {"nearest_image"}
    assert found["scores"]["coco_rougeL"]["value"] != found["scores"]["rougeL"]["value"]


def test_of_many_captions_only_the_constant_baseline_has_a_meteor(captions, training, monkeypatch):
    if not shutil.which("java"):
        pytest.skip("there is no Java runtime")
    monkeypatch.setattr(score_module, "METEOR_CAPTIONS", 240)
    found = score(captions, training, None, tokenizer="whitespace")["scores"]
    assert found["nlgeval_meteor"]["baselines"].keys() == {"constant"}
    assert found["nlgeval_cider"]["baselines"].keys() == {*BASELINES} - {"nearest_image"}


def test_without_java_the_other_scores_are_there_and_it_is_said(captions, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = score(captions, tokenizer="ptb")
    assert "rougeL" in found["scores"]
    assert not [name for name in found["scores"] if name.startswith("coco")]
    assert "install a Java runtime" in found["missing"]["coco_*"]
    whitespace = score(captions, tokenizer="whitespace")
    assert "nlgeval_bleu4" in whitespace["scores"]
    assert "Java" in whitespace["missing"]["nlgeval_meteor"]


# --- The command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, captions, training):
    """A folder with one system's captions as JSON lines and as CSV, another system's, references and training data."""
    folder = tmp_path_factory.mktemp("files")

    def write_csv(name, column, texts, prefix="id"):
        quoted = (f'{prefix}{i},"{text}"\n' for i, text in enumerate(texts))
        (folder / name).write_text(f"ID,{column}\n" + "".join(quoted))

    for name, predictions in (("good", captions.predictions), ("poor", captions.references[::-1])):
        rows = zip(captions.image_ids, captions.references, predictions, captions.cuis, strict=True)
        keys = ("image_id", "reference", "prediction", "cui")
        lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        write_csv(f"{name}.csv", "Caption", predictions)
    write_csv("references.csv", "Caption", captions.references)
    write_csv("concepts.csv", "CUIs", [";".join(cuis) for cuis in captions.cuis])
    write_csv("train.csv", "Caption", training.captions, "t")
    write_csv("train_concepts.csv", "CUIs", [";".join(cuis) for cuis in training.cuis], "t")
    return folder


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "metrics.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_scores_a_run_and_any_systems_csv_alike(files, captions, training):
    extra = ("--train", files / "train.csv", "--train_concepts", files / "train_concepts.csv", "--tokenizer", "none")
    first = run(files / "good.jsonl", *extra, "--json")
    given = ("--references", files / "references.csv", "--concepts", files / "concepts.csv")
    second = run(files / "good.csv", *given, *extra, "--json")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    found = json.loads(first.stdout)
    expected = score(captions, Training(training.captions, training.cuis), None, tokenizer=None)
    assert found == expected
    text = run(files / "good.jsonl", *extra)
    assert text.stdout.rstrip("\n") == table(expected)
    assert text.stderr == ""
    assert expected["verdict"] in text.stdout


def command_json(capsys, *arguments) -> dict:
    score_table.main([*map(str, arguments), "--json", "--tokenizer", "none"])
    return json.loads(capsys.readouterr().out)


def test_two_systems_are_tested_pair_by_pair(files, capsys):
    found = command_json(capsys, files / "good.jsonl", "--against", files / "poor.jsonl")
    row = found["scores"]["rougeL"]
    assert row["difference"] == pytest.approx(row["first"] - row["second"])
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert row["p_value"] < 0.001
    undefined = found["scores"]["measurement_f1"]
    assert undefined["difference"] is undefined["low"] is undefined["p_value"] is None
    score_table.main([str(files / "poor.jsonl"), "--against", str(files / "good.jsonl"), "--tokenizer", "none"])
    text = capsys.readouterr().out
    assert f"{-row['difference']:+.4f}" in text
    assert text.splitlines()[0].startswith("120 captions")


def test_all_scores_of_two_systems_are_tested(files, capsys):
    train = ("--train", str(files / "train.csv"), "--train_concepts", str(files / "train_concepts.csv"))
    pair = [str(files / "good.jsonl"), "--against", str(files / "poor.jsonl")]
    score_table.main([*pair, *train, "--json", "--tokenizer", "whitespace"])
    found = json.loads(capsys.readouterr().out)
    names = ["concept_f1", "nlgeval_bleu4", "nlgeval_cider", *(["nlgeval_meteor"] if shutil.which("java") else [])]
    for name in names:
        assert found["scores"][name]["low"] > 0, name
        assert found["scores"][name]["p_value"] < 0.001, name
    assert not shutil.which("java") or found["missing"] == {}


def test_half_a_surrogate_pair_and_control_characters_are_shown_safely(tmp_path):
    caption = "CT \x1b[31mred\x1b[0m\u202eevil"
    row = {"image_id": "a", "prediction": "x", "reference": caption}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"image_id": "b\ud800"}) + "\n")
    command = [sys.executable, "metrics.py", str(tmp_path / "odd.jsonl"), "--tokenizer", "none"]
    for more in ([], ["--json"]):
        result = subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
        )
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout


def test_a_reader_that_closes_early_is_no_traceback(files):
    command = f"{sys.executable} metrics.py {files / 'good.jsonl'} --tokenizer none --json | true"
    result = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert result.stderr == ""


def test_the_table_shows_what_is_said_by_modality(scores):
    lines = table(scores).splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("by modality"))
    assert lines[heading].split()[2:] == list(scores["modalities"])
    rows = {line.split()[0]: line.split()[1:] for line in lines[heading + 1 : heading + 12] if line}
    first = next(iter(scores["modalities"].values()))
    assert rows["rougeL"][0] == f"{first['rougeL']['value']:.4f}"
    assert rows["concept_f1"][0] == f"{first['concept_f1']['value']:.4f}"
    assert {"laterality_f1", "negation_f1", "captions"} <= rows.keys()


def test_two_systems_are_matched_by_id_and_not_by_row(files, tmp_path, capsys):
    lines = (files / "good.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "shuffled.jsonl").write_text("".join(lines[::-1]))
    found = command_json(capsys, files / "good.jsonl", "--against", tmp_path / "shuffled.jsonl")
    assert found["scores"]["rougeL"]["difference"] == 0
    assert found["scores"]["rougeL"]["p_value"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.csv"], "holds no reference captions; add --references"),
        (["none.jsonl"], "cannot be read"),
        (["good.jsonl", "--train_concepts", "train_concepts.csv"], "--train_concepts goes with --train"),
        (
            ["good.jsonl", "--train", "train_concepts.csv"],
            "has the columns ['ID', 'CUIs']; they must be ['ID', 'Caption']",
        ),
        (["good.jsonl", "--against", "short.jsonl"], "119 ids"),
        (["good.jsonl", "--against", "other.jsonl"], "have other references for 120 images (id0)"),
    ],
)
def test_a_mistake_is_one_line(files, arguments, message):
    lines = (files / "good.jsonl").read_text().splitlines(keepends=True)
    (files / "short.jsonl").write_text(lines[0])
    (files / "other.jsonl").write_text("".join(lines).replace('"reference": "', '"reference": "x '))
    paths = [str(files / item) if item.endswith(("csv", "jsonl")) else item for item in arguments]
    with pytest.raises(UserError) as error:
        score_table.main(paths)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_command_with_one_line_and_status_2(files):
    result = run(files / "good.csv")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_score_without_value_is_written_as_none():
    assert score_module.finite(float("nan")) is None
    nothing = Score(np.zeros((3, 1)), lambda sums, number: sums[..., 0] * np.nan)
    assert score_module._entry(nothing, np.ones((2, 3))) == {"value": None, "low": None, "high": None}
