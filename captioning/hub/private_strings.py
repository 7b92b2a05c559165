"""The last look at what is pushed: a path or a token in any file stops the push before the first byte leaves.

Of text the values are read, since a caption may hold "AP/PA" or "mg/dl": one that begins like a path is a path. In
the bytes of weights and images only strings count that chance does not write into a terabyte.
"""

import csv
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from huggingface_hub import get_token

from captioning.errors import UserError, printable
from captioning.files import PROJECT


CHUNK, OVERLAP = 2**20, 2**10  # bytes; no string that is looked for is longer than the overlap
TEXT = (".json", ".jsonl", ".csv", ".md", ".txt", ".html")
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")  # hold any string
TOKENS = (
    r"hf_[A-Za-z0-9]{20,}", r"gh[opsur]_\w{36}", r"github_pat_\w{22,}", r"glpat-[\w-]{20,}",
    r"sk-(?:proj-|ant-)?\w{20,}", r"AKIA[0-9A-Z]{16}", r"AIza[\w-]{35}", r"xox[abprs]-[\w-]{20,}",
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----",
)  # fmt: skip
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
MIN_SECRET = 15  # characters; a shorter value in the environment may be a word
ROOTS = "home|Users|root|mnt|media|Volumes|private|tmp|var|srv|opt|usr|data|scratch|nfs|gpfs|lustre|work|workspace"
PATH_IN_TEXT = rf"(?<![\w.:/\\<-])/(?:{ROOTS})/[\w.~-]"
PATH_IN_BYTES = rf"/(?:{ROOTS})/[\w.-][\w./-]{{9,}}"
WHOLE_PATH = re.compile(
    r"\s*(file:/|~\w*(?<!\d)/\w|(\.\./)+\w|[A-Za-z]:(\\+|/)\w+[\\/]|\\\\\w|/[^\s/]{2,}/[^\s/]|/[^\s/]+\.\w{2,4}\s*$)"
)
CELL_END, ESCAPE = re.compile(r"[|`]"), re.compile(r"\\([^\w\s]|_)")  # of Markdown


def refuse_private_strings(folder: Path, output_dir: Path) -> None:
    """Look through the files of `folder`, each in constant memory: a gigabyte of weights takes some seconds.

    Raises:
        UserError: one holds a path, or what looks like an access token.
    """
    places = {place for given in (Path.home(), Path.cwd(), PROJECT, output_dir) for place in (given, given.resolve())}
    known = sorted(str(place) for place in places if place.is_absolute() and len(place.parts) > 1)
    # /root alone is not private, what is below it is
    names = (re.escape(path[1:]) + (r"(?![\w-])" if path.count("/") > 1 else r"/[\w.-]{2}") for path in known)
    ours = f"/(?:{'|'.join(names)})"  # `re` looks for the slash, ten times as fast as for several beginnings
    secrets = [get_token() or "", *(value for name, value in os.environ.items() if SECRET_NAME.search(name.upper()))]
    tokens = "|".join([*TOKENS, *(re.escape(value) for value in secrets if len(value) >= MIN_SECRET)])
    in_text = {rf"(?:{ours}|{PATH_IN_TEXT})[^\s\"'`|,;)]*": "a path", rf"\b(?:{tokens})": "a token"}
    for name, file in _files(folder):
        path = Path(name)
        if path.suffix in TEXT and path.name not in VOCABULARIES:
            found = _in_values(_values(file, path.suffix), {re.compile(each): what for each, what in in_text.items()})
        else:
            found = _in_bytes(file, ours, tokens if path.name in VOCABULARIES else f"{tokens}|{PATH_IN_BYTES}")
        for where, value, what in found:
            shown = f"{value[:6]}…" if what == "a token" else printable(value, 200)
            mend = "remove and revoke it" if what == "a token" else "shorten it to what others may see"
            raise UserError(f"'{name}'{where} holds {what}, '{shown}': {mend}, in '{output_dir}', then push again")


def _files(folder: Path) -> Iterator[tuple[str, BinaryIO]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        with open(path, "rb") as file:
            yield name, file
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    with archive.open(member) as file:
                        yield f"{name}/{member}", file


def _in_bytes(file: BinaryIO, ours: str, others: str) -> Iterator[tuple[str, str, str]]:
    tail = b""
    while chunk := file.read(CHUNK):
        for pattern, part in ((ours, tail + chunk), (others, _printable_parts(tail + chunk))):
            if found := re.search(pattern.encode(), part):
                value = found[0].decode(errors="replace")
                yield "", value, "a path" if value.startswith("/") else "a token"
        tail = chunk[-OVERLAP:]


def _printable_parts(content: bytes) -> bytes:
    """Return the parts with at least 15 printable characters in a row, which fill 8 bytes at a multiple of 8."""
    codes = np.frombuffer(content, np.uint8, count=len(content) // 8 * 8)
    words = np.flatnonzero((codes - 32 < 95).view(np.uint64) == 0x0101010101010101)
    runs = np.split(words, np.flatnonzero(np.diff(words) > 1) + 1) if len(words) else []
    return b"\0".join(content[max(0, 8 * run[0] - 8) : 8 * run[-1] + 16] for run in runs)


def _in_values(
    values: Iterator[tuple[int, str]], patterns: dict[re.Pattern[str], str]
) -> Iterator[tuple[str, str, str]]:
    for line, value in values:
        where = f", line {line}," if line else ""
        if WHOLE_PATH.match(value):
            yield where, value.strip(), "a path"
        for pattern, what in patterns.items():
            if found := pattern.search(value):
                yield where, found[0], what


def _values(file: BinaryIO, suffix: str) -> Iterator[tuple[int, str]]:
    """Yield the values of a text file with their lines; the line is 0 where it is not known."""
    lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    if suffix == ".csv":
        for number, row in enumerate(csv.reader(lines), 1):
            yield from ((number, cell) for cell in row)
        return
    for number, line in [(0, lines.read())] if suffix == ".json" else enumerate(lines, 1):
        if suffix.startswith(".json"):
            yield from ((number, text) for text in texts_in(json.loads(line)))
        else:
            text = ESCAPE.sub(r"\1", line)
            yield from ((number, cell) for cell in (text, *CELL_END.split(text)))


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, the names of an object too."""
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value
