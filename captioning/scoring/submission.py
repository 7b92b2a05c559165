"""ImageCLEFmedical Caption submissions: written, and checked by the rules of the official checker of 2026.

The rules are those of `caption_prediction/submission_check.py` and `concept_detection/submission_check.py` in
github.com/taubsity/clef-caption-evaluation-2026.
"""

import csv
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.errors import UserError, as_user_error
from captioning.files import write_whole
from captioning.models.concept_head import MAX_CONCEPTS
from captioning.scoring.captions import id_faults, read_csv, well_formed


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
    return _write_rows(folder, "submission", "Caption", image_ids, map(_quoted, captions))


def write_concepts(folder: Path, image_ids: Sequence[str], concepts: Sequence[Iterable[str]]) -> Path:
    """Write `submission_concepts.csv` (`ID,CUIs`), and a zip that contains it as `submission.csv`; return its path.

    Raises:
        UserError: see `write_submission`; or an image has more than `MAX_CONCEPTS`, or something else than a CUI.
    """
    fields = []
    for image_id, found in zip(image_ids, concepts, strict=True):
        cuis = sorted({cui.strip().upper() for cui in found})
        if faults := _concept_faults(cuis):
            raise UserError(f"image '{image_id}': {faults[0]}")
        fields.append(";".join(cuis))
    return _write_rows(folder, "submission_concepts", "CUIs", image_ids, fields)


def _write_rows(folder: Path, stem: str, column: str, image_ids: Sequence[str], fields: Iterable[str]) -> Path:
    if len(set(image_ids)) < len(image_ids):
        raise UserError("an image id occurs twice; a submission must have each once")
    for image_id in image_ids:
        one_line = image_id == image_id.strip() and len(image_id.splitlines()) == 1
        if not one_line or image_id != well_formed(image_id) or set(image_id) & set(',"'):
            raise UserError(f"image id '{image_id}' cannot be in a submission; it must be text without , or \"")
    lines = [f"ID,{column}", *(f"{image_id},{field}" for image_id, field in zip(image_ids, fields, strict=True))]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    write_whole(folder / f"{stem}.csv", content)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("submission.csv", ZIP_TIME), content, zipfile.ZIP_DEFLATED)
    write_whole(folder / f"{stem}.zip", buffer.getvalue())
    return folder / f"{stem}.csv"


def _quoted(caption: str) -> str:
    words = well_formed(caption.replace("\0", " ")).split()  # Python's csv before 3.11 reads no NUL
    return '"' + " ".join(words)[: OFFICIAL_MAX_FIELD // 2].replace('"', '""') + '"'


def check_submission(path: str, references: str | None = None) -> list[str]:
    """Check a submission of captions (`ID,Caption`) or concepts (`ID,CUIs`), `submission.csv` or a zip of it alone.

    Returns:
        The faults, each one line that says where it is and how to mend it; empty for a valid submission. Ids and their
        order are checked by `references`, the CSV of the ground truth.

    Raises:
        UserError: a file cannot be read.
    """
    with as_user_error(f"submission '{path}' cannot be read", "give a submission.csv in UTF-8, or its zip"):
        text = _submission_content(path).decode("utf-8")
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
    # The official checker takes the n-th line of the file for the n-th row, also after a caption with a line break
    for number, (row, line) in enumerate(zip(rows, lines[1:], strict=False), 2):
        faults += [f"row {number}: {fault}" for fault in _row_faults(row, line, header[1])]
    ids = [row[0] for row in rows if row]
    faults += [f"id '{own}' occurs {count} times; keep one" for own, count in Counter(ids).items() if count > 1]
    if references is None:
        return faults
    wanted = list(read_csv(references, "Caption", "CUIs"))
    faults += id_faults(ids, wanted, references)
    if not faults:
        pairs = enumerate(zip(ids, wanted, strict=True), 2)
        wrong = [f"row {row}: id '{own}' where '{other}' is expected" for row, (own, other) in pairs if own != other]
        faults = [f"{fault}; use the order of '{references}'" for fault in wrong[:1]]
    return faults


def _submission_content(path: str) -> bytes:
    if not path.lower().endswith(".zip"):
        return Path(path).read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if names != ["submission.csv"]:
            raise UserError(f"'{path}' contains {', '.join(names) or 'nothing'}; it must contain submission.csv only")
        return archive.read("submission.csv")


def _row_faults(row: list[str], line: str, column: str) -> list[str]:
    if len(row) != 2:
        return [f"fields: {len(row)}, not 2; put the {column} in double quotes, and nothing after them"]
    image_id, text = row
    faults = []
    if image_id != image_id.strip():
        faults.append(f"the id '{image_id}' starts or ends with white space; remove it")
    if column == "Caption":
        _, _, raw = line.partition(",")
        if "," in raw and not (raw.startswith('"') and raw.endswith('"')):
            faults.append("the caption has a comma or a line break; put it in double quotes, and on one line")
        return faults
    if text != text.strip():
        faults.append("the CUIs start or end with white space; remove it")
    return faults + _concept_faults([cui.strip() for cui in text.split(";")] if text.strip() else [])


def _concept_faults(cuis: Sequence[str]) -> list[str]:
    faults = [f"'{cui}' is not a concept such as C0040405" for cui in cuis if not CUI.fullmatch(cui)]
    if len(set(cuis)) < len(cuis):
        faults.append("a concept occurs twice; keep one")
    if len(cuis) > MAX_CONCEPTS:  # the rule of the evaluator, which the checker lacks
        faults.append(f"concepts: {len(cuis)}; keep at most {MAX_CONCEPTS}")
    return faults
