"""Captions on disk: the predictions of a run as JSON lines, and those of any system as CSV.

The CSVs are those of ROCOv2 on Zenodo and of ImageCLEFmedical Caption: `ID,Caption`, and `ID,CUIs` with `;` between
concepts.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from captioning.errors import UserError, as_user_error
from captioning.files import to_json, write_whole
from metrics import wording_scores


MAX_FIELD = 2**27  # characters of a CSV field; the default of the csv module is too small for a long caption


@dataclass(frozen=True)
class Captions:
    """What a system wrote for N images, the full references, and the concepts of each image, empty if unknown."""

    image_ids: list[str]
    predictions: list[str]
    references: list[str]
    cuis: list[list[str]]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)


def write_predictions(
    path: Path,
    captions: Captions,
    nll: np.ndarray,
    concepts: Sequence[list[str]] | None = None,
    retrieved: Sequence[list[str]] | None = None,
) -> list[dict[str, Any]]:
    """Write a file of one JSON object for each image and line, whole or not at all, and return the objects.

    `nll`, `[N]`, is the negative log-likelihood of the whole reference in nats. The concepts of the images are written
    too, so that the file alone can be scored; so are, where given, the predicted `concepts` of each image, and the ids
    of those whose captions were `retrieved` for its prompt.
    """
    scores = wording_scores(tuple(captions.predictions), tuple(captions.references))["rougeL"].tolist()
    columns = {
        "image_id": captions.image_ids,
        "reference": captions.references,
        "prediction": captions.predictions,
        "rougeL": scores,
        "nll": nll.tolist(),
        "cui": captions.cuis,
    }
    columns |= {name: own for name, own in (("concepts", concepts), ("retrieved", retrieved)) if own}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{to_json(row, ensure_ascii=False)}\n" for row in rows))
    return rows


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read a file of `write_predictions`."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_captions(path: str, references: str | None = None, concepts: str | None = None) -> Captions:
    """Read the captions of any system, JSON lines of a run or a CSV of `ID,Caption`.

    `references` is a CSV of `ID,Caption`, in whose order the captions are returned, `concepts` one of `ID,CUIs`; JSON
    lines may have their own.

    Raises:
        UserError: a file cannot be read, or its ids are not those of the references.
    """
    if path.lower().endswith(".csv"):
        rows = {image_id: {"prediction": text} for image_id, text in read_csv(path, "Caption").items()}
    else:
        rows = _read_json_lines(path)
    if references:
        truth = read_csv(references, "Caption")
    else:
        truth = {image_id: row["reference"] for image_id, row in rows.items() if "reference" in row}
        if missing := [image_id for image_id in rows if image_id not in truth]:
            raise UserError(f"'{path}': '{missing[0]}' has no reference; add --references with a CSV of ID,Caption")
    check_ids(rows, truth, path, references or path)
    cuis = {image_id: row.get("cui", []) for image_id, row in rows.items()}
    if concepts:
        cuis = {image_id: split_cuis(text) for image_id, text in read_csv(concepts, "CUIs").items()}
        check_ids(cuis, truth, concepts, references or path, more=True)
    return Captions(list(truth), [rows[i]["prediction"] for i in truth], [*truth.values()], [cuis[i] for i in truth])


def read_csv(path: str, *columns: str) -> dict[str, str]:
    """Read a CSV of `ID` and one of `columns` into a dict from id to text, in the order of the file.

    As in the official evaluator, the header may be missing; more columns than two are an error.

    Raises:
        UserError: the file cannot be read, has other columns, an id twice, or no rows.
    """
    csv.field_size_limit(MAX_FIELD)
    what = f"a CSV of ID,{' or ID,'.join(columns)}"
    texts: dict[str, str] = {}
    with (
        as_user_error(f"'{path}' cannot be read", f"give {what} in UTF-8"),
        open(path, encoding="utf-8-sig", newline="") as file,
    ):
        for number, row in enumerate(reader := csv.reader(file)):
            where = f"'{path}', line {reader.line_num}"
            if number == 0 and row and row[0].strip().lower() == "id":
                if [name.strip().lower() for name in row[1:]] not in [[column.lower()] for column in columns]:
                    raise UserError(f"'{path}' has the columns {row}; give {what}")
            elif len(row) not in (0, 2):
                raise UserError(f"{where}: fields: {len(row)}, not 2; give {what}, text with a comma in double quotes")
            elif row and row[0] in texts:
                raise UserError(f"{where}: id '{row[0]}' occurs twice; keep one")
            elif row:
                texts[row[0]] = row[1]
    if not texts:
        raise UserError(f"'{path}' has no rows; give {what} with at least one")
    return texts


def _read_json_lines(path: str) -> dict[str, dict[str, Any]]:
    """Read `prediction` and, where they are stated, `reference` and `cui` by image id."""
    rows: dict[str, dict[str, Any]] = {}
    mend = "give predictions of a run, or a .csv of ID,Caption"
    what = "is not a JSON object of strings image_id, prediction and reference, and a list cui"
    with as_user_error(f"'{path}' cannot be read", mend), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            with as_user_error(f"{where} {what}", mend):
                row = json.loads(line)
                keys = ("prediction", "reference") if "reference" in row else ("prediction",)
                image_id, texts = well_formed(row["image_id"]), {key: well_formed(row[key]) for key in keys}
                cuis = row.get("cui") or []
                cuis = split_cuis(cuis) if isinstance(cuis, str) else [str.strip(cui) for cui in cuis]
            if image_id in rows:
                raise UserError(f"{where}: id '{image_id}' occurs twice; keep one")
            rows[image_id] = texts | {"cui": cuis}
    if not rows:
        raise UserError(f"'{path}' has no captions; {mend}")
    return rows


def split_cuis(text: str) -> list[str]:
    """Return the concepts of a field of `ID,CUIs`, which may be empty."""
    return [cui.strip() for cui in text.split(";") if cui.strip()]


def well_formed(text: str) -> str:
    """Return the text with unpaired surrogates, which JSON can hold and UTF-8 cannot, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def id_faults(found: Iterable[str], wanted: Iterable[str], reference: str) -> list[str]:
    """Return a line for the ids of the file `reference` that are not found, and one for those that only are found."""
    faults = []
    for ids, others, what in (
        (wanted, set(found), f"lacks ids of '{reference}'"),
        (found, set(wanted), f"has ids that '{reference}' lacks"),
    ):
        if differ := [image_id for image_id in ids if image_id not in others]:
            faults.append(f"{what}: {len(differ)} ({', '.join(differ[:3])})")
    return faults


def check_ids(found: Iterable[str], wanted: Iterable[str], path: str, reference: str, more: bool = False) -> None:
    """Check that the file `path` has the ids of the file `reference`; it may have `more`.

    Raises:
        UserError: ids are missing or unknown; the message counts them and names some.
    """
    if faults := id_faults(set(found) & set(wanted) if more else found, wanted, reference):
        raise UserError(f"'{path}' {faults[0]}; both must be of one split, ids alike")


def in_order_of(like: Captions, captions: Captions, name: str, other_name: str) -> Captions:
    """Return `captions` in the order of `like`; the names are those of the files of `like` and `captions`.

    Raises:
        UserError: the two are not about the same images, or have other references.
    """
    check_ids(captions.image_ids, like.image_ids, other_name, name)
    texts = dict(zip(captions.image_ids, zip(captions.predictions, captions.references, strict=True), strict=True))
    predictions, references = map(list, zip(*(texts[image_id] for image_id in like.image_ids), strict=True))
    differ = [i for i, own, other in zip(like.image_ids, like.references, references, strict=True) if own != other]
    if differ:
        raise UserError(
            f"'{name}' and '{other_name}' differ in the references of images: {len(differ)} ({differ[0]}); both must "
            "be scored on the same data"
        )
    return replace(like, predictions=predictions)
