"""Which splits and rows a run uses, and the sample of training images for a baseline."""

import pytest
from datasets import DatasetDict
from helpers import make_rows

from captioning.data.checks import check_rows
from captioning.data.splits import NEIGHBORS, keep_usable, sample_rows, sample_training, select_splits
from captioning.errors import UserError


ALL = {"train": None, "validation": None, "test": None}
NEEDED = {"train": True, "validation": True, "test": False}


def lengths(splits: DatasetDict) -> dict[str, int]:
    return {split: len(rows) for split, rows in splits.items()}


def test_only_the_splits_that_are_needed_are_kept(raw_dataset):
    assert lengths(select_splits(raw_dataset, "x", NEEDED, ALL, with_captions=True)) == {"train": 24, "validation": 10}
    scores = {"train": False, "validation": False, "test": True}
    assert lengths(select_splits(raw_dataset, "x", scores, ALL, with_captions=True)) == {"test": 7, "train": 24}
    assert lengths(select_splits(raw_dataset, "x", scores, ALL, with_captions=False)) == {"test": 7}


def test_few_more_rows_are_checked_than_a_trial_run_uses(raw_dataset):
    limits = ALL | {"train": 5, "validation": 1000}
    assert lengths(select_splits(raw_dataset, "x", NEEDED, limits, False)) == {"train": 15, "validation": 10}


def test_a_missing_split_is_named_with_the_flag_that_leaves_it_out(raw_dataset):
    with pytest.raises(UserError, match=r"^dataset 'x' has no split 'validation', only train; .* --do_eval false"):
        select_splits(DatasetDict(train=raw_dataset["train"]), "x", NEEDED, ALL, False)


def test_the_sample_is_drawn_from_the_usable_rows_that_are_trained_on(tmp_path):
    dataset = DatasetDict(train=make_rows(20, caption=["", *(f"caption {i}" for i in range(19))]))
    checked = check_rows(dataset, 0.1, tmp_path / "rejected.jsonl")
    splits = keep_usable(checked, {"train": 12}, 5, with_training=True)
    assert lengths(splits) == {"train": 12, NEIGHBORS: 5}
    assert set(splits[NEIGHBORS]["image_id"]) < set(splits["train"]["image_id"])
    assert lengths(keep_usable(checked, {"train": 12}, 0, with_training=True)) == {"train": 12}


def test_a_run_that_does_not_train_checks_no_more_than_the_sample(raw_dataset, tmp_path):
    sampled = sample_training(raw_dataset, 15, 5)
    assert lengths(sampled) == {"validation": 10, "test": 7, "train": 5}
    assert set(sampled["train"]["image_id"]) < set(raw_dataset["train"]["image_id"][:15])
    splits = keep_usable(check_rows(sampled, 0.0, None), ALL, 5, with_training=False)
    assert list(splits) == ["validation", "test", NEIGHBORS]
    assert splits[NEIGHBORS]["image_id"][:] == sampled["train"]["image_id"][:]
    assert "train" not in sample_training(raw_dataset, 15, 0)


def test_a_sample_of_rows_is_fixed_and_sorted():
    assert sample_rows(5, 10) == [0, 1, 2, 3, 4]
    assert sample_rows(1000, 10) == sorted(sample_rows(1000, 10)) == sample_rows(1000, 10)
    assert len(set(sample_rows(1000, 10))) == 10
    assert sample_rows(1000, 10) != list(range(10)), "the first rows may be alike"
    assert sample_rows(5, 0) == []
