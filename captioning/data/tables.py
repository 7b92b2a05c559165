"""Tables of captions, CSV and JSON lines, read row by row; a fault is named with its file and line."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captioning.errors import UserError, as_user_error


TABLE_ENDINGS = (".jsonl", ".csv", ".tsv", ".json")
MAX_FIELD = 2**27  # characters; the default of `csv`, 2**17, refuses a long caption
EXTRA_FIELDS = "more fields than columns: put the caption in double quotes"


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV, a TSV or a file of JSON lines as dicts; UserError if it is not one in UTF-8."""
    return _read_json_rows(path) if path.suffix.lower().startswith(".json") else read_csv_rows(str(path))


def _read_json_rows(path: Path) -> Iterator[dict[str, Any]]:
    mend = "write one JSON object a line"
    with as_user_error(f"'{path}' cannot be read", mend), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                with as_user_error(f"'{path}', line {number} is not a JSON object", mend):
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"it is of type {type(row).__name__}")
                yield row


def read_csv_rows(path: str, needed: Sequence[str] = ()) -> Iterator[dict[str | None, Any]]:
    """Yield the rows of a CSV, separated by commas, semicolons or tabs; under None the fields beyond the last column.

    Raises:
        UserError: the file is empty, lacks a column of `needed`, or is not CSV in UTF-8.
    """
    csv.field_size_limit(MAX_FIELD)
    lines: list[str] = []  # of the current row
    rows = csv.DictReader(())
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            header = re.sub('"[^"]*"', "", file.readline())
            delimiter = max((",", ";", "\t"), key=header.count)  # Excel writes semicolons in many countries
            file.seek(0)
            rows = csv.DictReader((lines.append(line) or line for line in file), delimiter=delimiter)
            _check_columns(path, rows.fieldnames or (), needed)
            lines.clear()  # of the header
            for row in rows:
                if len(lines) > 1 and _ends_in_quotes(lines, delimiter):
                    first = rows.line_num - len(lines) + 1
                    raise UserError(f"'{path}', line {first}: a double quote is not closed; close it, or double it")
                lines.clear()
                yield row
        except csv.Error as error:
            raise UserError(f"'{path}', line {rows.line_num + 1} is not CSV: {error}; correct or remove it") from error
        except UnicodeDecodeError as error:
            raise UserError(f"'{path}' is not UTF-8 after line {rows.line_num}; save it as UTF-8") from error


def _check_columns(path: str, names: Sequence[str], needed: Sequence[str]) -> None:
    if not names:
        raise UserError(f"'{path}' is empty; add captions or remove it")
    if not set(needed) <= set(names):
        there = ", ".join(names[:8])[:300]
        raise UserError(f"'{path}' has the columns {there}; {' and '.join(needed)} are needed")
    if repeated := [name for name, count in Counter(names).items() if name and count > 1]:
        raise UserError(f"'{path}' has column '{repeated[0][:300]}' twice; rename one")


def _ends_in_quotes(lines: list[str], delimiter: str) -> bool:
    """Tell whether a row runs to the end of the file because a quote is not closed: it swallows the rows below it."""
    try:
        list(csv.reader(lines, strict=True, delimiter=delimiter))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False
