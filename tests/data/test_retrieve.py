"""Who is retrieved: the nearest used training images, never the image itself; and features that are computed once."""

import copy
import json
from argparse import Namespace

import numpy as np
import pytest
from datasets import DatasetDict, load_from_disk
from families import save_vision_model
from helpers import make_png, make_rows
from safetensors.numpy import load_file, save_file
from source_files import undecoded, write_images, write_table

from captioning.__main__ import main
from captioning.data import neighbors
from captioning.data import retrieve as module
from captioning.data.checks import check_rows, usable
from captioning.data.layout import Layout
from captioning.data.neighbors import Pool, Retrieval, nearest_rows
from captioning.data.retrieve import cached_features, retrieve
from captioning.data.sources import load_source
from captioning.errors import UserError
from captioning.models.retriever import Retriever


def brute_force(features, others, number, keys):
    """One image at a time, by a stable sort."""
    mean, found = others.mean(axis=0), []
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (features - mean, others - mean)]
    for row, cosines in enumerate(unit[0] @ unit[1].T):
        allowed = [i for i in range(len(others)) if not any(own[row] and own[row] == all_[i] for own, all_ in keys)]
        found.append(sorted(allowed, key=lambda i: -cosines[i])[:number])
    return found


def test_the_nearest_are_those_of_a_sort_without_those_of_the_same_value_in_any_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    features, others = rng.normal(size=(23, 6)), rng.normal(size=(40, 6))
    keys = [([str(i) for i in range(23)], [str(i) for i in range(40)])]
    keys += [(rng.integers(0, 6, 23).tolist(), rng.integers(0, 6, 40).tolist())]  # 0 is unknown here
    expected = brute_force(features, others, 4, keys)
    for cosines in (2**26, 40 * 5, 1):
        monkeypatch.setattr(neighbors, "MAX_COSINES", cosines)
        assert nearest_rows(features, others, 4, [(own, all_) for own, all_ in _without_zero(keys)]) == expected
    assert nearest_rows(features, others, 4) == brute_force(features, others, 4, []) != expected


def _without_zero(keys):
    return [([value or None for value in own], [value or None for value in others]) for own, others in keys]


def test_of_equal_images_the_first_are_taken_and_fewer_than_asked_for_where_there_are_no_more():
    others = np.array([[1.0, 0], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    assert nearest_rows(others[:2], others, 2) == [[0, 2], [1, 0]]
    assert nearest_rows(others[:1], others, 9, [(["a"], ["a", "a", "", "b"])]) == [[2, 3]]
    assert nearest_rows(others[:1], others, 3, [(["a"], ["a"] * 4)]) == [[]]


@pytest.fixture
def retriever(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return Retriever.from_pretrained(save_vision_model(tmp_path / "vit"))


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of images that a retriever was given, call by call."""
    counts, features = [], Retriever.features

    def counting(self, images):
        images = list(images)
        counts.append(len(images))
        return features(self, images)

    monkeypatch.setattr(Retriever, "features", counting)
    return counts


def test_an_image_is_encoded_once_in_all_splits_and_runs(checked, retriever, encoded, tmp_path):
    train, test = (usable(checked[split]) for split in ("train", "test"))
    found = cached_features(retriever, train)
    plain = retriever.features(module.open_image(row["image"]) for row in train)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)
    del encoded[:]
    again = Retriever.from_pretrained(str(tmp_path / "vit"))  # as another run
    np.testing.assert_array_equal(cached_features(again, train), found)
    np.testing.assert_array_equal(cached_features(again, train.select([5, 2, 5])), found[[5, 2, 5]])
    assert encoded == []
    cached_features(again, test)
    assert encoded == [len(test)]
    unopened = train.select([1, 0]).remove_columns("pixels").add_column("pixels", [None, None])
    np.testing.assert_allclose(cached_features(again, unopened), found[[1, 0]], rtol=0, atol=1e-5)
    assert encoded == [len(test), 2], "what has no pixels to be known by is encoded each time"


def test_another_retriever_has_features_of_its_own(checked, retriever, tmp_path):
    rows = usable(checked["test"])
    other = Retriever.from_pretrained(save_vision_model(tmp_path / "other", seed=1))
    assert np.abs(cached_features(other, rows) - cached_features(retriever, rows)).max() > 0.1
    larger = copy.deepcopy(retriever)
    larger.processor.image_mean = [0.1, 0.1, 0.1]
    assert larger.digest() != retriever.digest() != other.digest()


def test_a_damaged_cache_is_written_anew(checked, retriever, encoded, tmp_path):
    rows = usable(checked["test"])
    found = cached_features(retriever, rows)
    file = next((tmp_path / "cache").glob("*.safetensors"))
    for damage in (
        lambda: file.write_bytes(file.read_bytes()[:99]),
        lambda: save_file({"pixels": np.arange(3), "features": found[:2]}, file),
    ):
        damage()
        del encoded[:]
        for _ in range(2):
            np.testing.assert_array_equal(cached_features(retriever, rows), found)
        assert encoded == [len(rows)] and len(load_file(file)["features"]) == len(rows)


def test_a_cache_that_cannot_be_written_is_done_without(checked, retriever, tmp_path, monkeypatch, caplog):
    rows = usable(checked["test"])
    found = cached_features(retriever, rows)
    (tmp_path / "file").write_text("no folder can be made here")
    monkeypatch.setattr(module, "CACHE", tmp_path / "file/cache")
    np.testing.assert_array_equal(cached_features(retriever, rows), found)
    assert "features of images cannot be cached, the next run computes them again: [Errno 20]" in caplog.text


def run_args(folder, **values):
    defaults = {"retriever": str(folder), "retriever_revision": None, "device": "cpu", "retrieve_across_groups": False}
    return Namespace(**defaults | {"retrieved_captions": 3} | values)


@pytest.fixture
def grouped(tmp_path):
    """Checked splits with groups, a rejected row, and copies of a test image in training under another id."""
    train, test = make_rows(12), make_rows(4, 100)
    images = [{"bytes": make_png(i), "path": None} for i in range(12)]
    images[7], images[8] = ({"bytes": make_png(100), "path": None} for _ in range(2))
    images[3] = {"bytes": b"broken", "path": None}
    train = make_rows(12, image=images).add_column("group", [1, 1, 1, 2, 2, 3, 3, 4, 4, None, None, 5])
    splits = undecoded(train=train, test=test.add_column("group", [9, 1, None, 5]))
    return check_rows(splits, 0.2, tmp_path / "rejected.jsonl")


def test_no_image_gets_captions_of_itself_its_copies_its_group_or_of_images_that_are_not_used(
    grouped, retriever, tmp_path
):
    splits, pool = retrieve(grouped, run_args(tmp_path / "vit", retrieved_captions=11), dict(train=10, test=3))
    train, test = splits["train"], splits["test"]
    used = [f"image_{i:04d}" for i in range(11) if i != 3]
    assert pool.image_ids == used and len(pool.captions) == len(pool.features) == 10
    groups = dict(zip(train["image_id"], train["group"], strict=True))
    for row in train:
        if row["image_id"] not in used:
            assert row["retrieved"] == row["retrieved_ids"] == []
            continue
        own, group = row["image_id"], groups[row["image_id"]]
        expected = {i for i in used if i != own and (group is None or groups[i] != group)}
        assert set(row["retrieved_ids"]) == expected
    known = dict(zip(pool.image_ids, pool.captions, strict=True))
    for rows in (train, test):
        assert [[known[i] for i in ids] for ids in rows["retrieved_ids"]] == rows["retrieved"][:]
    assert set(test[0]["retrieved_ids"]) == set(used) - {"image_0007", "image_0008"}, "the same pixels"
    assert set(test[1]["retrieved_ids"]) == set(used) - {f"image_{i:04d}" for i in range(3)}
    assert set(test[2]["retrieved_ids"]) == set(used)
    assert test[3]["retrieved_ids"] == [], "it is not used"
    across, _ = retrieve(
        grouped, run_args(tmp_path / "vit", retrieved_captions=11, retrieve_across_groups=True), dict(train=10, test=3)
    )
    assert set(across["test"][1]["retrieved_ids"]) == set(used)
    assert set(across["train"][0]["retrieved_ids"]) == set(used) - {"image_0000"}


def test_groups_of_a_table_reach_the_retrieval_and_are_not_stored_by_prepare(retriever, tmp_path):
    write_images(tmp_path, *(f"{i}.png" for i in range(12)))
    rows = [{"file_name": f"{i}.png", "caption": f"caption {i}", "patient": i // 3} for i in range(12)]
    write_table(tmp_path / "labels.csv", *rows)
    layout = Layout(validation_fraction=0.25, test_fraction=0)
    checked = check_rows(load_source(str(tmp_path / "labels.csv"), layout=layout), 0, None)
    splits, _ = retrieve(checked, run_args(tmp_path / "vit", retrieved_captions=9), dict(train=None, validation=None))
    for row in splits["train"]:
        patient = {f"{3 * (int(row['image_id'].split('.')[0]) // 3) + i}.png" for i in range(3)}
        assert len(row["retrieved_ids"]) == 6 and not patient.intersection(row["retrieved_ids"])
    main(["prepare", str(tmp_path / "labels.csv"), str(tmp_path / "stored"), "--group_column", "patient"])
    assert "group" not in load_from_disk(tmp_path / "stored")["train"].column_names


def test_data_without_a_training_split_is_a_line(grouped, tmp_path):
    with pytest.raises(UserError, match="retrieved_captions: the data has no split 'train' to retrieve from"):
        retrieve(DatasetDict(test=grouped["test"]), run_args(tmp_path), {})


def test_a_stored_pool_finds_for_ones_own_images_what_the_run_found(grouped, retriever, tmp_path):
    splits, pool = retrieve(grouped, run_args(tmp_path / "vit"), dict(train=None, test=None))
    pool.save(tmp_path / "retrieval")
    stored = Pool.load(tmp_path / "retrieval")
    rows = splits["test"].select([0, 2])
    images = [module.open_image(row["image"]) for row in rows]
    assert Retrieval(stored, retriever, 3).captions(images) == rows["retrieved"][:]
    assert "group" not in json.loads((tmp_path / "retrieval/captions.json").read_text())[0]
    other = Retriever.from_pretrained(save_vision_model(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="retriever is another than that of the run"):
        Retrieval(stored, other, 3)
    texts = json.loads((tmp_path / "retrieval/captions.json").read_text())
    (tmp_path / "retrieval/captions.json").write_text(json.dumps(texts[1:]))  # those of another run
    with pytest.raises(UserError, match="are not of the same images; remove it to caption without"):
        Pool.load(tmp_path / "retrieval")
    (tmp_path / "retrieval/captions.json").write_text("{")
    with pytest.raises(UserError, match=r"retrieval' cannot be read: .*; remove it to caption without"):
        Pool.load(tmp_path / "retrieval")


def test_without_retrieved_captions_splits_are_left_as_they_are(grouped):
    assert retrieve(grouped, run_args("nowhere", retrieved_captions=0), {})[0] is grouped
