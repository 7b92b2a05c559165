"""The splits and rows that a run uses: what its stages need, as much as it asks for, and the sample for a baseline."""

from collections.abc import Mapping

import numpy as np
from datasets import Dataset, DatasetDict

from captioning.data.checks import usable
from captioning.errors import UserError


STAGES = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}  # the flag of each split's stage
NEIGHBORS = "neighbors"  # the training images among which a baseline seeks the nearest


def select_splits(
    dataset: DatasetDict,
    name: str,
    needed: Mapping[str, bool],
    max_samples: Mapping[str, int | None],
    with_captions: bool,
) -> DatasetDict:
    """Keep the splits that the stages of a run need, and of their unchecked rows few more than it uses.

    Args:
        dataset: what `load_source` returned for `name`.
        name: for the error.
        needed: whether each of `STAGES` is needed.
        max_samples: usable rows of each split; None: all.
        with_captions: also keep a training split that no stage needs; the baselines are made of its captions.

    Raises:
        UserError: a needed split does not exist.
    """
    for split, flag in STAGES.items():
        if needed[split] and split not in dataset:
            there = ", ".join(dataset)
            raise UserError(f"dataset '{name}' has no split '{split}', only {there}; add it or set --{flag} false")
    kept = [split for split in STAGES if needed[split]]
    if with_captions and "train" in dataset and "train" not in kept:
        kept.append("train")
    return DatasetDict({split: _enough(dataset[split], max_samples[split]) for split in kept})


def _enough(rows: Dataset, max_samples: int | None) -> Dataset:
    """Return the first rows of a split: 2 % and 10 more than `max_samples` make up for rejected ones."""
    return rows if max_samples is None else rows.take(max_samples * 51 // 50 + 10)


def sample_training(dataset: DatasetDict, max_samples: int | None, neighbor_samples: int) -> DatasetDict:
    """Cut the unchecked training split of a run that does not train down to the rows of `NEIGHBORS`.

    Args:
        dataset: unchecked splits.
        max_samples: rows of the training split that count; None: all.
        neighbor_samples: rows of the sample at most; 0 leaves the split out.
    """
    splits = DatasetDict(dataset)
    if "train" in splits:
        train = splits.pop("train")
        if neighbor_samples:
            splits["train"] = train.select(sample_rows(min(len(train), max_samples or len(train)), neighbor_samples))
    return splits


def keep_usable(
    dataset: DatasetDict, max_samples: Mapping[str, int | None], neighbor_samples: int, with_training: bool
) -> DatasetDict:
    """Keep the usable rows of checked splits, and draw `NEIGHBORS` from those of the training split.

    Args:
        dataset: what `check_rows` returned.
        max_samples: rows of each split at most; None: all.
        neighbor_samples: rows of the sample at most; 0: there is none.
        with_training: keep the training split itself too.
    """
    splits = DatasetDict({split: usable(rows, max_samples[split]) for split, rows in dataset.items()})
    if "train" in splits:
        train = splits["train"] if with_training else splits.pop("train")
        if neighbor_samples:
            splits[NEIGHBORS] = train.select(sample_rows(len(train), neighbor_samples))
    return splits


def sample_rows(number: int, most: int) -> list[int]:
    """Return up to `most` of `number` row numbers, drawn with a fixed seed and sorted."""
    return sorted(np.random.default_rng(0).permutation(number)[:most].tolist())
