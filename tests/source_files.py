"""Images and tables of captions as people have them."""

import csv
import io
import json
import shutil
from pathlib import Path

from datasets import Dataset, DatasetDict, Image
from helpers import make_png, read_lines

from captioning.data.checks import check_rows


def write_images(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_png(seed))
    return folder


def write_table(path: Path, *rows: dict, delimiter: str = ",") -> Path:
    """Write rows as JSON lines or CSV, by the ending of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    if path.suffix == ".jsonl":
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def zenodo_folder(folder: Path, zipped: bool = False) -> Path:
    """The layout of record 10821435: a `valid` split, ids with gaps, concepts that may be empty."""
    for split in ("train", "valid", "test"):
        ids = [f"ROCOv2_2023_{split}_{i:06d}" for i in (1, 2, 5, 9)]
        captions = (f'A "quoted", comma-separated\ncaption {i}' for i in range(4))
        tables = {
            "captions": [{"ID": name, "Caption": text} for name, text in zip(ids, captions, strict=True)],
            "concepts_manual": [{"ID": name, "CUIs": "C1306645"} for name in ids],
            "concepts": [  # the last id has no row
                {"ID": name, "CUIs": cuis}
                for name, cuis in zip(ids[:3], ["C0040405;C0817096", "", "C1306645"], strict=True)
            ],
        }
        for name, rows in tables.items():
            write_table(folder / f"{split}_{name}.csv", *rows)
        images = write_images(folder / f"{split}_images", *(f"{name}.png" for name in ids))
        if zipped:
            zip_folder(images)
    return folder


def zip_folder(folder: Path) -> None:
    """Put a folder into a zip beside it, and remove it."""
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    shutil.rmtree(folder)


def write_parquet(folder: Path, **splits: Dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}-0.parquet")
    return folder


def undecoded(**splits: Dataset) -> DatasetDict:
    return DatasetDict({split: rows.cast_column("image", Image(decode=False)) for split, rows in splits.items()})


def rejected(dataset: DatasetDict, folder: Path) -> list[dict]:
    """Check the rows; return those that are marked, as they are listed in the folder."""
    check_rows(dataset, 1.0, folder / "rejected.jsonl")
    return read_lines(folder / "rejected.jsonl")
