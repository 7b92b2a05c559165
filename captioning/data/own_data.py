"""One's own images and captions: which tables and columns hold them.

A `Layout` is what the user says about it; the rest is found by the usual names and logged. `image_files.py` finds and
names the images, `splits.py` draws splits, and `sources.load_source` applies all of it to any source.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from captioning.data.layout import Layout
from captioning.data.tables import EXTRA_FIELDS, TABLE_ENDINGS, read_table
from captioning.data.zenodo import UNUSABLE, MarkedSplits
from captioning.errors import UserError, did_you_mean


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation", "validate": "validation"} | {
    split: split for split in SPLITS
}
WHOLE = "whole"  # the name of a data set that has no splits
GROUP = "group"  # the column of what must not be in two splits, usually the patient
TABLE_NAMES = ("metadata", "captions")  # the former is that of the `imagefolder` of `datasets`
# By column of ours, the names that are looked for, the likeliest first; upper and lower case are alike
USUAL_NAMES = {
    "image": ("image", "file_name", "filename", "image_path", "path", "file_path", "filepath", "image_file", "file",
              "image_name", "img"),
    "caption": ("caption", "text", "report", "findings", "captions", "description", "impression"),
    "image_id": ("image_id", "id"),
    "cui": ("cui", "cuis", "concepts"),
    GROUP: ("patient_id", "patientid", "patient", "subject_id", "subject"),
}  # fmt: skip
FLAGS = {"image": "image_column", "caption": "caption_column", "image_id": "id_column", GROUP: "group_column"}
TEXT = Value("string")


def find_tables(folder: Path) -> dict[str, Path]:
    """Return by split the tables of captions in a folder; `WHOLE` stands for data without splits.

    They are called as a split, or `metadata` or `captions` in a folder of a split or in `folder` itself.

    Raises:
        UserError: a split has two tables.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name, table = path.stem, path if path.suffix.lower() in TABLE_ENDINGS and path.is_file() else None
        if path.is_dir():
            name, table = path.name, _table_in(path)
        if table and name.lower() in SPLIT_NAMES:
            if name in found:
                raise UserError(f"dataset folder '{folder}' has '{found[name]}' and '{table}'; remove one of them")
            found[name] = table
    return found or ({WHOLE: table} if (table := _table_in(folder)) else {})


def _table_in(folder: Path) -> Path | None:
    paths = [folder / f"{name}{ending}" for name in TABLE_NAMES for ending in TABLE_ENDINGS]
    return next((path for path in paths if path.is_file()), None)


def load_tables(name: str, tables: Mapping[str, Path], layout: Layout) -> MarkedSplits:
    """Read the tables of the data set `name` into splits of texts; `image` is the name of a file, not yet looked for.

    The table of `WHOLE` is taken apart if each row names its split, in a column `split` or by the first folder.

    Raises:
        UserError: a table cannot be read, has no rows, or no columns of images and captions.
    """
    splits, chosen = {}, []
    for split, table in tables.items():
        rows = list(read_table(table))
        if not rows:
            raise UserError(f"'{table}' holds no row; add captions or remove it")
        there = list(dict.fromkeys(key for row in rows for key in row if key is not None))
        columns = choose_columns(there, layout, f"'{table}'", ids_name_images=True)
        chosen.append(columns)
        of_row = _named_splits(rows, there, columns, f"'{table}'") if split == WHOLE else [split] * len(rows)
        for part in dict.fromkeys(of_row):
            own = [_texts(row, columns) for row, its in zip(rows, of_row, strict=True) if its == part]
            features = Features({key: List(TEXT) if key == "cui" else TEXT for key in own[0]})
            splits[part] = Dataset.from_generator(
                lambda own=own: iter(own), features=features, fingerprint=Hasher.hash((part, repr(own))), split=part
            )
    log_columns(name, chosen)
    return MarkedSplits(splits)


def _named_splits(
    rows: Sequence[Mapping[str | None, Any]], there: Sequence[str], columns: Mapping[str, str], where: str
) -> list[str]:
    """Return the split that each row names in a column `split`, else by the first folder of its image; or `WHOLE`."""
    key = _split_column(there) or ""
    _refuse_other_splits({_normal(row.get(key)) for row in rows} - {""}, key, where)
    paths = [str(row.get(columns["image"])).strip().replace("\\", "/").removeprefix("./") for row in rows]
    folders = [path.split("/")[0] for path in paths]
    named = [_normal(row.get(key) or folder) for row, folder in zip(rows, folders, strict=True)]
    if others := [path for path, part in zip(paths, named, strict=True) if part not in SPLIT_NAMES]:
        if known := len(rows) - len(others):
            drawn = f"'{others[0][:200]}' is in none: splits are drawn anew"
            logger.warning("%s: %d of %d images are in the folder of a split, but %s", where, known, len(rows), drawn)
        return [WHOLE] * len(rows)
    return [SPLIT_NAMES[part] for part in named]


def _texts(row: Mapping[str | None, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a row of a table under our names, and the reason to reject it if one is known."""
    reason = EXTRA_FIELDS if None in row else None
    values: dict[str, Any] = {}
    for ours, theirs in columns.items():
        value = row.get(theirs)
        if ours == "cui":
            items = value if isinstance(value, list) else str(value or "").split(";")
            values[ours] = [_well_formed(item) for item in items if item is not None]
        else:
            reason = f"{ours} is not text" if isinstance(value, bool | list | dict) else reason
            values[ours] = None if value is None else _well_formed(value)
    return values | {UNUSABLE: reason}


def _well_formed(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()  # JSON can hold an unpaired surrogate


def rows_by_split(rows: Dataset, where: str) -> dict[str, Dataset]:
    """Return the rows of each split that a column `split` names, nothing if there is no such column.

    Raises:
        UserError: the column holds something else.
    """
    key = _split_column(rows.column_names)
    if key is None:
        return {}
    named = [_normal(value) for value in rows.select_columns(key)[:][key]]
    _refuse_other_splits(set(named), key, where)
    of_split: dict[str, list[int]] = {}
    for row, name in enumerate(named):
        of_split.setdefault(SPLIT_NAMES[name], []).append(row)
    return {split: rows.select(found) for split, found in of_split.items()}


def _split_column(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.strip().lower() == "split"), None)


def _normal(value: Any) -> str:
    return str(value or "").strip().lower()


def _refuse_other_splits(stated: Set[str], key: str, where: str) -> None:
    if wrong := sorted(stated - SPLIT_NAMES.keys()):  # drawing splits instead would mix the rows of the user's own
        mend = f"write {', '.join(SPLITS)}, or give the column another name"
        raise UserError(f"{where}: column '{key}' holds '{wrong[0][:200]}', which is no split; {mend}")


# --- Columns --------------------------------------------------------------------------------------------------


def choose_columns(
    there: Sequence[str], layout: Layout, where: str, images: Sequence[str] = (), ids_name_images: bool = False
) -> dict[str, str]:
    """Return by our name which of the columns `there` is used: that of the flag, else the first of a usual name.

    Args:
        there: names of columns.
        layout: the flags.
        where: for errors.
        images: those that hold images, of which one is taken if none has a usual name.
        ids_name_images: images may lie in files that are called as the ids.

    Raises:
        UserError: the column of a flag is not there, or there is none of images or captions.
    """
    known = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(there)}
    names, columns = ", ".join(there[:8])[:300], {}
    for ours, usual in USUAL_NAMES.items():
        given = getattr(layout, FLAGS.get(ours, ""), None)
        if given is not None and given not in there:
            hint = did_you_mean(given, there) or f"; there are {names}"
            raise UserError(f"{where}: --{FLAGS[ours]} '{given}' is not a column{hint}")
        others = images if ours == "image" else ()
        if found := given or next((known[name] for name in usual if name in known), next(iter(others), None)):
            columns[ours] = found
    if ids_name_images and "image_id" in columns:
        columns.setdefault("image", columns["image_id"])
    for ours in ("image", "caption"):
        if ours not in columns:
            mend = f"name the one that holds it by --{FLAGS[ours]}"
            raise UserError(f"{where}: column '{ours}' is missing, it has {names}; {mend}")
    return columns


def log_columns(name: str, chosen: Iterable[Mapping[str, str]]) -> None:
    """Log which columns the splits of a data set are read from, once if they are alike; the schema's own are not."""
    made = "image_id made of file names or numbers"
    for columns in {tuple(columns.items()): columns for columns in chosen}.values():
        named = [f"{ours} from '{theirs}'" for ours, theirs in columns.items() if ours != theirs]
        if named := named + [made] * ("image_id" not in columns):
            logger.info("dataset '%s': %s", name, ", ".join(named))


def use_columns(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Return the chosen columns under our names; nothing is copied."""
    if all(ours == theirs for ours, theirs in columns.items()):
        return rows.select_columns(list(columns))
    parts = {ours: rows.select_columns(theirs) for ours, theirs in columns.items()}
    return concatenate_datasets([part.rename_columns({columns[ours]: ours}) for ours, part in parts.items()], axis=1)
