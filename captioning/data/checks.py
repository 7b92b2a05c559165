"""TODO."""

import contextlib
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets

from captioning.data.images import open_image
from captioning.data.zenodo import UNUSABLE
from captioning.errors import UserError
from captioning.files import write_whole


logger = logging.getLogger(__name__)
CLEAN_COLUMNS = Features(
    {
        "image_id": Value("string"),
        "caption": Value("string"),
        "cui": List(Value("string")),
        "rejected": Value("string"),  # why the row cannot be used, null where it can
    }
)
CHECK_BATCH_SIZE = 64  # rows whose images are in memory at once
MAX_CAPTION = 100_000  # characters; ROCOv2's longest has about 7,000
MAX_ID = 1000  # characters; an id stands in logs, pages and submissions
COLUMN_BATCH_SIZE = 1000  # rows of which a text column is in memory at once


# --- Checks ---------------------------------------------------------------------------------------------------


def check_rows(
    dataset: DatasetDict,
    max_rejected_fraction: float,
    rejected_file: str | os.PathLike | None,
    num_proc: int | None = None,
    unopened: Sequence[str] = (),
) -> DatasetDict:
    """Decode every image once and mark the rows that cannot be used: in `rejected`, with the reason.

    Args:
        dataset: what `load_source` returned.
        max_rejected_fraction: of each split, from 0 to 1.
        rejected_file: where the marked rows are listed, one JSON object a line; None lists them nowhere.
        num_proc: processes; the result is cached by `datasets`.
        unopened: splits whose texts alone are checked, because their images are streamed into the training.

    Returns:
        The same rows with the columns `image` and those of `CLEAN_COLUMNS`.

    Raises:
        UserError: a split is empty, has no usable row, or more rejected ones than `max_rejected_fraction` allows.
    """
    if not 0 <= max_rejected_fraction <= 1:
        raise UserError(f"max_rejected_fraction is {max_rejected_fraction}; set it from 0 to 1")
    for split, rows in dataset.items():
        if not len(rows):
            raise UserError(f"split '{split}' is empty; add rows or leave it out")
    checked = DatasetDict(
        {split: _check_split(rows, split, num_proc, split not in unopened) for split, rows in dataset.items()}
    )
    listed = f"see {rejected_file or 'rejected.jsonl'}"
    reasons: dict[str, Counter[str]] = {split: Counter() for split in checked}
    # Only of what is left out, which is little, or the end of the run
    entries = _streamed_entries(rejected_file, unopened) if rejected_file else []
    for split, rows in checked.items():
        for row, (image_id, reason) in enumerate(_columns(rows, "image_id", "rejected")):
            if reason:
                entries.append({"split": split, "row": row, "image_id": image_id[:MAX_ID], "reason": reason})
                reasons[split][reason.split(":")[0]] += 1
    if rejected_file is not None:
        write_whole(Path(rejected_file), "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    for split, rows in checked.items():
        counts = reasons[split]
        number = counts.total()
        if number == len(rows):
            raise UserError(f"split '{split}' has no usable row out of {len(rows)}; {listed}")
        summary = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))
        if number > max_rejected_fraction * len(rows):
            raise UserError(
                f"split '{split}': {number} of {len(rows)} rows cannot be used ({summary}); {listed}, "
                f"or raise --max_rejected_fraction above {max_rejected_fraction:g}"
            )
        if number:
            logger.warning("%s: %d of %d rows left out (%s)", split, number, len(rows), summary)
    _warn_of_leaks(checked)
    return checked


def _streamed_entries(rejected_file: str | os.PathLike, unopened: Sequence[str]) -> list[dict[str, Any]]:
    """Return what an interrupted run has listed of images that it streamed: the run that goes on skips those rows."""
    try:
        lines = Path(rejected_file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # there is none, or it is not ours
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a run that was killed may leave half a line
            entry = json.loads(line)
            entries += [entry] if entry["split"] in unopened and "row" not in entry else []
    return entries


def texts(rows: Dataset) -> tuple[list[str], list[list[str]]]:
    """Return captions and concepts of the rows that have a caption; no image is read."""
    columns = rows.select_columns([column for column in ("caption", "cui") if column in rows.column_names])[:]
    cuis = columns.get("cui") or [None] * len(rows)
    kept = [(text, cui) for text, cui in zip(columns["caption"], cuis, strict=True) if not _is_blank(text)]
    return [str(text) for text, _ in kept], [_clean_cui(cui) for _, cui in kept]


def usable(rows: Dataset, max_samples: int | None = None) -> Dataset:
    """Return the first `max_samples` rows (default: all) that `check_rows` did not mark."""
    keep = np.flatnonzero(np.fromiter((not reason for (reason,) in _columns(rows, "rejected")), bool, len(rows)))
    keep = keep[:max_samples]
    all_of_them = len(keep) and keep[-1] == len(keep) - 1  # a range needs no table of indices
    return rows.select(range(len(keep)) if all_of_them else keep).remove_columns("rejected")


def _check_split(rows: Dataset, split: str, num_proc: int | None, open_images: bool) -> Dataset:
    columns = rows.column_names
    checked = rows.map(
        _check_batch,
        batched=True,
        batch_size=CHECK_BATCH_SIZE,
        fn_kwargs={"open_images": open_images},
        num_proc=num_proc,
        remove_columns=columns,
        features=CLEAN_COLUMNS,
        desc=f"Checking {split}",
    )
    return concatenate_datasets([rows.select_columns("image"), _mark_repeated(checked, split)], axis=1)


def _check_batch(batch: dict[str, list[Any]], open_images: bool) -> dict[str, list[Any]]:
    clean: dict[str, list[Any]] = {column: [] for column in CLEAN_COLUMNS}
    cuis = batch.get("cui") or [None] * len(batch["image_id"])
    images = batch["image"] if open_images else [None] * len(batch["image_id"])
    unusable_rows = batch.get(UNUSABLE) or [None] * len(batch["image_id"])
    columns = (images, batch["image_id"], batch["caption"], cuis, unusable_rows)
    for image, image_id, caption, cui, known in zip(*columns, strict=True):
        clean["image_id"].append("" if image_id is None else str(image_id))
        clean["caption"].append("" if caption is None else str(caption))
        clean["cui"].append(_clean_cui(cui))
        clean["rejected"].append(
            _reason_to_reject(image, clean["image_id"][-1], clean["caption"][-1], known, open_images)
        )
    return clean


def _reason_to_reject(
    image: dict[str, Any] | None, image_id: str, caption: str, known: str | None, open_images: bool
) -> str | None:
    if not image_id.strip():
        return "blank image_id"
    if len(image_id) > MAX_ID:
        return "overlong image_id"
    if _is_blank(caption):
        return "blank caption"
    if len(caption) > MAX_CAPTION:
        return "overlong caption"
    if known:
        return known
    try:
        if open_images:
            open_image(image)
    except ValueError as error:
        return f"unreadable image: {error}"
    return None


def _is_blank(caption: str | None) -> bool:
    """Tell whether a caption prints nothing: separators, controls, format characters; one of ROCOv2 is only U+202F."""
    return all(unicodedata.category(character)[0] in "ZC" for character in str(caption or ""))


def _clean_cui(cui: list[str] | str | None) -> list[str]:
    """Return the concepts as a list; the Hub's ROCOv2 says "no concept" by the literal `["nan"]`."""
    concepts = cui.split(";") if isinstance(cui, str) else cui if isinstance(cui, list) else [cui]
    concepts = [str(concept).strip() for concept in concepts if concept is not None]
    return [concept for concept in concepts if concept and concept.lower() != "nan"]


def _mark_repeated(checked: Dataset, split: str) -> Dataset:
    """Mark each usable row whose `image_id` an earlier usable row of the split has."""
    hashes = _hashes(checked)
    values, counts = np.unique(hashes, return_counts=True)
    suspects = np.isin(hashes, values[counts > 1])  # only of these, few, the ids themselves are remembered
    seen: set[str] = set()
    repeated = []
    for row, (suspect, (image_id, reason)) in enumerate(
        zip(suspects, _columns(checked, "image_id", "rejected"), strict=True)
    ):
        if suspect and reason is None:
            repeated += [row] if image_id in seen else []
            seen.add(image_id)
    # In larger batches, too: each one that a table was written in costs kilobytes, for as long as it is open
    return checked.map(
        _mark_batch,
        with_indices=True,
        batched=True,
        batch_size=COLUMN_BATCH_SIZE,
        fn_kwargs={"repeated": set(repeated)},
        features=CLEAN_COLUMNS,
        desc=f"Seeking repeated ids in {split}",
    )


def _mark_batch(batch: dict[str, list[Any]], rows: list[int], repeated: set[int]) -> dict[str, list[Any]]:
    reasons = zip(rows, batch["rejected"], strict=True)
    return {"rejected": ["repeated image_id" if row in repeated else reason for row, reason in reasons]}


def _columns(rows: Dataset, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns row by row; in memory are no more than `COLUMN_BATCH_SIZE` of them."""
    for batch in rows.select_columns(list(names)).iter(COLUMN_BATCH_SIZE):
        yield from zip(*(batch[name] for name in names), strict=True)


def _hashes(rows: Dataset) -> np.ndarray:
    """Return int64 `[N]` for the image ids: eight bytes a row, where a set of ids takes over a hundred."""
    return np.fromiter((hash(image_id) for (image_id,) in _columns(rows, "image_id")), np.int64, len(rows))


def _warn_of_leaks(checked: DatasetDict) -> None:
    train = _hashes(checked["train"]) if "train" in checked else np.array([], dtype=np.int64)
    for split, rows in checked.items():
        shared = len(np.intersect1d(train, _hashes(rows))) if split != "train" else 0
        if shared:
            logger.warning(
                "%d image ids of split '%s' are in split 'train' too; if they are the same images, "
                "the scores on '%s' are flattered",
                shared,
                split,
                split,
            )
