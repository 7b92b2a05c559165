"""Any source of radiology images with captions, in one schema: `image`, `image_id`, `caption`, `cui`.

`load_source` reads the rows as they are; `checks.check_rows` marks those that cannot be used. A source may come from
anyone: no code that it brings is run, and no file outside of it is read.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, LargeList, List, Value, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub.constants import HF_HUB_CACHE

from captioning.data import own_data
from captioning.data.image_files import FILE, OUTSIDE, with_files, with_ids
from captioning.data.layout import Layout
from captioning.data.own_data import GROUP, SPLIT_NAMES, SPLITS, WHOLE
from captioning.data.phantoms import load_phantoms
from captioning.data.splits import warn_of_shared_groups, with_splits
from captioning.data.streaming import STORED, hub_shards, index_shards, is_streamed, read_footer
from captioning.data.tables import TABLE_ENDINGS
from captioning.data.zenodo import UNUSABLE, MarkedSplits, is_inside, load_zenodo
from captioning.errors import UserError, as_user_error, did_you_mean
from captioning.hub.faults import reading_from_hub
from captioning.hub.revisions import pin_revision


logger = logging.getLogger(__name__)

UNFINISHED = "prepare.unfinished"  # a file in the folder that `prepare` writes, until it is complete


def load_source(
    name: str, revision: str | None = None, streaming: bool = False, layout: Layout | None = None
) -> DatasetDict:
    """Load the splits `train`, `validation`, `test` of a source, as far as it has them, with unchecked rows.

    Args:
        name: a Hub id, a folder, a table or `phantoms`; see docs/data.md.
        revision: commit, branch or tag of a Hub id.
        streaming: read images from parquet shards, in a folder or on the Hub, when they are needed.
        layout: which columns and files are used, and how data without splits is split; default: what is usual.

    Returns:
        Splits with the columns `image` (not decoded), `image_id`, `caption`, and `cui` and `group` where the data
        has them.

    Raises:
        UserError: the source does not exist, cannot be read, cannot be streamed, or lacks a column.
    """
    layout = layout or Layout()
    if streaming and layout.given():
        raise UserError(f"--{layout.given()[0]} does not go with --streaming; leave one of them out")
    if layout.concepts and not (os.path.isdir(name) and any(Path(name).glob("*_captions.csv"))):
        raise UserError(f"--concepts is for the tables of Zenodo; dataset '{name}' has none, leave it out")
    splits = _load(name, revision, streaming, layout)
    splits = DatasetDict({WHOLE: splits}) if isinstance(splits, Dataset) else splits
    is_whole = len(splits) == 1 and next(iter(splits)).lower() not in SPLIT_NAMES and not streaming
    if is_whole and (parts := own_data.rows_by_split(next(iter(splits.values())), f"dataset '{name}'")):
        splits, is_whole = DatasetDict(parts), False
    names = {"train" if is_whole else SPLIT_NAMES.get(split.lower(), split): split for split in splits}
    if len(names) < len(splits):
        raise UserError(f"dataset '{name}' has split 'validation' under two names: {', '.join(splits)}; keep one")
    if not set(names) & set(SPLITS):
        raise UserError(f"dataset '{name}' has none of the splits {', '.join(SPLITS)}, but {', '.join(splits)}")
    checked, chosen = {}, []
    for split in [split for split in SPLITS if split in names]:
        rows, where = splits[names[split]], f"dataset '{name}', split '{split}'"
        is_ours = isinstance(splits, MarkedSplits)
        if not is_ours:
            images = [column for column, kind in rows.features.items() if isinstance(kind, Image)]
            columns = own_data.choose_columns(rows.column_names, layout, where, images)
            rows = own_data.use_columns(rows, columns)
            chosen.append(columns)
        rows = _checked_columns(rows, where, streaming, is_ours)
        if isinstance(rows.features["image"], Value):
            root = _image_folder(name, layout, where)
            rows = with_files(rows, root, root / names[split], where)
        elif not streaming and not is_ours:
            rows = _without_foreign_files(rows, [name, layout.image_folder])
        checked[split] = rows
    own_data.log_columns(name, chosen)
    complete = with_splits(with_ids(checked), name, layout, is_whole)
    warn_of_shared_groups(complete)
    return DatasetDict(
        {split: rows.select_columns([c for c in rows.column_names if c != FILE]) for split, rows in complete.items()}
    )


def _load(name: str, revision: str | None, streaming: bool, layout: Layout) -> DatasetDict | Dataset:
    is_folder = os.path.isdir(name)
    if streaming and (os.path.isfile(name) or name == "phantoms" or (is_folder and not _parquet_files(Path(name)))):
        raise UserError(STORED.format(f"dataset '{name}'"))
    if name == "phantoms":
        return load_phantoms()
    if is_folder:
        return _load_folder(Path(name), streaming, layout)
    if os.path.exists(name):
        if not os.path.isfile(name) or not name.lower().endswith(TABLE_ENDINGS):
            kinds = ", ".join(TABLE_ENDINGS)
            raise UserError(f"dataset '{name}' is no table ({kinds}); give one, or the folder that holds the data")
        with _reading(f"dataset '{name}' cannot be read"):
            return own_data.load_tables(name, {WHOLE: Path(name)}, layout)
    if _is_local(name):
        raise UserError(f"dataset '{name}' does not exist; set --dataset_name to a folder, a table or a Hub id")
    return _load_from_hub(name, revision, streaming)


def _image_folder(name: str, layout: Layout, where: str) -> Path:
    """Return the folder in which a table's images are sought: that of the flag, else that of the data."""
    if layout.image_folder is None and not os.path.exists(name):
        raise UserError(f"{where}: column 'image' holds names of files; set --image_folder to the folder of these")
    return Path(layout.image_folder or (name if os.path.isdir(name) else os.path.dirname(name) or "."))


def dataset_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit that `revision` of a Hub dataset names, see `pin_revision`; `revision` of another source."""
    return revision if _is_local(name) else pin_revision(name, revision, kind="dataset")


def _is_local(name: str) -> bool:
    return (
        name == "phantoms"
        or os.path.exists(name)
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or (name.lower().endswith(TABLE_ENDINGS))
    )


def _load_folder(folder: Path, streaming: bool, layout: Layout) -> DatasetDict | Dataset:
    _refuse_special_files(folder)
    if (folder / UNFINISHED).exists():
        mend = "delete it and run that command again"
        raise UserError(f"dataset folder '{folder}' is half written: the command that wrote it was stopped; {mend}")
    with _reading(f"dataset folder '{folder}' cannot be read"):
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            for path in folder.glob("*/state.json"):
                if not json.loads(path.read_text())["_data_files"]:
                    raise UserError(f"dataset folder '{folder}': split '{path.parent.name}' is empty; remove it")
            return load_from_disk(str(folder))
        if files := _parquet_files(folder):
            for path in chain(*files.values()):
                read_footer(path)  # which may be that of a bomb
            return index_shards(files) if streaming else load_dataset("parquet", data_files=files)
        if any(folder.glob("*_captions.csv")):
            if wrong := [name for name in layout.given() if name.endswith(("_column", "_folder"))]:
                raise UserError(f"--{wrong[0]} does not go with the layout of Zenodo in '{folder}'; leave it out")
            return load_zenodo(folder, layout.concepts)
        if tables := own_data.find_tables(folder):
            return own_data.load_tables(str(folder), tables, layout)
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_ENDINGS]
    found = [path for path in found if path.name != "rejected.jsonl"]  # of `prepare`
    raise UserError(
        f"dataset folder '{folder}' holds none of dataset_dict.json (save_to_disk), [data/]<split>-*.parquet, "
        "<split>_captions.csv (Zenodo), metadata.csv or .jsonl, captions.csv or .jsonl; see docs/data.md"
        + (f", or give a table itself: --dataset_name {found[0]}" if found else "")
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
    if name in _PACKAGED_DATASETS_MODULES:  # a recipe from the Hub may name one
        raise UserError(f"dataset '{name}' is a format, of which the working folder would be read; give the folder")
    logger.info("Loading dataset '%s' from the Hub", name)
    at = f" at revision '{revision}'" if revision else ""
    hint = did_you_mean(name, ["phantoms", "eltorio/ROCOv2-radiology"]).removeprefix("; ")
    with _reading(f"dataset '{name}'{at} is not a local folder and cannot be loaded from the Hub", hint):
        return index_shards(hub_shards(name, revision)) if streaming else load_dataset(name, revision=revision)


def _checked_columns(rows: Dataset, where: str, streaming: bool, is_ours: bool) -> Dataset:
    """Return the columns of the schema, and `UNUSABLE` of a split that we wrote ourselves; no image is decoded."""
    # A table itself declares what its columns are; reading one of another type than text could open any file
    texts = [column for column in ("image_id", "caption", "cui", GROUP) if column in rows.column_names]
    for column in texts:
        kind = rows.features[column]
        kind = kind.feature if column == "cui" and isinstance(kind, List | LargeList) else kind
        if not isinstance(kind, Value):
            raise UserError(f"{where}: column '{column}' is not text but {kind}; write it as text")
    if is_streamed(rows) and not streaming:  # planted: it names the files that are read
        raise UserError(f"{where}: column 'image' holds no images; write them as bytes")
    for column in texts:
        with as_user_error(f"{where}: column '{column}' is damaged", "write it in UTF-8"):
            rows.data.column(column).validate(full=True)
    rows = rows.select_columns(["image", *texts, *([UNUSABLE] if is_ours else [])])
    with as_user_error(f"{where}: column 'image' holds no images"):
        is_text = rows.features["image"] in (Value("string"), Value("large_string"))
        return rows if streaming or is_text else rows.cast_column("image", Image(decode=False))


def _without_foreign_files(rows: Dataset, folders: Sequence[str | None]) -> Dataset:
    """Mark the rows whose image is a file outside of the `folders` and of those to which `datasets` downloads."""
    there = [folder for folder in folders if folder and os.path.isdir(folder)]
    roots = [os.path.realpath(root) for root in (HF_HUB_CACHE, HF_DATASETS_CACHE, *there)]
    content, paths = (pc.struct_field(rows.data.column("image"), name) for name in ("bytes", "path"))
    reasons: list[str | None] = [None] * len(rows)
    for row in np.flatnonzero(pc.is_null(content).to_numpy()).tolist():
        path = paths[row].as_py()
        reasons[row] = OUTSIDE if path and not is_inside(path, roots) else None
    return rows.add_column(UNUSABLE, reasons, feature=Value("string")) if any(reasons) else rows
