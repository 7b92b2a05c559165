"""Any source of radiology images with captions, in one schema: `image`, `image_id`, `caption`, `cui`.

`load_rocov2` reads the source, `check_rows` marks the rows that cannot be used, `tokenize` adds `input_ids`, `usable`
leaves the marked rows out. None of them copies the images: each `map` writes only its own small columns, which are
joined to the memory-mapped table.

As a command, any source becomes a folder that `--dataset_name` and `datasets.load_from_disk` take:

    python rocov2.py eltorio/ROCOv2-radiology data/rocov2
    python rocov2.py path/to/zenodo data/rocov2
"""

import argparse
import contextlib
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    LargeList,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE
from pyarrow.parquet import read_metadata
from transformers import PreTrainedTokenizerBase

from collator import open_image
from errors import UserError, did_you_mean, exit_on_user_error, first_line
from hub import pin_revision
from phantoms import load_phantoms
from predictions import write_whole
from streaming import STORED, hub_shards, index_shards, is_streamed, refuse_bomb
from zenodo import UNUSABLE, ZenodoSplits, is_inside, load_zenodo


logger = logging.getLogger("captioning.rocov2")

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}
OUTSIDE = "unreadable image: a file outside of the data set's folder"
CLEAN_COLUMNS = Features(
    {
        "image_id": Value("string"),
        "caption": Value("string"),
        "cui": List(Value("string")),
        "rejected": Value("string"),  # why the row cannot be used, null where it can
    }
)
REQUIRED_COLUMNS = ("image", "image_id", "caption")
CHECK_BATCH_SIZE = 64  # rows whose images are in memory at once
MAX_CAPTION = 100_000  # characters; ROCOv2's longest has about 7,000
MAX_ID = 1000  # characters; an id stands in logs, pages and submissions
COLUMN_BATCH_SIZE = 1000  # rows of which a text column is in memory at once


# --- Sources --------------------------------------------------------------------------------------------------


def load_rocov2(name: str, revision: str | None = None, streaming: bool = False) -> DatasetDict:
    """Load a source into those of the splits `train`, `validation`, `test` that it has, rows as they are.

    Args:
        name: a Hub id; a folder made by `save_to_disk`; a folder of parquet files named by split; a folder in
            the layout of Zenodo record 10821435, its zips extracted or not; or `phantoms`.
        revision: commit, branch or tag, for a Hub id.
        streaming: read the images of parquet shards, in a folder or on the Hub, when they are needed.

    Returns:
        Splits with at least the columns `image` (undecoded: the collator does it), `image_id` and `caption`.

    Raises:
        UserError: the source does not exist, cannot be read, cannot be streamed, or lacks a column.
    """
    if name == "phantoms":
        if streaming:
            raise UserError(STORED.format("dataset 'phantoms'"))
        splits = load_phantoms()
    elif os.path.isdir(name):
        splits = _load_folder(Path(name), streaming)
    elif os.path.exists(name):
        raise UserError(f"dataset '{name}' is a file; give the folder that holds it")
    elif _is_local(name):
        raise UserError(f"dataset folder '{name}' does not exist; set --dataset_name")
    else:
        splits = _load_from_hub(name, revision, streaming)
    is_ours = isinstance(splits, ZenodoSplits)
    if not isinstance(splits, DatasetDict):
        raise UserError(f"dataset '{name}' is a single split; save a DatasetDict of {', '.join(SPLITS)}")
    named = Counter(SPLIT_NAMES.get(split, split) for split in splits)
    if repeated := [split for split, count in named.items() if count > 1]:
        raise UserError(f"dataset '{name}' has split '{repeated[0]}' under two names: {', '.join(splits)}; keep one")
    splits = {SPLIT_NAMES.get(split, split): rows for split, rows in splits.items()}
    if not set(splits) & set(SPLITS):
        raise UserError(f"dataset '{name}' has none of the splits {', '.join(SPLITS)}, but {', '.join(splits)}")
    checked = {split: _checked_columns(splits[split], name, split, streaming) for split in SPLITS if split in splits}
    if is_ours or streaming:
        return DatasetDict(checked)
    return DatasetDict({split: _without_foreign_files(rows, name) for split, rows in checked.items()})


def dataset_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit that `revision` of a Hub dataset names; `revision` itself for another source.

    Raises:
        UserError: the revision is not, or no longer, there.
    """
    return revision if _is_local(name) else pin_revision(name, revision, kind="dataset")


def _is_local(name: str) -> bool:
    return name == "phantoms" or os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _load_folder(folder: Path, streaming: bool) -> DatasetDict | Dataset:
    _refuse_special_files(folder)
    try:
        is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        files = {} if is_saved else _parquet_files(folder)
        if streaming and not files and (is_saved or any(folder.glob("*_captions.csv"))):
            raise UserError(STORED.format(f"dataset folder '{folder}'"))
        if is_saved:
            states = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/state.json")}
            _refuse_empty_splits(folder, {split: len(state["_data_files"]) for split, state in states.items()})
            return load_from_disk(str(folder))
        if files:
            footers = {split: {path: read_metadata(path) for path in paths} for split, paths in files.items()}
            for path, footer in (item for of_split in footers.values() for item in of_split.items()):
                refuse_bomb(path, footer)
            counts = {split: sum(each.num_rows for each in of_split.values()) for split, of_split in footers.items()}
            _refuse_empty_splits(folder, counts)
            return index_shards(files) if streaming else load_dataset("parquet", data_files=files)
        if any(folder.glob("*_captions.csv")):
            return load_zenodo(folder)
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise errors of many unrelated classes
        cause = error.__cause__ or error  # `from_generator` wraps what the generator raised
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"dataset folder '{folder}' cannot be read: {first_line(cause)}") from error
    raise UserError(
        f"dataset folder '{folder}' holds none of dataset_dict.json (save_to_disk), [data/]<split>-*.parquet, "
        "<split>_captions.csv (Zenodo)"
    )


def _refuse_special_files(folder: Path) -> None:
    """Raise UserError on a pipe or a device where a table of the data set should be: reading it might never end."""
    for pattern in ("*", "data/*.parquet", "*/*.json", "*/*.arrow"):
        for path in folder.glob(pattern):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"dataset folder '{folder}': '{path.name}' is no regular file; take it away")


def _refuse_empty_splits(folder: Path, counts: dict[str, int]) -> None:
    """Raise UserError on a split that holds nothing: `datasets` says so by an error that does not name it."""
    for split, count in counts.items():
        if not count:
            raise UserError(f"dataset folder '{folder}': split '{split}' is empty; add rows or take it away")


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for place in (folder / "data", folder):
        for path in sorted(place.glob("*.parquet")):
            split = re.split(r"[-.]", path.name)[0]
            files.setdefault(split, []).append(str(path))
        if files:
            break
    return files


def _load_from_hub(name: str, revision: str | None, streaming: bool) -> DatasetDict:
    logger.info("Loading dataset '%s' from the Hub", name)
    try:
        return index_shards(hub_shards(name, revision)) if streaming else load_dataset(name, revision=revision)
    except UserError:
        raise
    except Exception as error:  # the Hub client raises errors of many unrelated classes
        at = f" at revision '{revision}'" if revision else ""
        hint = did_you_mean(name, ["phantoms", "eltorio/ROCOv2-radiology"])
        raise UserError(
            f"dataset '{name}'{at} is no local folder and cannot be loaded from the Hub: {first_line(error)}{hint}"
        ) from error


def _checked_columns(rows: Dataset, name: str, split: str, streaming: bool) -> Dataset:
    missing = [column for column in REQUIRED_COLUMNS if column not in rows.column_names]
    if missing:
        raise UserError(
            f"dataset '{name}', split '{split}': column '{missing[0]}' is missing, it has "
            f"{', '.join(rows.column_names)}; rename the column that holds it"
        )
    # A table says by itself what its columns are; to read one of another kind than text could open any file
    for column in [column for column in ("image_id", "caption", "cui", UNUSABLE) if column in rows.column_names]:
        kind = rows.features[column]
        kind = kind.feature if column == "cui" and isinstance(kind, List | LargeList) else kind
        if not isinstance(kind, Value):
            raise UserError(
                f"dataset '{name}', split '{split}': column '{column}' is no text but {kind}; write it as text"
            )
    if is_streamed(rows) and not streaming:  # planted: it names the files that are read
        raise UserError(f"dataset '{name}', split '{split}': column 'image' holds no images; write them as bytes")
    for column in ("image_id", "caption"):
        try:
            rows.data.column(column).validate(full=True)
        except Exception as error:  # pyarrow's classes again; it meets text that is no UTF-8 when a row is read
            raise UserError(
                f"dataset '{name}', split '{split}': column '{column}' is damaged: {first_line(error)}; "
                "write it in UTF-8"
            ) from error
    rows = rows.select_columns([c for c in (*REQUIRED_COLUMNS, "cui", UNUSABLE) if c in rows.column_names])
    try:
        return rows if streaming else rows.cast_column("image", Image(decode=False))
    except Exception as error:  # pyarrow's classes again
        raise UserError(
            f"dataset '{name}', split '{split}': column 'image' holds no images: {first_line(error)}"
        ) from error


def _without_foreign_files(rows: Dataset, name: str) -> Dataset:
    """Mark the rows whose image is a file outside of the source: a stranger's table can name any file of the machine.

    Its own folder counts, and those to which `datasets` downloads. Links that a Zenodo folder itself has are checked
    where it is read.
    """
    if UNUSABLE in rows.column_names:
        rows = rows.remove_columns(UNUSABLE)
    roots = [os.path.realpath(root) for root in (HF_HUB_CACHE, HF_DATASETS_CACHE, *([name] * os.path.isdir(name)))]
    marked: dict[int, str] = {}
    start = 0
    for images in rows.data.column("image").chunks:
        for row in np.flatnonzero(images.field("bytes").is_null().to_numpy(zero_copy_only=False)).tolist():
            path = (images[row].as_py() or {}).get("path")
            if path and not is_inside(path, roots):
                marked[start + row] = OUTSIDE
        start += len(images)
    if not marked:
        return rows
    return rows.add_column(UNUSABLE, [marked.get(row) for row in range(len(rows))], feature=Value("string"))


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
        dataset: what `load_rocov2` returned.
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


# --- Tokens ---------------------------------------------------------------------------------------------------


def tokenize(
    dataset: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_caption_length: int,
    prompt_ids: list[int],
) -> DatasetDict:
    """Add the column `input_ids`: `[CLS]`, the prompt, the caption, `[SEP]`; the collator writes `[DEC]` over `[CLS]`.

    Args:
        dataset: what `check_rows` returned.
        tokenizer: a WordPiece tokenizer with `[CLS]` and `[SEP]`.
        max_caption_length: most tokens of a row, start, prompt and `[SEP]` included; a longer caption is cut.
        prompt_ids: tokens of the prompt, without special tokens.

    Raises:
        UserError: `max_caption_length` leaves no room for a caption token.
    """
    room = max_caption_length - len(prompt_ids) - 2
    if room < 1:
        raise UserError(
            f"max_caption_length {max_caption_length} leaves no room for a caption beside [DEC], [SEP] and "
            f"{len(prompt_ids)} prompt tokens; set --max_caption_length to {len(prompt_ids) + 3} or more"
        )
    start, end = [tokenizer.cls_token_id, *prompt_ids], [tokenizer.sep_token_id]
    tokenized = DatasetDict()
    for split, rows in dataset.items():
        tokens = rows.select_columns("caption").map(
            _tokenize_batch,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "start": start, "end": end, "room": room},
            remove_columns="caption",
            desc=f"Tokenizing {split}",
        )
        cut = sum(tokens["cut"])
        if cut:
            logger.info("%s: %d of %d captions are cut to %d tokens", split, cut, len(rows), max_caption_length)
        tokenized[split] = concatenate_datasets([rows, tokens.remove_columns("cut")], axis=1)
    return tokenized


def _tokenize_batch(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, start: list[int], end: list[int], room: int
) -> dict[str, list[Any]]:
    captions = tokenizer(batch["caption"], add_special_tokens=False, verbose=False)["input_ids"]
    return {
        "input_ids": [start + tokens[:room] + end for tokens in captions],
        "cut": [len(tokens) > room for tokens in captions],
    }


# --- Command --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Load any source, leave the unusable rows out and store the rest with `save_to_disk`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", help="Hub id, folder (save_to_disk, parquet, Zenodo) or 'phantoms'")
    parser.add_argument("folder", help="new folder to write; the rows left out are listed in its rejected.jsonl")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub id")
    parser.add_argument("--max_rejected_fraction", type=float, default=0.01)
    parser.add_argument("--num_proc", type=int)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder)
    if arguments.num_proc is not None and arguments.num_proc < 1:
        raise UserError(f"num_proc is {arguments.num_proc}; set --num_proc to 1 or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' exists and is not an empty folder; name a new one")
    dataset = load_rocov2(arguments.source, arguments.revision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checked = check_rows(dataset, arguments.max_rejected_fraction, folder / "rejected.jsonl", arguments.num_proc)
        stored = DatasetDict({split: usable(rows).cast_column("image", Image()) for split, rows in checked.items()})
        stored.save_to_disk(str(folder), num_proc=arguments.num_proc)
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be written: {error}") from error
    print(f"{folder}: " + ", ".join(f"{split} {len(rows):,}" for split, rows in stored.items()))


if __name__ == "__main__":
    exit_on_user_error(main)
