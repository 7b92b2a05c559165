"""All scores of a set of captions beside their baselines, and their table."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import needs_java

from captioning.data import phantoms
from captioning.reporting.score_table import in_digits, score_table
from captioning.scoring import coco
from captioning.scoring.baselines import BASELINES
from captioning.scoring.bertscore import NOT_COMPUTED
from captioning.scoring.captions import Captions
from captioning.scoring.constants import constant_caption
from captioning.scoring.score import finite, flat, score
from metrics import rouge


@pytest.fixture(scope="module")
def scores(captions, training, rows):
    return score(captions, training, rows[2], tokenizer=None)


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


def test_what_the_tokenizer_lets_through_is_scored_beside_the_captions():
    captions = Captions(["a", "b"], ["An X-ray.", "A CT."], ["Chest X-ray.", "CT of the chest."], [[], []])
    found = score(captions, tokenizer=None, round_trip=["chest x - ray.", "ct of the chest."])["scores"]
    assert found["rougeL"]["tokenizer"] == 1
    assert found["imageclef_rouge1"]["tokenizer"] == pytest.approx((2 / 5 + 1) / 2), "xray, and x ray"
    assert "tokenizer" not in score(captions, tokenizer=None)["scores"]["rougeL"]


def test_baselines_are_the_scores_of_their_captions_ordered_by_what_they_know(captions, scores, training):
    """Shuffled references know nothing; a constant the style; the modality's caption more; the nearest image most."""
    baselines, constant = scores["scores"]["rougeL"]["baselines"], scores["baselines"]["constant"]["caption"]
    assert constant == constant_caption(training.captions, training.captions)
    expected = rouge([constant] * 120, captions.references)["rougeL"].mean()
    assert baselines["constant"] == pytest.approx(expected, abs=1e-12)
    assert set(scores["baselines"]["typical_of_modality"]["captions"]) == {"CT", "X-ray", "MRI", "ultrasound"}
    assert baselines["shuffled_references"] < baselines["constant"] < baselines["typical_of_modality"]
    assert baselines["typical_of_modality"] < baselines["nearest_image"]
    assert scores["scores"]["modality_f1"]["baselines"]["typical_of_modality"] == 1
    assert scores["scores"]["modality_f1"]["baselines"]["nearest_image"] > 0.9
    assert baselines["shuffled_images"] == pytest.approx(baselines["shuffled_references"], abs=0.05)


def test_a_system_that_looks_beats_its_baselines(scores):
    assert scores["beats_constant"]
    assert "beats the best constant caption" in scores["verdict"]
    gain = scores["scores"]["rougeL"]["value"] - scores["scores"]["rougeL"]["baselines"]["shuffled_images"]
    assert f"Looking at the image adds {gain:+.3f}" in scores["verdict"]
    assert scores["scores"]["concept_f1"]["value"] > 0.95
    assert scores["scores"]["concept_f1"]["references"] > 0.95


def test_the_verdict_says_that_a_system_that_does_not_look_does_not_beat_a_constant(captions, training):
    poor = score(replace(captions, predictions=["An axial image."] * 120), training, None, tokenizer=None)
    assert not poor["beats_constant"]
    assert "baselines score higher: typical of modality 0." in poor["verdict"], "the highest first"
    assert ", constant caption 0." in poor["verdict"] and "best" not in poor["verdict"]
    assert "Looking at the image adds +0.00" in poor["verdict"]
    assert poor["unique_captions"] == pytest.approx(1 / 120)


def test_without_a_training_split_the_baselines_are_made_of_the_references(captions):
    alone = score(captions, tokenizer=None)
    assert alone["baselines"]["constant"]["caption"] in captions.references
    assert "references themselves" in alone["baselines"]["constant"]["found_among"]
    assert "nearest_image" not in alone["baselines"]
    assert "training split" in alone["missing"]["concept_f1"]


def test_scores_by_modality_are_those_of_its_captions(captions, scores):
    modalities = scores["modalities"]
    sizes = [own["captions"] for own in modalities.values()]
    assert sum(sizes) == 120 and sizes == sorted(sizes, reverse=True)
    rows = [i for i, cuis in enumerate(captions.cuis) if phantoms.CUIS["CT"] in cuis]
    assert modalities["CT"]["captions"] == len(rows)
    expected = rouge([captions.predictions[i] for i in rows], [captions.references[i] for i in rows])["rougeL"].mean()
    assert modalities["CT"]["rougeL"]["value"] == pytest.approx(expected)
    assert modalities["CT"]["rougeL"]["low"] < expected < modalities["CT"]["rougeL"]["high"]
    assert "concept_f1" in modalities["CT"]


def test_scores_are_the_same_each_time_and_fit_for_json(captions, training, rows, scores):
    again = score(captions, training, rows[2], tokenizer=None)
    assert json.dumps(again, allow_nan=False) == json.dumps(scores, allow_nan=False)
    assert [finite(value) for value in (1, np.nan, np.inf)] == [1.0, None, None]


def test_one_caption_can_be_scored():
    single = score(Captions(["a"], ["a cat"], ["a dog"], [[]]), tokenizer=None)
    assert single["scores"]["rougeL"]["value"] == pytest.approx(0.5)
    assert single["baselines"].keys() == {"constant", "typical_of_modality"}, "there is no other image"
    assert single["scores"]["rougeL"]["low"] is None, "one caption has no interval"
    json.dumps(single, allow_nan=False)
    score_table(single)


@pytest.mark.parametrize("number", [1, 3, 120])
def test_the_verdict_never_says_that_few_captions_or_near_ones_beat_a_constant(number, captions, training, scores):
    few = Captions(*(column[:number] for column in vars(captions).values()))
    constant = scores["baselines"]["constant"]["caption"]
    predictions = few.references if number < 120 else [few.references[0], *[constant] * 119]
    found = score(replace(few, predictions=predictions), training, None, tokenizer=None)
    assert found["scores"]["rougeL"]["value"] > found["scores"]["rougeL"]["baselines"]["constant"]
    assert not found["beats_constant"]
    assert "does not significantly beat the best constant caption" in found["verdict"]
    assert ("Looking at the image" in found["verdict"]) == (number > 1)


def test_the_names_of_the_result_files(scores):
    names, entry = flat(scores), scores["scores"]["rougeL"]
    assert {"rougeL": entry["value"]} | {f"rougeL_{key}": entry["baselines"][key] for key in BASELINES} == {
        name: value for name, value in names.items() if name.startswith("rougeL")
    }
    assert all(isinstance(value, float) for value in names.values()), "a score that is not defined is left out"


@needs_java
def test_coco_metrics_stand_beside_their_baselines_under_their_own_names(captions, training, monkeypatch):
    def instead_of_meteor(systems, references):  # which takes seconds to start
        return {name: own["rougeL"] for name, own in coco.ngram_scores(systems, references).items()}

    monkeypatch.setattr(coco, "meteor_scores", instead_of_meteor)
    found = score(captions, training, None, tokenizer="ptb")
    assert found["missing"] == NOT_COMPUTED
    for name in ("coco_bleu1", "coco_bleu4", "coco_cider", "coco_rougeL", "coco_meteor"):
        entry = found["scores"][name]
        assert entry["low"] < entry["value"] < entry["high"], name
        assert entry["baselines"]["constant"] < entry["value"], name
        assert entry["baselines"].keys() == {*BASELINES} - {"nearest_image"}
    assert found["scores"]["coco_rougeL"]["value"] != found["scores"]["rougeL"]["value"]


def test_without_java_the_other_scores_are_there_and_the_missing_ones_are_named(captions, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = score(captions, tokenizer="ptb")
    assert "rougeL" in found["scores"]
    assert not [name for name in found["scores"] if name.startswith("coco")]
    assert "install a Java runtime" in found["missing"]["coco_*"]


@pytest.mark.parametrize("model", ["none/none", None])
def test_what_is_missing_of_imageclefs_table_is_named_with_how_to_get_it(captions, model):
    few = Captions(*(column[:3] for column in vars(captions).values()))
    missing = score(few, tokenizer=None, bertscore_model=model)["missing"]
    assert NOT_COMPUTED.keys() <= missing.keys()
    assert ("the weights of none/none are not on this machine" in missing["imageclef_bertscore"]) == bool(model)
    assert max(map(len, NOT_COMPUTED.values())) < 300, "the card would cut it"


def test_the_table_shows_what_is_said_by_modality(scores):
    lines = score_table(scores).splitlines()
    assert "constant: the constant that is best for the score, found among 300 training captions" in lines
    assert f"  {scores['baselines']['constant']['caption']}" in lines and lines[-1] == scores["verdict"]
    heading = next(i for i, line in enumerate(lines) if line.startswith("by modality"))
    assert lines[heading].split()[2:] == list(scores["modalities"])
    rows = {line.split()[0]: line.split()[1:] for line in lines[heading + 1 : heading + 12] if line}
    first = next(iter(scores["modalities"].values()))
    assert rows["rougeL"][0] == in_digits(first["rougeL"])(first["rougeL"]["value"])
    assert rows["concept_f1"][0] == in_digits(first["concept_f1"])(first["concept_f1"]["value"])
    assert {"laterality_f1", "negation_f1", "captions"} <= rows.keys()
