"""The splits and rows that a run uses: what its stages need, as much as it asks for, and the sample for a baseline."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from datasets import Dataset, DatasetDict

from captioning.data.checks import texts, usable
from captioning.data.image_files import FILE
from captioning.data.layout import Layout
from captioning.data.own_data import GROUP, SPLITS
from captioning.errors import UserError


logger = logging.getLogger(__name__)

STAGES = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}  # the flag of each split's stage
DEFAULT_FRACTION = 0.1  # of the rows of data without splits: validation, and as many test
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
        name: of the data set.
        needed: whether each of `STAGES` is needed; UserError if such a split does not exist.
        max_samples: usable rows of each split; None: all.
        with_captions: keep the training split for its captions, which the baselines use.
    """
    for split, flag in STAGES.items():
        if needed[split] and split not in dataset:
            draw = f"draw it from 'train' by --{split}_fraction 0.1" if split != "train" else "add it"
            there = ", ".join(dataset)
            raise UserError(f"dataset '{name}' has no split '{split}', only {there}; {draw}, or set --{flag} false")
    kept = {split for split in STAGES if needed[split]} | ({"train"} if with_captions else set())
    # 2 % and 10 rows more make up for rejected ones
    return DatasetDict({
        split: rows if max_samples[split] is None else rows.take(max_samples[split] * 51 // 50 + 10)
        for split, rows in dataset.items()
        if split in kept
    })  # fmt: skip


def sample_training(dataset: DatasetDict, max_samples: int | None, neighbor_samples: int) -> DatasetDict:
    """Cut the unchecked training split of a run that does not train down to a sample of `neighbor_samples` rows.

    It is drawn from the first `max_samples` rows (None: all); a sample of 0 rows leaves the split out.
    """
    splits = DatasetDict(dataset)
    train = splits.pop("train", None)
    if train and neighbor_samples:
        splits["train"] = train.select(sample_rows(min(len(train), max_samples or len(train)), neighbor_samples))
    return splits


def captions_to_learn(
    dataset: DatasetDict, check: Callable[[], DatasetDict], max_samples: int | None, with_training: bool
) -> Iterator[str]:
    """Yield the captions that a tokenizer is trained on: those that the run trains on, or all where it does not train.

    The rows are checked, by `check`, only when a caption is asked for.
    """
    rows = usable(check()["train"], max_samples) if with_training else dataset["train"]
    yield from texts(rows)[0]


def keep_usable(
    dataset: DatasetDict, max_samples: Mapping[str, int | None], neighbor_samples: int, with_training: bool
) -> DatasetDict:
    """Keep the usable rows of checked splits, `max_samples` of each, and draw `NEIGHBORS` from the training split.

    The training split itself is kept only `with_training`; of 0 `neighbor_samples` there is no such sample.
    """
    splits = DatasetDict({split: usable(rows, max_samples[split]) for split, rows in dataset.items()})
    if "train" in splits and neighbor_samples:
        splits[NEIGHBORS] = splits["train"].select(sample_rows(len(splits["train"]), neighbor_samples))
    if not with_training:
        splits.pop("train", None)
    return splits


def sample_rows(number: int, most: int) -> list[int]:
    """Return up to `most` of `number` row numbers, drawn with a fixed seed and sorted."""
    return sorted(np.random.default_rng(0).permutation(number)[:most].tolist())


# --- Data without splits --------------------------------------------------------------------------------------


def with_splits(splits: Mapping[str, Dataset], name: str, layout: Layout, is_whole: bool) -> dict[str, Dataset]:
    """Draw the validation and test rows that the flags ask for from the training rows; see `draw_splits`.

    From data without splits, which `is_whole` in `train`, `DEFAULT_FRACTION` is drawn for each.

    Raises:
        UserError: such a split is there already, or rows are too few.
    """
    given = {"test": layout.test_fraction, "validation": layout.validation_fraction}
    if is_whole:
        given = {split: DEFAULT_FRACTION if share is None else share for split, share in given.items()}
    fractions = {split: share for split, share in given.items() if share}
    if not fractions:
        return dict(splits)
    if wrong := [split for split in fractions if split in splits or "train" not in splits]:
        there = f"has the splits {', '.join(splits)}"
        raise UserError(f"dataset '{name}' {there}; leave out --{wrong[0]}_fraction, which takes rows from 'train'")
    rows = splits["train"]
    drawn = draw_splits(_keys(rows), fractions, layout.split_seed, f"dataset '{name}'")
    parts = dict(splits) | {split: rows.select(numbers) for split, numbers in drawn.items()}
    parts = {split: parts[split] for split in SPLITS if split in parts}
    sizes = ", ".join(f"{split} {len(part)}" for split, part in parts.items())
    by = "group" if GROUP in rows.column_names else "image"
    logger.info("dataset '%s': %s rows, drawn by %s; see --validation_fraction, --group_column", name, sizes, by)
    return parts


def warn_of_shared_groups(splits: Mapping[str, Dataset]) -> None:
    """Log how many groups of a split are in an earlier one too, as where the data came split by image."""
    earlier: set[str] = set()
    for split in [split for split in SPLITS if split in splits and GROUP in splits[split].column_names]:
        groups = {str(group).strip() for group in splits[split].unique(GROUP) if group is not None} - {""}
        if shared := len(groups & earlier):
            mean = "the scores may be too high"
            logger.warning("%s: %d of %d groups are also in an earlier split: %s", split, shared, len(groups), mean)
        earlier |= groups


def _keys(rows: Dataset) -> list[str]:
    """Return for each row what must not be in two splits: its group, else its file, else its id."""
    columns = [rows[column][:] for column in (GROUP, FILE, "image_id") if column in rows.column_names]
    texts = [["" if value is None else str(value).strip() for value in column] for column in columns]
    if GROUP in rows.column_names and (blank := texts[0].count("")):
        logger.warning("rows without a group: %d; each image of them is a group of its own", blank)
    return [next((f"{kind} {text}" for kind, text in enumerate(row) if text), "") for row in zip(*texts, strict=True)]


def draw_splits(keys: Sequence[str], fractions: Mapping[str, float], seed: int, where: str) -> dict[str, list[int]]:
    """Return the row numbers of `train` and of each split of `fractions`, in order; rows of one key stay together.

    The draw depends on the keys and the seed, not on the order of the rows; UserError if there are too few keys.
    """
    sizes = Counter(keys)
    left = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    split_of: dict[str, str] = {}
    for split, fraction in fractions.items():
        space, chosen = max(1, round(fraction * len(keys))), []
        for key in left:
            if sizes[key] <= space:
                chosen.append(key)
                space -= sizes[key]
        chosen = chosen or sorted(left, key=sizes.get)[:1]  # each group is larger than the split should be
        split_of |= dict.fromkeys(chosen, split)
        left = [key for key in left if key not in split_of]
    if not left:
        mend = " or ".join(f"--{split}_fraction 0" for split in fractions)
        raise UserError(
            f"{where}: {len(sizes)} images or groups are too few for {len(fractions) + 1} splits; set {mend}"
        )
    drawn: dict[str, list[int]] = {split: [] for split in ("train", *fractions)}
    for row, key in enumerate(keys):
        drawn[split_of.get(key, "train")].append(row)
    return drawn
