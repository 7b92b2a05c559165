"""One's own images and captions: which tables and columns hold them, by the flags or by the usual names."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
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
SPLIT_NAMES = {split: split for split in SPLITS} | dict.fromkeys(("valid", "val", "dev", "validate"), "validation")
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
TEXT = Value("string")


def find_tables(folder: Path) -> dict[str, Path]:
    """Return the tables of captions in a folder by split, or by `WHOLE` for data without splits.

    They are called as a split, or `metadata` or `captions` in a folder of a split or in `folder` itself; UserError
    if a split has two.
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
    whole = _table_in(folder)
    return found or ({WHOLE: whole} if whole else {})


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
        named = _named_splits(rows, there, columns, f"'{table}'") if split == WHOLE else [split] * len(rows)
        for part, numbers in _by_name(named).items():
            own = [_texts(rows[number], columns) for number in numbers]
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
    stated = [_normal(row.get(key)) for row in rows]
    _refuse_other_splits(filter(None, stated), key, where)
    paths = [str(row.get(columns["image"])).strip().replace("\\", "/").removeprefix("./") for row in rows]
    named = [split or _normal(path.split("/")[0]) for split, path in zip(stated, paths, strict=True)]
    if others := [path for path, part in zip(paths, named, strict=True) if part not in SPLIT_NAMES]:
        if known := len(rows) - len(others):
            drawn = f"'{others[0][:200]}' is in none: splits are drawn anew"
            logger.warning("%s: %d of %d images are in the folder of a split, but %s", where, known, len(rows), drawn)
        return [WHOLE] * len(rows)
    return [SPLIT_NAMES[part] for part in named]


def _texts(row: Mapping[str | None, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a row of a table under our names, and the reason to reject it if one is known."""

    def text(value: Any) -> str | None:  # JSON can hold an unpaired surrogate
        return None if value is None else str(value).encode("utf-8", "replace").decode()

    values: dict[str, Any] = {UNUSABLE: EXTRA_FIELDS if None in row else None}
    for ours, theirs in columns.items():
        value = row.get(theirs)
        if ours == "cui":
            values[ours] = [text(item) for item in (value if isinstance(value, list) else str(value or "").split(";"))]
        else:
            values[ours] = text(value)
            if isinstance(value, bool | list | dict):
                values[UNUSABLE] = f"{ours} is not text"
    return values


def rows_by_split(rows: Dataset, where: str) -> dict[str, Dataset]:
    """Return the rows of each split that a column `split` names, nothing without one; UserError if it names others."""
    key = _split_column(rows.column_names)
    if key is None:
        return {}
    named = [_normal(value) for value in rows.select_columns(key)[:][key]]
    _refuse_other_splits(named, key, where)
    found = _by_name(SPLIT_NAMES[name] for name in named)
    parts = {split: rows.select(numbers) for split, numbers in found.items()}
    # What follows reads the Arrow columns themselves. Flattening copies the images; adjacent rows need none
    return {split: part if part._indices is None else part.flatten_indices() for split, part in parts.items()}


def _by_name(names: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return found


def _split_column(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.strip().lower() == "split"), None)


def _normal(value: Any) -> str:
    return str(value or "").strip().lower()


def _refuse_other_splits(stated: Iterable[str], key: str, where: str) -> None:
    if wrong := sorted(set(stated) - SPLIT_NAMES.keys()):  # drawing splits instead would mix those of the user
        mend = f"write {', '.join(SPLITS)}, or give the column another name"
        raise UserError(f"{where}: column '{key}' holds '{wrong[0][:200]}', which is no split; {mend}")


# --- Columns --------------------------------------------------------------------------------------------------


def choose_columns(
    there: Sequence[str], layout: Layout, where: str, images: Sequence[str] = (), ids_name_images: bool = False
) -> dict[str, str]:
    """Return by our name which of the columns `there` is used: that of the flag, else the first of a usual name.

    Without a usual name the first of the columns `images` is taken. With `ids_name_images`, images may lie in files
    that are called as the ids.

    Raises:
        UserError: the column of a flag is not there, or there is none of images or captions.
    """
    known = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(there)}
    names, columns = ", ".join(there[:8])[:300], {}
    for ours, usual in USUAL_NAMES.items():
        flag = "id_column" if ours == "image_id" else f"{ours}_column"
        given = getattr(layout, flag, None)
        if given is not None and given not in there:
            hint = did_you_mean(given, there) or f"; there are {names}"
            raise UserError(f"{where}: --{flag} '{given}' is not a column{hint}")
        found = [given] if given else [known[name] for name in usual if name in known]
        if found := found or list(images if ours == "image" else ()):
            columns[ours] = found[0]
    if ids_name_images and "image_id" in columns:
        columns.setdefault("image", columns["image_id"])
    for ours in ("image", "caption"):
        if ours not in columns:
            mend = f"name the one that holds it by --{ours}_column"
            raise UserError(f"{where}: column '{ours}' is missing, it has {names}; {mend}")
    return columns


def log_columns(name: str, chosen: Sequence[Mapping[str, str]]) -> None:
    """Log which columns of other names the splits of a data set are read from, once where they are alike."""
    for columns in [found for number, found in enumerate(chosen) if found not in chosen[:number]]:
        named = [f"{ours} from '{theirs}'" for ours, theirs in columns.items() if ours != theirs]
        if "image_id" not in columns:
            named.append("image_id made of file names or numbers")
        if named:
            logger.info("dataset '%s': %s", name, ", ".join(named))


def use_columns(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Return the chosen columns under our names; nothing is copied."""
    if all(ours == theirs for ours, theirs in columns.items()):
        return rows.select_columns(list(columns))
    parts = {ours: rows.select_columns(theirs) for ours, theirs in columns.items()}
    return concatenate_datasets([part.rename_columns({columns[ours]: ours}) for ours, part in parts.items()], axis=1)
