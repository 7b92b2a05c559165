"""The files of images that a table names, and what the images are called: never by a path of this machine."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, Value, concatenate_datasets

from captioning.data.images import IMAGE_ENDINGS, MISSING
from captioning.data.zenodo import UNUSABLE, is_inside
from captioning.errors import UserError
from captioning.files import short_names


FILE = "file name"  # a column: what a table calls the image, below the folder of the images
OUTSIDE = "image outside of the dataset's folder"
LOCAL_PATH = r"^\s*(/|~|\.\.?/|\\|[A-Za-z]:[\\/]|file:)"  # how an id starts that is a path


def with_files(rows: Dataset, root: Path, first: Path, where: str) -> Dataset:
    """Return rows whose `image`, a text, became the file that it names; with `FILE`, and the reasons in `UNUSABLE`.

    No file outside of the folder `root` is read. Names are relative to its folder `first` or to `root`, and may lack
    ending or subfolder where only one file fits.

    Raises:
        UserError: no row has its file.
    """
    names = [(name or "").replace("\\", os.sep) for name in rows["image"][:]]  # written on Windows
    paths = [_find(name, (first, root)) for name in names]
    if None in paths:
        named = _images_by_name(root)
        paths = [path or named.get(name) or os.path.join(root, name) for path, name in zip(paths, names, strict=True)]
    roots = [os.path.realpath(root)]
    faults = [_fault_of_file(name, path, roots) for name, path in zip(names, paths, strict=True)]
    if names and all(faults):
        raise UserError(
            f"{where}: none of its {len(names)} images can be used; the first is '{names[0]}' ({faults[0]}), sought "
            f"in '{root}'; set --image_folder to the folder that holds them, or --image_column"
        )
    known = rows[UNUSABLE][:] if UNUSABLE in rows.column_names else faults
    reasons = [reason or fault for reason, fault in zip(known, faults, strict=True)]
    columns = {
        # Nothing later reads what must not be read
        "image": [None if reason else {"path": path} for path, reason in zip(paths, reasons, strict=True)],
        FILE: [
            os.path.relpath(path, root) if name and path.isprintable() else None
            for name, path in zip(names, paths, strict=True)
        ],
        UNUSABLE: reasons,
    }
    features = Features({"image": Image(decode=False), FILE: Value("string"), UNUSABLE: Value("string")})
    others = rows.select_columns([name for name in rows.column_names if name not in columns])
    return concatenate_datasets([others, Dataset.from_dict(columns, features=features)], axis=1)


def _find(name: str, folders: Iterable[Path]) -> str | None:
    return next(filter(os.path.lexists, (os.path.join(folder, name) for folder in folders)), None)


def _images_by_name(root: Path) -> dict[str, str | None]:
    """Return the path of each image below the folder by what it may be called, None where several may."""
    found: dict[str, str | None] = {}
    for folder, _, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in names):
            stem, ending = os.path.splitext(path)
            is_image = ending.lower() in IMAGE_ENDINGS or ending[1:].isdigit()  # the end of a DICOM UID
            if is_image and path.isprintable():
                keys = {os.path.relpath(stem, root), os.path.basename(path), os.path.basename(stem)}
                found |= {key: None if key in found else path for key in keys}
    return found


def _fault_of_file(name: str, path: str, roots: list[str]) -> str | None:
    if not is_inside(path, roots):
        return OUTSIDE
    return None if name and os.path.exists(path) else MISSING


def with_ids(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Give each row an `image_id` that is no path of this machine.

    Without such a column it is the name of the file, else the number among all rows. Paths are shortened to as many
    of their last parts as tell them apart.
    """
    first, ids, made = 0, {}, set()
    for split, rows in splits.items():
        if "image_id" not in rows.column_names:
            ids[split] = _names_of_files(rows, first)
            made |= set(ids[split])
        elif pc.any(pc.match_substring_regex(_as_text(rows, "image_id"), LOCAL_PATH)).as_py():
            ids[split] = _as_text(rows, "image_id").to_pylist()
        first += len(rows)
    texts = {text for own in ids.values() for text in own if text}
    paths = {text for text in texts if text in made or re.match(LOCAL_PATH, text)}
    short = short_names(paths, texts - paths)
    for split, own in ids.items():
        others = splits[split].select_columns([name for name in splits[split].column_names if name != "image_id"])
        ids[split] = others.add_column("image_id", [short.get(text, text) for text in own], feature=Value("string"))
    return {**splits, **ids}


def _names_of_files(rows: Dataset, first: int) -> list[str]:
    """Return the name of each row's file, numbered where it is repeated; without one, the number of the row."""
    has_file = FILE in rows.column_names
    names = _as_text(rows, FILE) if has_file else pc.struct_field(rows.data.column("image"), "path")
    seen: Counter[str | None] = Counter()
    ids = []
    for number, name in enumerate(names.to_pylist(), start=first):
        seen[name] += 1
        ids.append((name if seen[name] == 1 else f"{name}#{seen[name]}") if name else f"{number:06d}")
    return ids


def _as_text(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.data.column(name).cast(pa.string())
