"""Captions on disk: the predictions of a run as JSON lines, and those of any system as CSV.

The CSVs are those of ROCOv2 on Zenodo and of ImageCLEFmedical Caption: `ID,Caption`, and `ID,CUIs` with `;` between
concepts.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.errors import UserError
from captioning.files import write_whole
from metrics import wording_scores


PREDICTION_KEYS = ("image_id", "reference", "prediction", "rougeL", "nll", "cui")
MAX_FIELD = 2**27  # characters of a CSV field; the default of the csv module is too small for a long caption
SHOWN_IDS = 3  # in an error message


@dataclass(frozen=True)
class Captions:
    """What a system wrote for N images, beside the references.

    Attributes:
        image_ids: N ids.
        predictions: N captions.
        references: N full captions.
        cuis: the concepts of each image, empty where none are known.
    """

    image_ids: list[str]
    predictions: list[str]
    references: list[str]
    cuis: list[list[str]]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)


# --- The predictions of a run ---------------------------------------------------------------------------------


def write_predictions(path: Path, captions: Captions, nll: np.ndarray) -> list[dict[str, object]]:
    """Write one JSON object a line: `image_id`, `reference`, `prediction`, `rougeL`, `nll`, `cui`. Return these.

    Args:
        path: the file; it appears whole or not at all.
        captions: of N images. Their concepts are written too, so that the file alone can be scored.
        nll: `[N]`, the negative log-likelihood of the whole reference in nats.
    """
    scores = wording_scores(tuple(captions.predictions), tuple(captions.references))["rougeL"].tolist()
    columns = (captions.image_ids, captions.references, captions.predictions, scores, nll.tolist(), captions.cuis)
    rows = [dict(zip(PREDICTION_KEYS, row, strict=True)) for row in zip(*columns, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return rows


def read_predictions(path: Path) -> list[dict[str, object]]:
    """Read a file of `write_predictions`."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- The captions of any system -------------------------------------------------------------------------------


def read_captions(path: str, references: str | None = None, concepts: str | None = None) -> Captions:
    """Read the captions of any system.

    Args:
        path: JSON lines of a run, or a CSV with `ID,Caption`.
        references: CSV with `ID,Caption`, in whose order the captions are returned; JSON lines have their own.
        concepts: CSV with `ID,CUIs`; JSON lines may have their own.

    Raises:
        UserError: a file cannot be read, or its ids are not those of the references.
    """
    if _is_csv(path):
        if references is None:
            raise UserError(f"'{path}' has no reference captions; add --references with a CSV of ID,Caption")
        predictions, own_references, cuis = read_csv(path, "Caption"), {}, {}
    else:
        rows = _read_json_lines(path)
        predictions = {image_id: row["prediction"] for image_id, row in rows.items()}
        own_references = {image_id: row["reference"] for image_id, row in rows.items() if "reference" in row}
        cuis = {image_id: row["cui"] for image_id, row in rows.items()}
        if references is None and len(own_references) < len(rows):
            missing = next(image_id for image_id in rows if image_id not in own_references)
            raise UserError(f"'{path}': '{missing}' has no reference; add --references with a CSV of ID,Caption")
    truth = read_csv(references, "Caption") if references else own_references
    for captions, name in ((predictions, path), (truth, references or path)):
        if not captions:
            raise UserError(f"'{name}' has no captions; give a file with at least one")
    check_ids(predictions, truth, path, references or path)
    if concepts:
        cuis = {image_id: split_cuis(text) for image_id, text in read_csv(concepts, "CUIs").items()}
        check_ids(cuis, truth, concepts, references or path, more=True)
    ids = list(truth)
    return Captions(ids, [predictions[i] for i in ids], [truth[i] for i in ids], [cuis.get(i, []) for i in ids])


def check_ids(found: Sequence[str], wanted: Sequence[str], path: str, reference: str, more: bool = False) -> None:
    """Check that a file has the ids of another.

    Args:
        found: the ids of the file.
        wanted: the ids of the other, all of which must be found.
        path: the name of the file.
        reference: the name of the other.
        more: whether the file may have more ids.

    Raises:
        UserError: ids are missing or unknown; the message counts them and names some.
    """
    wanted_ids, found_ids = set(wanted), set(found)
    missing = [image_id for image_id in wanted if image_id not in found_ids]
    unknown = [] if more else [image_id for image_id in found if image_id not in wanted_ids]
    for ids, what in ((missing, f"of '{reference}' are missing in"), (unknown, f"not in '{reference}' are in")):
        if ids:
            named = ", ".join(ids[:SHOWN_IDS])
            raise UserError(f"{len(ids)} ids {what} '{path}' ({named}); both must be of one split, ids alike")


def read_csv(path: str, column: str) -> dict[str, str]:
    """Read a CSV of `ID` and `column` into a dict from id to text, in the order of the file.

    As in the official evaluator, the header may be missing; more columns than two are an error.

    Raises:
        UserError: the file cannot be read, has other columns, or an id twice.
    """
    csv.field_size_limit(MAX_FIELD)
    texts: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(reader := csv.reader(file)):
                if not row:
                    continue
                if number == 0 and row[0].strip().lower() == "id":
                    if [name.strip().lower() for name in row[1:]] != [column.lower()]:
                        raise UserError(f"'{path}' has the columns {row}; they must be {['ID', column]}")
                elif len(row) != 2:
                    mend = f"give ID and {column}, the latter in double quotes where it contains a comma"
                    if len(row) == 1 and re.search("[;\t]", row[0]):
                        mend = "separate the fields by commas"
                    raise UserError(f"'{path}', line {reader.line_num}: {len(row)} fields; {mend}")
                elif row[0] in texts:
                    raise UserError(f"'{path}', line {reader.line_num}: id '{row[0]}' occurs twice; keep one")
                else:
                    texts[row[0]] = row[1]
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 (byte {error.start}); save it as CSV in UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"'{path}' cannot be read as a CSV of ID,{column}: {error}") from error
    return texts


def split_cuis(text: str) -> list[str]:
    """Return the concepts of a field of `ID,CUIs`, which may be empty."""
    return [cui.strip() for cui in text.split(";") if cui.strip()]


def _is_csv(path: str) -> bool:
    return path.lower().endswith(".csv")


def _read_json_lines(path: str) -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    image_id, texts = row["image_id"], [row["prediction"], row.get("reference", "")]
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    raise UserError(
                        f"'{path}', line {number} is not a JSON object with image_id and prediction "
                        f"({type(error).__name__}: {error}); give predictions of a run, or a .csv of ID,Caption"
                    ) from error
                if not all(isinstance(text, str) for text in (image_id, *texts)):
                    raise UserError(f"'{path}', line {number}: image_id, prediction and reference must be strings")
                if image_id in rows:
                    raise UserError(f"'{path}', line {number}: id '{image_id}' occurs twice; keep one")
                cuis = row.get("cui") or []
                cuis = split_cuis(cuis) if isinstance(cuis, str) else cuis
                if not (isinstance(cuis, list) and all(isinstance(cui, str) for cui in cuis)):
                    raise UserError(f"'{path}', line {number}: cui must be a list of concepts such as C0040405")
                texts = {key: well_formed(row[key]) for key in ("prediction", "reference") if key in row}
                rows[well_formed(image_id)] = texts | {"cui": cuis}
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 (byte {error.start}); give predictions of a run") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    return rows


def well_formed(text: str) -> str:
    """Return the text with unpaired surrogates, which JSON can hold and UTF-8 cannot, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def in_order_of(like: Captions, captions: Captions, name: str, other_name: str) -> Captions:
    """Return `captions` in the order of `like`; the names are those of the files of `like` and `captions`.

    Raises:
        UserError: the two are not about the same images, or have other references.
    """
    check_ids(captions.image_ids, like.image_ids, other_name, name)
    row = {image_id: i for i, image_id in enumerate(captions.image_ids)}
    rows = [row[image_id] for image_id in like.image_ids]
    columns = (captions.image_ids, captions.predictions, captions.references, captions.cuis)
    ordered = Captions(*([column[i] for i in rows] for column in columns))
    differ = [i for i, own in enumerate(ordered.references) if own != like.references[i]]
    if differ:
        raise UserError(
            f"'{name}' and '{other_name}' have different references for {len(differ)} images "
            f"({like.image_ids[differ[0]]}); both must be scored on the same data"
        )
    return ordered
