"""The work of `python -m captioning prepare`."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image

from captioning.data.checks import check_rows, usable
from captioning.data.describe import describe, description_table
from captioning.data.dicom import PREAMBLE, is_dicom
from captioning.data.images import png_of_dicom
from captioning.data.layout import Layout
from captioning.data.leaks import find_leaks
from captioning.data.sources import UNFINISHED, load_source
from captioning.data.zenodo import concept_names
from captioning.errors import UserError
from captioning.files import to_json
from captioning.hub.client import limit_waiting


STORED = ("image", "image_id", "caption", "cui")  # and no groups, which may be patients
BEFORE_STORING = {UNFINISHED, "rejected.jsonl"}  # in a folder that `prepare` has made, until it stores rows


def prepare(arguments: argparse.Namespace) -> None:
    """Store the usable rows of any source with `save_to_disk`, or print its statistics with `--describe`."""
    if arguments.describe == (arguments.folder is not None):
        raise UserError("give a FOLDER to write, or --describe, which writes nothing; see --help")
    if not 0 <= arguments.max_rejected_fraction <= 1:
        raise UserError(f"max_rejected_fraction is {arguments.max_rejected_fraction}; set it from 0 to 1")
    layout = Layout(**{item.name: getattr(arguments, item.name) for item in fields(Layout)})
    folder = arguments.folder and Path(arguments.folder)
    there = {path.name for path in folder.iterdir()} if folder and folder.is_dir() else set()
    if there - BEFORE_STORING or (folder and folder.is_file()):
        if UNFINISHED in there:
            raise UserError(f"'{folder}' is half written: an earlier `prepare` was stopped; delete it and run again")
        raise UserError(f"'{folder}' exists and is not an empty folder; name a new one")
    limit_waiting()
    dataset = load_source(arguments.source, arguments.revision, layout=layout)
    if arguments.describe:
        result = describe(dataset, concept_names(arguments.source), arguments.num_proc)
        print(to_json(result, indent=2) if arguments.json else description_table(arguments.source, result))
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).touch()
        checked = check_rows(dataset, arguments.max_rejected_fraction, folder / "rejected.jsonl", arguments.num_proc)
        rows_to_store = {split: usable(rows) for split, rows in checked.items()}
        find_leaks(rows_to_store)
        stored = DatasetDict({
            split: _without_headers(rows.select_columns([*STORED])).cast_column("image", Image())
            for split, rows in rows_to_store.items()
        })  # fmt: skip
        stored.save_to_disk(str(folder), num_proc=arguments.num_proc)
        (folder / UNFINISHED).unlink()
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be written: {error}") from error
    print(f"{folder}: " + ", ".join(f"{split} {len(rows):,}" for split, rows in stored.items()))


def _without_headers(rows: Dataset) -> Dataset:
    """Return rows whose DICOM images are PNG: the data set would store their headers, which name patients."""
    content, paths = (pc.struct_field(rows.data.column("image"), name) for name in ("bytes", "path"))
    starts = pc.binary_slice(content, 0, PREAMBLE + 4).to_pylist()
    pairs = zip(starts, paths.to_pylist(), strict=True)
    if not any(is_dicom(path if start is None else start) for start, path in pairs if start is not None or path):
        return rows
    # Few are in memory before they are written
    return rows.map(_encode, features=rows.features, writer_batch_size=64, desc="Encoding DICOM")


def _encode(row: dict[str, Any]) -> dict[str, Any]:
    return {"image": png_of_dicom(row["image"])}
