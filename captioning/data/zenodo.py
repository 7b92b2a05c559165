"""The layout of ROCOv2's Zenodo record 10821435: tables of captions and concepts, and images in folders or zips."""

import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value

from captioning.data.images import MISSING
from captioning.data.tables import EXTRA_FIELDS, read_csv_rows
from captioning.errors import UserError, as_user_error, first_line


UNUSABLE = "unusable row"  # a column with the reason to reject a row unread, null where there is none
LINK_OUT = "image outside of the dataset's folder: a link out of the folder of images"
SPLIT_FILES = {"train": "train", "valid": "validation", "test": "test"}
FEATURES = Features(
    {
        "image": Image(decode=False),
        UNUSABLE: Value("string"),
        "image_id": Value("string"),
        "caption": Value("string"),
        "cui": List(Value("string")),
    }
)
MAX_MEMBER = 2**28  # bytes of an image in a zip
MAX_UNPACKED = 100  # times its size in the zip: image formats are compressed already, only a bomb unpacks to more
SMALL_MEMBER = 2**20  # bytes; up to this size any ratio is harmless


class MarkedSplits(DatasetDict):
    """Splits with a column `UNUSABLE` that we wrote ourselves: only that one is trusted."""


def load_zenodo(folder: Path, concepts: str | None = None) -> MarkedSplits:
    """Load `<split>_captions.csv`, `<split>_concepts.csv` and the images beside them, in a folder or a zip.

    Rows whose image cannot be read are kept, with the reason in the column `UNUSABLE`. `concepts` are the "manual"
    ones, or "all", which tools have found too; None: all, else manual, else none.

    Raises:
        UserError: a table or a zip cannot be read, or a table has no images or `concepts` beside it.
    """
    kinds = {"manual": ("_manual",), "all": ("",)}.get(concepts or "", ("", "_manual"))
    splits = {}
    for name, split in SPLIT_FILES.items():
        captions = folder / f"{name}_captions.csv"
        if not captions.is_file():
            continue
        tables = [path for kind in kinds if (path := folder / f"{name}_concepts{kind}.csv").is_file()]
        if concepts and not tables:
            missing = f"{name}_concepts{kinds[0]}.csv"
            raise UserError(f"'{folder / missing}' does not exist; leave --concepts {concepts} out, or download it")
        places = [folder / f"{name}_images", folder / name, folder / f"{name}_images.zip"]
        images = next(filter(Path.exists, places), None)
        if images is None:
            raise UserError(f"'{captions}' has no images beside it: '{places[0]}' and '{places[2]}' do not exist")
        arguments = {"captions": str(captions), "images": str(images), "concepts": str(tables[0]) if tables else None}
        # A changed table, zip or listing is read again; the check of rows looks at the files of images
        statuses = map(os.stat, (captions, images, *tables[:1]))
        arguments["state"] = tuple((status.st_size, status.st_mtime_ns) for status in statuses)  # a list is shards
        splits[split] = Dataset.from_generator(_zenodo_rows, features=FEATURES, gen_kwargs=arguments, split=split)
    return MarkedSplits(splits)


def concept_names(folder: str | os.PathLike) -> dict[str, str]:
    """Return the name of each concept in `cui_mapping.csv` of a folder, if there is such a file.

    Raises:
        UserError: the file has no columns `CUI` and `Canonical name`.
    """
    path = os.path.join(folder, "cui_mapping.csv")
    rows = read_csv_rows(path, ("CUI", "Canonical name")) if os.path.isfile(path) else ()
    return {(row["CUI"] or "").strip(): (row["Canonical name"] or "").strip() for row in rows}


def _zenodo_rows(captions: str, concepts: str | None, images: str, state: tuple) -> Iterator[dict[str, Any]]:
    cuis = {row["ID"]: row["CUIs"] for row in read_csv_rows(concepts, ("ID", "CUIs"))} if concepts else {}
    with as_user_error(f"'{images}' cannot be read as a zip", "download it again"):
        archive = zipfile.ZipFile(images) if images.endswith(".zip") else None
    # Depending on the version of the record, the zips hold the images in a folder or not
    files = {Path(name).stem: name for name in (archive.namelist() if archive else os.listdir(images))}
    root = [os.path.realpath(images)]
    row = None
    for row in read_csv_rows(captions, ("ID", "Caption")):
        image, reason, file = None, MISSING, files.get(row["ID"])
        # Only names that the folder itself lists: an id cannot be a path out of it
        if file and archive:
            content, reason = _read_member(archive, archive.getinfo(file))
            image = {"bytes": content, "path": None}
        elif file:
            path = os.path.join(images, file)
            image = {"bytes": None, "path": path}
            reason = LINK_OUT if os.path.islink(path) and not is_inside(path, root) else None
        if None in row:  # `csv.DictReader` found fields beyond the last column
            reason = EXTRA_FIELDS
        yield {
            "image": None if reason else image,  # so that nothing later reads what must not be read
            UNUSABLE: reason,
            "image_id": row["ID"] or "",
            "caption": row["Caption"],
            "cui": (cuis.get(row["ID"]) or "").split(";"),  # `check_rows` leaves empty ones out
        }
    if row is None:  # the error of `datasets` would not name the file
        raise UserError(f"'{captions}' holds no row below its columns; add captions or remove it")


def is_inside(path: str, roots: list[str]) -> bool:
    """Tell whether a path, links followed, is inside one of the `roots`, which are real paths."""
    return "\0" not in path and any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[bytes | None, str | None]:
    """Return a member's content, of no more than the size that the zip states, or the reason to reject its row."""
    size, packed = member.file_size, member.compress_size
    if stat.S_ISLNK(member.external_attr >> 16):
        return None, "unreadable image: a symbolic link in the zip"
    if size > MAX_MEMBER or size > max(MAX_UNPACKED * packed, SMALL_MEMBER):
        return None, f"unreadable image: {packed:,} bytes in the zip unpack to {size:,}"
    try:
        return archive.read(member), None
    except Exception as error:  # damaged, encrypted, or compressed by an unknown method
        return None, f"unreadable image: cannot be unpacked: {first_line(error)}"
