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
from collections.abc import Iterable, Iterator
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
MIN_SECRET = 12  # characters; a shorter value in the environment may be a word
ROOTS = "home|Users|root|mnt|media|Volumes|private|tmp|var|srv|opt|usr|data|scratch|nfs|gpfs|lustre|work|workspace"
# Inside of a text: a path below a usual root, to a file of any root, of a home, a Windows drive or server
PATHS_IN_TEXT = (
    rf"(?<![\w./\\<-])/(?:{ROOTS})/[\w.~-]", r"(?<![^\s=:])(?:/[^\s/]+){2,}\.[A-Za-z]\w{1,4}\b", r"file:/+\w",
    r"(?<![^\s=])~/[\w.]", r"(?<![\w/])[A-Za-z]:(?:\\+[\w.$-]+(?:\\|\.\w)|/\w+/)", r"(?<![\w\\])\\\\\w[\w.-]*\\+\w",
)  # fmt: skip
PATHS_IN_BYTES = rf"/(?:{ROOTS})/[\w.-][\w./-]{{9,}}", r"[A-Za-z]:\\{1,2}\w[\w .\\-]{11,}"
WHOLE_PATH = re.compile(
    r"\s*(~\w*(?<!\d)/\w|(\.\./)+\w|/[^\s/]{2,}/[^\s/]|/[^\s/]+\.\w{2,4}\s*$|/\S([^\n]*\S)?\.[A-Za-z]\w{1,3}\s*$"
    r"|[A-Za-z]:\\+[\w.-]+\s*$)"
)
CELL_END, ESCAPE = re.compile(r"[|`]"), re.compile(r"\\([^\w\s]|_)")  # of Markdown
Found = Iterator[tuple[int, str]]  # strings with their lines; the line is 0 where it is not known


def refuse_private_strings(folder: Path, output_dir: Path) -> None:
    """Look through the files of `folder` in constant memory; UserError if one holds a path or an access token."""
    places = {place for given in (Path.home(), Path.cwd(), PROJECT, output_dir) for place in (given, given.resolve())}
    known = sorted(str(place) for place in places if place.is_absolute() and len(place.parts) > 1)
    # /root alone is not private, what is below it is, and `scans/root/x` in a text is another
    deep = [re.escape(path[1:]) + r"(?![\w-])" for path in known if path.count("/") > 1]
    flat = [re.escape(path[1:]) + r"/[\w.-]{2}" for path in known if path.count("/") == 1]
    ours = f"/(?:{'|'.join(deep + flat)})"  # `re` looks for the slash, ten times as fast as for several beginnings
    ours_in_text = [*(f"/{path}" for path in deep), *(rf"(?<![\w./-])/{path}" for path in flat)]
    secrets = [value for name, value in os.environ.items() if SECRET_NAME.search(name.upper())]
    secrets = [re.escape(value) for value in secrets if len(value) >= MIN_SECRET] + [
        re.escape(get_token() or "-" * 99)
    ]
    in_text = [re.compile(pattern) for pattern in (
        rf"(?:{'|'.join([*ours_in_text, *PATHS_IN_TEXT])})[^\s\"'`|,;)]*",
        rf"(?<![A-Za-z0-9])(?:{'|'.join([*TOKENS, *secrets])})",
    )]  # fmt: skip
    for name, file in _files(folder):
        path = Path(name)
        if path.suffix in TEXT and path.name not in VOCABULARIES:
            found = _in_values(_values(file, path.suffix), in_text)
        else:
            found = _in_bytes(file, [ours, *secrets], TOKENS + PATHS_IN_BYTES * (path.name not in VOCABULARIES))
        for line, value in found:
            where = f"'{name}', line {line}," if line else f"'{name}'"
            if in_text[1].fullmatch(value):
                raise UserError(f"{where} holds a token, '{value[:6]}…': remove it, and revoke it; it is not pushed")
            mend = f"shorten it in '{output_dir}' to what others may see, then push again"
            raise UserError(f"{where} holds a path, '{printable(value, 200)}': {mend}")


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


def _in_bytes(file: BinaryIO, exact: Iterable[str], long: Iterable[str]) -> Found:
    tail = b""
    while chunk := file.read(CHUNK):
        content = tail + chunk
        for patterns, part in ((exact, content), (["|".join(long)], _printable_parts(content))):
            for found in filter(None, (re.search(pattern.encode(), part) for pattern in patterns)):
                yield 0, found[0].decode(errors="replace")
        tail = chunk[-OVERLAP:]


def _printable_parts(content: bytes) -> bytes:
    """Return the parts with at least 15 printable characters in a row, which fill 8 bytes at a multiple of 8."""
    codes = np.frombuffer(content, np.uint8, count=len(content) // 8 * 8)
    words = np.flatnonzero((codes - 32 < 95).view(np.uint64) == 0x0101010101010101)
    runs = np.split(words, np.flatnonzero(np.diff(words) > 1) + 1) if len(words) else []
    return b"\0".join(content[max(0, 8 * run[0] - 8) : 8 * run[-1] + 16] for run in runs)


def _in_values(values: Found, patterns: list[re.Pattern[str]]) -> Found:
    for line, value in values:
        if WHOLE_PATH.match(value):
            yield line, value.strip()
        yield from ((line, found[0]) for pattern in patterns if (found := pattern.search(value)))


def _values(file: BinaryIO, suffix: str) -> Found:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    if suffix == ".csv":
        yield from ((number, cell) for number, row in enumerate(csv.reader(lines), 1) for cell in row)
        return
    for number, line in [(0, lines.read())] if suffix == ".json" else enumerate(lines, 1):
        try:
            texts = texts_in(json.loads(line))  # of another suffix hardly any line is JSON
        except ValueError:
            plain = ESCAPE.sub(r"\1", line)
            texts = (plain, *CELL_END.split(plain))
        yield from ((number, text) for text in texts)


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, the names of an object too."""
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value
