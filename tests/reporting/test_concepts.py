"""A run that learns concepts, from the script to the page: what it predicts, against what, and how it is shown."""

import numpy as np
import pytest
from datasets import load_from_disk
from helpers import predictions, read_json, score_flags
from sklearn.metrics import f1_score

import run_captioning
from captioning.data.phantoms import CUIS, load_phantoms
from captioning.models.retriever import Retriever
from captioning.reporting import concepts
from captioning.scoring.submission import check_submission


TINY = {
    "num_train_epochs": 8, "learning_rate": 3e-3, "per_device_train_batch_size": 20, "use_cpu": True,
    "coco_metrics": False, "max_new_tokens": 8, "num_beams": 1, "vocab_size": 300, "eval_strategy": "no",
    "load_best_model_at_end": False, "save_strategy": "no", "neighbor_samples": 100, "concept_neighbors": 5,
    "write_submission": True, "dataloader_num_workers": 0, "adam_beta2": 0.999,
}  # fmt: skip


@pytest.fixture(scope="module")
def few_phantoms(tmp_path_factory):
    """A folder of phantoms as `save_to_disk` writes it."""
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    load_phantoms(sizes={"train": 300, "validation": 60, "test": 60}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def finished(config_file, few_phantoms, tmp_path_factory):
    """The output folder and metrics of a whole run of the recipe on few phantoms."""
    folder = tmp_path_factory.mktemp("concepts") / "run"
    values = TINY | {"config_name": config_file, "dataset_name": few_phantoms, "output_dir": folder}
    words = [item for key, value in values.items() for item in (f"--{key}", str(value))]
    return folder, run_captioning.main(["recipes/quickstart_concepts.json", *words])


def official_f1(rows) -> float:
    """The evaluator's loop, written out."""
    scores = []
    for row in rows:
        union = sorted({*row["cui"], *row["concepts"]})
        scores.append(f1_score([cui in row["cui"] for cui in union], [cui in row["concepts"] for cui in union]))
    return float(np.mean(scores))


def test_the_head_beats_the_most_frequent_concepts(finished):
    folder, metrics = finished
    scores = read_json(folder / "scores.json")["test"]["concept_detection"]["systems"]
    assert list(scores) == ["head", "neighbors", "frequent", "captions", "bound"]
    f1 = {name: own["concept_detection_f1"] for name, own in scores.items()}
    assert f1["head"]["value"] == pytest.approx(official_f1(predictions(folder)))
    assert metrics["predict_concept_detection_f1"] == f1["head"]["value"]
    assert f1["head"]["low"] > f1["frequent"]["high"], "the head has learned nothing"
    assert f1["neighbors"]["low"] > f1["frequent"]["high"]
    assert f1["bound"]["value"] == 1
    assert 0 < f1["frequent"]["value"] < 0.6


def test_thresholds_are_chosen_on_validation_and_saved(finished):
    folder, _ = finished
    saved = {row["threshold"] for row in read_json(folder / "concept_head.json")["concepts"]}
    scores = read_json(folder / "scores.json")
    for key in ("head", "neighbors"):
        found = {scores[split]["concept_detection"]["systems"][key]["threshold"] for split in ("validation", "test")}
        assert len(found) == 1 and (key != "head" or found == saved)
    assert read_json(folder / "concept_head.json")["concepts"][0]["name"]


def test_a_saved_head_predicts_the_same_without_training_and_without_validation(
    finished, few_phantoms, tmp_path, monkeypatch
):
    folder, _ = finished
    monkeypatch.setattr(concepts, "choose_thresholds", lambda *args: pytest.fail("chosen on test images"))
    more = {"num_beams": 1, "max_new_tokens": 8, "do_eval": False}
    run_captioning.main(score_flags(folder, few_phantoms, tmp_path / "again", **more))
    columns = [[row["concepts"] for row in predictions(run)] for run in (folder, tmp_path / "again")]
    assert columns[0] == columns[1] and any(columns[0])
    assert not list((tmp_path / "again").glob("concept_head*"))
    found = read_json(tmp_path / "again" / "scores.json")["test"]["concept_detection"]["systems"]
    assert found["neighbors"]["threshold"] == 0.5


def test_a_retriever_finds_the_neighbors_in_place_of_the_model(finished, few_phantoms, tmp_path, monkeypatch):
    """One that looks at nothing but the concepts themselves is never wrong."""
    folder, _ = finished
    encoded = []

    def features(self, images):
        encoded.append([image.size for image in images])
        rows = {300: "train", 60: "validation"}[len(encoded[-1])]
        known = load_from_disk(few_phantoms)[rows]["cui"]
        return np.array([[float(cui in own) for cui in sorted(CUIS.values())] for own in known], dtype=np.float32)

    monkeypatch.setattr(Retriever, "features", features)
    monkeypatch.setattr(Retriever, "from_pretrained", lambda *args: Retriever.__new__(Retriever))
    monkeypatch.setattr(Retriever, "digest", lambda self: "that of the concepts")
    more = {"num_beams": 1, "max_new_tokens": 8, "do_predict": False, "retriever": tmp_path}
    run_captioning.main(score_flags(folder, few_phantoms, tmp_path / "run", **more))
    scores = read_json(tmp_path / "run" / "scores.json")["validation"]["concept_detection"]["systems"]
    assert scores["neighbors"]["concept_detection_f1"]["value"] == 1
    assert [(len(sizes), *set(sizes)) for sizes in encoded] == [(300, (96, 96)), (60, (96, 96))]


def test_summary_card_page_and_submission_have_the_concepts(finished, capsys):
    folder, _ = finished
    card, page = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    for text in ("| concept head | ", "| nearest training images | ", "| most frequent concepts | "):
        assert text in card
    for text in ("<h3>Concept detection</h3>", "flatters the scores", "C0040405 computed tomography", "missed: "):
        assert text in page
    assert check_submission(str(folder / "submission_concepts.csv")) == []
    lines = (folder / "submission_concepts.csv").read_text().splitlines()
    rows = predictions(folder)
    assert lines[1:] == [f"{row['image_id']},{';'.join(sorted(row['concepts']))}" for row in rows]
