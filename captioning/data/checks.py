"""Which rows can be used: every image is decoded once, every text looked at, and the others are marked with a reason.

Only small columns are written: they are joined to the memory-mapped table of images, which is never copied.
"""

import contextlib
import json
import logging
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from captioning.data import dicom, images
from captioning.data.dicom import burned_in, installed_decoders
from captioning.data.images import MISSING, open_image, pixel_hash
from captioning.data.own_data import GROUP
from captioning.data.zenodo import UNUSABLE
from captioning.errors import UserError
from captioning.files import write_whole
from captioning.stages import stage


logger = logging.getLogger(__name__)
CLEAN_COLUMNS = Features(
    {
        "image_id": Value("string"),
        "caption": Value("string"),
        "cui": List(Value("string")),
        "pixels": Value("int64"),  # `pixel_hash`, null where the image was not opened
        "rejected": Value("string"),  # why the row cannot be used, null where it can
        # Of an image that was opened
        "burned_in": Value("bool"),  # whether the header of a DICOM says so
        "width": Value("int32"),
        "height": Value("int32"),
        "mode": Value("string"),
    }
)
ABOUT_IMAGES = ["burned_in", "width", "height", "mode"]  # columns that nothing trains on
MAX_CAPTION = 100_000  # characters; ROCOv2's longest has about 7,000
MAX_ID = 1000  # characters; ids appear in logs, pages and submissions


@stage("checks")
def check_rows(
    dataset: DatasetDict,
    max_rejected_fraction: float,
    rejected_file: str | os.PathLike | None,
    num_proc: int | None = None,
    unopened: Sequence[str] = (),
) -> DatasetDict:
    """Decode every image once and mark the rows that cannot be used, with the reason.

    Args:
        dataset: what `load_source` returned.
        max_rejected_fraction: of each split, from 0 to 1; UserError if more, or all, are marked.
        rejected_file: where the marked rows are listed, one JSON object a line, if anywhere.
        num_proc: processes. The result is cached; see `_depends` for what is checked again.
        unopened: splits whose images are not opened, because the training streams them.

    Returns:
        The rows with `image`, `group` if they have one, and `CLEAN_COLUMNS` without `ABOUT_IMAGES`.
    """
    checked = DatasetDict(
        {split: mark_rows(rows, split, num_proc, split not in unopened) for split, rows in dataset.items()}
    )
    rejected = {split: _rejected(rows, split) for split, rows in checked.items()}
    if rejected_file is not None:
        # A run that resumes skips the streamed images that the interrupted one has listed
        known = [entry for entry in read_rejected(rejected_file) if entry["split"] in unopened and "row" not in entry]
        entries = sum(rejected.values(), start=known)
        write_whole(Path(rejected_file), "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    for split, found in rejected.items():
        if found:
            _report(found, split, len(checked[split]), max_rejected_fraction, rejected_file or "rejected.jsonl")
        if burned := pc.sum(column(checked[split], "burned_in")).as_py():
            what = "have text burned into the pixels, as their headers say: it may name patients"
            logger.warning("%s: %d of %d images %s", split, burned, len(checked[split]), what)
    return checked.remove_columns(ABOUT_IMAGES)


def _rejected(rows: Dataset, split: str) -> list[dict[str, Any]]:
    reasons = zip(column(rows, "image_id").to_pylist(), column(rows, "rejected").to_pylist(), strict=True)
    return [
        {"split": split, "row": row, "image_id": image_id[:MAX_ID], "reason": reason}
        for row, (image_id, reason) in enumerate(reasons)
        if reason
    ]


def _report(
    found: list[dict[str, Any]], split: str, number: int, max_fraction: float, listed: str | os.PathLike
) -> None:
    """Log the rejected rows of a split, or raise UserError if they are more than `max_fraction` of `number`."""
    summary = reasons_in_words(found)
    if len(found) == number:
        raise UserError(f"split '{split}' has no usable row out of {number} ({summary}); see {listed}")
    if len(found) > max_fraction * number:
        mend = f"see {listed}, or raise --max_rejected_fraction above {max_fraction:g}"
        raise UserError(f"split '{split}': {len(found)} of {number} rows cannot be used ({summary}); {mend}")
    logger.warning("%s: %d of %d rows left out (%s)", split, len(found), number, summary)


def read_rejected(rejected_file: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the entries of a list of rejected rows, none if there is no list."""
    entries, path = [], Path(rejected_file)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of half a line, or one that is no entry
            entry = json.loads(line)
            entries.append(entry | {key: str(entry[key]) for key in ("split", "reason")})
    return entries


def reasons_in_words(entries: Sequence[dict[str, Any]]) -> str:
    """Return the three commonest reasons of rejected rows: "2 x blank caption, 1 x repeated image_id"."""
    reasons = Counter(entry["reason"].split(":")[0] for entry in entries).most_common(3)
    return ", ".join(f"{count:,} x {reason}" for reason, count in reasons)


def texts(rows: Dataset) -> tuple[list[str], list[list[str]]]:
    """Return captions and concepts of the rows that have a caption; no image is read."""
    columns = rows.select_columns([name for name in ("caption", "cui") if name in rows.column_names])[:]
    cuis = columns.get("cui") or [None] * len(rows)
    kept = [(text, cui) for text, cui in zip(columns["caption"], cuis, strict=True) if not _is_blank(text)]
    return [str(text) for text, _ in kept], [_clean_cui(cui) for _, cui in kept]


def usable(rows: Dataset, max_samples: int | None = None) -> Dataset:
    """Return the first `max_samples` rows (default: all) that `check_rows` did not mark."""
    keep = usable_rows(rows, max_samples)
    is_range = len(keep) and keep[-1] == len(keep) - 1  # `select` writes no table of indices for a range
    return rows.select(range(len(keep)) if is_range else keep).remove_columns("rejected")


def usable_rows(rows: Dataset, max_samples: int | None = None) -> np.ndarray:
    """Return the numbers of the rows of `usable`."""
    return np.flatnonzero(column(rows, "rejected").is_null())[:max_samples]


def mark_rows(rows: Dataset, split: str, num_proc: int | None = None, open_images: bool = True) -> Dataset:
    """Return the rows of a split with the columns `image`, `group` if it has one, and `CLEAN_COLUMNS`."""
    checked = rows.map(
        _check_row,
        fn_kwargs={"open_images": open_images},
        num_proc=num_proc,
        remove_columns=rows.column_names,
        features=CLEAN_COLUMNS,
        new_fingerprint=Hasher.hash((rows._fingerprint, *_depends(rows, open_images))),
        desc=f"Checking {split}",
    )
    kept = [name for name in ("image", GROUP) if name in rows.column_names]
    return concatenate_datasets([rows.select_columns(kept), _mark_repeated(checked)], axis=1)


def _mark_repeated(checked: Dataset) -> Dataset:
    """Mark the usable rows whose `image_id` an earlier usable row of the split has."""
    kept = usable_rows(checked)
    codes = column(checked, "image_id").dictionary_encode().indices.to_numpy()[kept]
    reasons = column(checked, "rejected").to_pylist()
    for row in np.delete(kept, np.unique(codes, return_index=True)[1]):
        reasons[row] = "repeated image_id"
    return checked.remove_columns("rejected").add_column("rejected", reasons, feature=Value("string"))


def _depends(rows: Dataset, open_images: bool) -> list[Any]:
    """Return what the check depends on, beside the table, that `datasets` does not look at."""
    found: list[Any] = [Path(module.__file__).read_bytes() for module in (dicom, images, sys.modules[__name__])]
    if open_images and isinstance(rows.features["image"], Image):
        content, paths = (pc.struct_field(rows.data.column("image"), name) for name in ("bytes", "path"))
        is_read = content.is_null()
        if UNUSABLE in rows.column_names:
            is_read = pc.and_(is_read, rows.data.column(UNUSABLE).is_null())
        for path in paths.filter(is_read).drop_null().to_pylist():
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(path)
                found.append((path, status.st_size, status.st_mtime_ns))
    return [PIL.__version__, *installed_decoders(), open_images, *found]


def _check_row(row: Mapping[str, Any], open_images: bool) -> dict[str, Any]:
    """Return the texts of a row, the reason to reject it if there is one, and what is known of its opened image."""
    clean: dict[str, Any] = dict.fromkeys(CLEAN_COLUMNS)
    for name in ("image_id", "caption"):
        clean[name] = "" if row[name] is None else str(row[name])
    clean["cui"] = _clean_cui(row.get("cui"))
    clean["rejected"] = _fault_of_texts(clean["image_id"], clean["caption"]) or row.get(UNUSABLE)
    if open_images and not clean["rejected"]:
        try:
            image = open_image(row["image"])
        except ValueError as error:
            clean["rejected"] = MISSING if str(error) == MISSING else f"unreadable image: {error}"
        else:
            clean["pixels"], clean["burned_in"] = pixel_hash(image), burned_in(image)
            (clean["width"], clean["height"]), clean["mode"] = image.size, image.mode
    return clean


def _fault_of_texts(image_id: str, caption: str) -> str | None:
    if not image_id.strip():
        return "blank image_id"
    if len(image_id) > MAX_ID:
        return "overlong image_id"
    if _is_blank(caption):
        return "blank caption"
    return "overlong caption" if len(caption) > MAX_CAPTION else None


def _is_blank(caption: str | None) -> bool:
    """Tell whether a caption is only separators, control and format characters; one of ROCOv2's is only U+202F."""
    return all(unicodedata.category(character)[0] in "ZC" for character in str(caption or ""))


def _clean_cui(cui: list[str] | str | None) -> list[str]:
    """Return the concepts as a list, in upper case; the Hub's ROCOv2 writes `["nan"]` where there is none."""
    concepts = cui if isinstance(cui, list) else str(cui or "").split(";")
    concepts = [str(concept or "").strip().upper() for concept in concepts]
    return [concept for concept in concepts if concept not in ("", "NAN")]


def column(rows: Dataset, name: str) -> pa.Array:
    """Return a column as Arrow data: tens of bytes a row, where a set of strings takes over a hundred."""
    values = rows.with_format("arrow")[name][:]
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
