"""ImageCLEFmedical Caption submissions: written, and checked by the rules of the official checker of 2026.

The rules are those of `submission_check.py` in github.com/taubsity/clef-caption-evaluation-2026.
"""

import csv
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from captioning.errors import UserError
from captioning.files import write_whole
from captioning.scoring.captions import MAX_FIELD, SHOWN_IDS, well_formed


OFFICIAL_MAX_FIELD = 2**17  # the default of the csv module, with which the official checker reads
CUI = re.compile(r"C\d+")
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the zip of the same captions has the same bytes


def write_submission(folder: Path, image_ids: Sequence[str], captions: Sequence[str]) -> Path:
    """Write `submission.csv` and `submission.zip`, which contains only the CSV, and return the path of the CSV.

    Every caption is in double quotes and on one line: the official checker counts lines, which end where
    `str.splitlines` ends them. A caption that is longer than the field that it can read is cut.

    Raises:
        UserError: an id cannot be written in a submission, or occurs twice.
    """
    if len(set(image_ids)) < len(image_ids):
        raise UserError("an image id occurs twice; a submission must have each once")
    for image_id in image_ids:
        broken = image_id != well_formed(image_id) or len(image_id.splitlines()) != 1
        if broken or image_id != image_id.strip() or set(image_id) & set(',"'):
            raise UserError(
                f"image id '{image_id}' cannot be written in a submission; it must be text without , or \""
            )
    lines = ["ID,Caption", *(f"{i},{_quoted(text)}" for i, text in zip(image_ids, captions, strict=True))]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    write_whole(folder / "submission.csv", content)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("submission.csv", ZIP_TIME), content, zipfile.ZIP_DEFLATED)
    write_whole(folder / "submission.zip", buffer.getvalue())
    return folder / "submission.csv"


def _quoted(caption: str) -> str:
    words = well_formed(caption.replace("\0", " ")).split()  # Python's csv before 3.11 reads no NUL
    return '"' + " ".join(words)[: OFFICIAL_MAX_FIELD // 2].replace('"', '""') + '"'


def check_submission(path: str, references: str | None = None) -> list[str]:
    """Check a submission of captions (`ID,Caption`) or concepts (`ID,CUIs`) by the rules of the official checker.

    Args:
        path: `submission.csv`, or a zip that contains nothing else.
        references: CSV of the ground truth; without it, ids and their order are not checked.

    Returns:
        The faults, each one line that says where it is and how to mend it; empty for a valid submission.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        text = _submission_content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        return [f"the file is not UTF-8 (byte {error.start}); save it as UTF-8"]
    except UserError:  # is a ValueError
        raise
    except ValueError as error:
        return [str(error)]
    if text.startswith("\ufeff"):
        return ["the file starts with a byte order mark; save it as UTF-8 without BOM"]
    lines = text.splitlines()
    faults = [f"line {number}: blank; remove it" for number, line in enumerate(lines, 1) if not line.strip()]
    csv.field_size_limit(OFFICIAL_MAX_FIELD)
    try:
        header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    except csv.Error as error:
        mend = "shorten it" if "limit" in str(error) else "put captions in double quotes, and double quotes in them"
        return [*faults, f"the file is not a CSV: {error}; {mend}"]
    if header not in (["ID", "Caption"], ["ID", "CUIs"]):
        return [*faults, f"line 1: the header is {','.join(header)!r}; it must be ID,Caption or ID,CUIs"]
    if not rows:
        faults.append("there are no rows; add one for each image")
    for number, (row, line) in enumerate(zip(rows, lines[1:], strict=False), 2):  # see `_row_faults`
        faults += _row_faults(number, row, line, header[1])
    return faults + _id_faults([row[0] for row in rows if row], references)


def _submission_content(path: str) -> bytes:
    try:
        if not path.lower().endswith(".zip"):
            return Path(path).read_bytes()
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if names != ["submission.csv"]:
                raise ValueError(
                    f"the zip contains {', '.join(names) or 'nothing'}; it must contain submission.csv only"
                )
            return archive.read("submission.csv")
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"submission '{path}' cannot be read: {error}; give a submission.csv or its zip") from error


def _row_faults(number: int, row: list[str], line: str, column: str) -> list[str]:
    """Return the faults of a row.

    The official checker takes the n-th line of the file for the n-th row. After a caption with a line break it reads
    the wrong lines, and may reject the file or not: `write_submission` removes line breaks.
    """
    if len(row) != 2:
        return [f"row {number}: {len(row)} fields; put the {column} in double quotes, and nothing after them"]
    image_id, text = row
    faults = []
    if image_id != image_id.strip():
        faults.append(f"row {number}: the id '{image_id}' starts or ends with white space; remove it")
    if column == "Caption":
        _, _, raw = line.partition(",")
        if "," in raw and not (raw.startswith('"') and raw.endswith('"')):
            faults.append(
                f"row {number}: the caption has a comma or a line break; put it in double quotes, and on one line"
            )
        return faults
    if text != text.strip():
        faults.append(f"row {number}: the CUIs start or end with white space; remove it")
    cuis = [cui.strip() for cui in text.split(";")] if text.strip() else []
    faults += [f"row {number}: '{cui}' is not a concept such as C0040405" for cui in cuis if not CUI.fullmatch(cui)]
    if len(set(cuis)) < len(cuis):
        faults.append(f"row {number}: a concept occurs twice; keep one")
    return faults


def _id_faults(ids: list[str], references: str | None) -> list[str]:
    seen: set[str] = set()
    faults = []
    for number, image_id in enumerate(ids, 2):
        if image_id in seen:
            faults.append(f"row {number}: id '{image_id}' occurs twice; keep one")
        seen.add(image_id)
    if references is None:
        return faults
    wanted = _ids_of(references)
    wanted_ids = set(wanted)
    unknown = [image_id for image_id in ids if image_id not in wanted_ids]
    missing = [image_id for image_id in wanted if image_id not in seen]
    for what, some in (("not among the official ones; remove them", unknown), ("missing; add them", missing)):
        if some:
            faults.append(f"{len(some)} ids are {what} ({', '.join(some[:SHOWN_IDS])})")
    if not faults:
        for number, (image_id, expected) in enumerate(zip(ids, wanted, strict=False), 2):
            if image_id != expected:
                return [
                    f"row {number}: id '{image_id}' where '{expected}' is expected; use the order of '{references}'"
                ]
    return faults


def _ids_of(references: str) -> list[str]:
    """Return the ids of a CSV of captions or of concepts."""
    csv.field_size_limit(MAX_FIELD)
    try:
        with open(references, encoding="utf-8-sig", newline="") as file:
            ids = [row[0].strip() for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{references}' cannot be read as a CSV of ids: {error}") from error
    ids = ids[1:] if ids and ids[0].lower() == "id" else ids
    if not ids:
        raise UserError(f"'{references}' has no ids; give the CSV of the ground truth")
    return ids
