"""Any source of radiology images with captions, in one schema: `image`, `image_id`, `caption`, `cui`.

`load_source` reads the rows as they are; `checks.check_rows` marks those that cannot be used. A source may come from
anyone: no code that it brings is run, and no file outside of it is read.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, LargeList, List, Value, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_CACHE

from captioning.data.phantoms import load_phantoms
from captioning.data.streaming import STORED, hub_shards, index_shards, is_streamed, read_footer
from captioning.data.zenodo import UNUSABLE, ZenodoSplits, is_inside, load_zenodo
from captioning.errors import UserError, as_user_error, did_you_mean
from captioning.hub.faults import reading_from_hub
from captioning.hub.revisions import pin_revision


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}
OUTSIDE = "unreadable image: a file outside of the dataset's folder"
REQUIRED_COLUMNS = ("image", "image_id", "caption")


def load_source(name: str, revision: str | None = None, streaming: bool = False) -> DatasetDict:
    """Load the splits `train`, `validation`, `test` of a source, as far as it has them, with unchecked rows.

    Args:
        name: a Hub id; a folder made by `save_to_disk`; a folder of parquet files named by split; a folder in
            the layout of Zenodo record 10821435, its zips extracted or not; or `phantoms`.
        revision: commit, branch or tag of a Hub id.
        streaming: read images from parquet shards, in a folder or on the Hub, when they are needed.

    Returns:
        Splits with at least the columns `image` (decoded by the collator only), `image_id` and `caption`.

    Raises:
        UserError: the source does not exist, cannot be read, cannot be streamed, or lacks a column.
    """
    if name == "phantoms" and not streaming:
        splits = load_phantoms()
    elif name == "phantoms":
        raise UserError(STORED.format("dataset 'phantoms'"))
    elif os.path.isdir(name):
        splits = _load_folder(Path(name), streaming)
    elif os.path.exists(name):
        raise UserError(f"dataset '{name}' is a file; give the folder that holds it")
    elif _is_local(name):
        raise UserError(f"dataset folder '{name}' does not exist; set --dataset_name")
    else:
        splits = _load_from_hub(name, revision, streaming)
    if not isinstance(splits, DatasetDict):
        raise UserError(f"dataset '{name}' is a single split; save a DatasetDict of {', '.join(SPLITS)}")
    is_ours = isinstance(splits, ZenodoSplits)  # its links are checked where it is read
    named = {SPLIT_NAMES.get(split, split): rows for split, rows in splits.items()}
    if len(named) < len(splits):
        raise UserError(f"dataset '{name}' has split 'validation' under two names: {', '.join(splits)}; keep one")
    if not set(named) & set(SPLITS):
        raise UserError(f"dataset '{name}' has none of the splits {', '.join(SPLITS)}, but {', '.join(splits)}")
    checked = {}
    for split in [split for split in SPLITS if split in named]:
        rows = _checked_columns(named[split], f"dataset '{name}', split '{split}'", streaming, is_ours)
        checked[split] = rows if is_ours or streaming else _without_foreign_files(rows, name)
    return DatasetDict(checked)


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
    with _reading(f"dataset folder '{folder}' cannot be read"):
        is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        files = {} if is_saved else _parquet_files(folder)
        is_zenodo = any(folder.glob("*_captions.csv"))
        if streaming and not files and (is_saved or is_zenodo):
            raise UserError(STORED.format(f"dataset folder '{folder}'"))
        if is_saved:
            for path in folder.glob("*/state.json"):
                if not json.loads(path.read_text())["_data_files"]:
                    raise UserError(f"dataset folder '{folder}': split '{path.parent.name}' is empty; remove it")
            return load_from_disk(str(folder))
        if files:
            for path in chain(*files.values()):
                read_footer(path)  # which may be that of a bomb
            return index_shards(files) if streaming else load_dataset("parquet", data_files=files)
        if is_zenodo:
            return load_zenodo(folder)
    raise UserError(
        f"dataset folder '{folder}' holds none of dataset_dict.json (save_to_disk), [data/]<split>-*.parquet, "
        "<split>_captions.csv (Zenodo)"
    )


@contextmanager
def _reading(what: str, mend: str = "") -> Iterator[None]:
    """See `reading_from_hub`; the message is that of the rows' generator, whose errors `datasets` wraps."""
    with reading_from_hub(what, mend):
        try:
            yield
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None


def _refuse_special_files(folder: Path) -> None:
    """Raise UserError for a pipe or a device in place of a table: reading it might never end."""
    for pattern in ("*", "data/*.parquet", "*/*.json", "*/*.arrow"):
        for path in folder.glob(pattern):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"dataset folder '{folder}': '{path.name}' is not a regular file; remove it")


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for path in sorted((folder / "data").glob("*.parquet")) or sorted(folder.glob("*.parquet")):
        files.setdefault(re.split(r"[-.]", path.name)[0], []).append(str(path))
    return files


def _load_from_hub(name: str, revision: str | None, streaming: bool) -> DatasetDict:
    logger.info("Loading dataset '%s' from the Hub", name)
    at = f" at revision '{revision}'" if revision else ""
    hint = did_you_mean(name, ["phantoms", "eltorio/ROCOv2-radiology"]).removeprefix("; ")
    with _reading(f"dataset '{name}'{at} is not a local folder and cannot be loaded from the Hub", hint):
        return index_shards(hub_shards(name, revision)) if streaming else load_dataset(name, revision=revision)


def _checked_columns(rows: Dataset, where: str, streaming: bool, is_ours: bool) -> Dataset:
    """Return the columns of the schema, and `UNUSABLE` of a split that we wrote ourselves; no image is decoded."""
    if missing := [column for column in REQUIRED_COLUMNS if column not in rows.column_names]:
        there = ", ".join(rows.column_names)
        raise UserError(f"{where}: column '{missing[0]}' is missing, it has {there}; rename the one that holds it")
    # A table itself declares what its columns are; reading one of another type than text could open any file
    for column in ("image_id", "caption", "cui"):
        kind = rows.features.get(column, Value("string"))
        kind = kind.feature if column == "cui" and isinstance(kind, List | LargeList) else kind
        if not isinstance(kind, Value):
            raise UserError(f"{where}: column '{column}' is not text but {kind}; write it as text")
    if is_streamed(rows) and not streaming:  # planted: it names the files that are read
        raise UserError(f"{where}: column 'image' holds no images; write them as bytes")
    for column in ("image_id", "caption"):
        with as_user_error(f"{where}: column '{column}' is damaged", "write it in UTF-8"):
            rows.data.column(column).validate(full=True)
    columns = [*REQUIRED_COLUMNS, "cui", *([UNUSABLE] if is_ours else [])]
    rows = rows.select_columns([column for column in columns if column in rows.column_names])
    with as_user_error(f"{where}: column 'image' holds no images"):
        return rows if streaming else rows.cast_column("image", Image(decode=False))


def _without_foreign_files(rows: Dataset, name: str) -> Dataset:
    """Mark the rows whose image is a file outside of the source: a table can name any file of this machine.

    Inside are its own folder and those to which `datasets` downloads.
    """
    roots = [os.path.realpath(root) for root in (HF_HUB_CACHE, HF_DATASETS_CACHE, *([name] * os.path.isdir(name)))]
    content, paths = (pc.struct_field(rows.data.column("image"), name) for name in ("bytes", "path"))
    reasons: list[str | None] = [None] * len(rows)
    for row in np.flatnonzero(pc.is_null(content).to_numpy()).tolist():
        path = paths[row].as_py()
        reasons[row] = OUTSIDE if path and not is_inside(path, roots) else None
    return rows.add_column(UNUSABLE, reasons, feature=Value("string")) if any(reasons) else rows
