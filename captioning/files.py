"""Files that appear whole or not at all, their short names, and what JSON can hold."""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captioning.errors import UserError


PROJECT = Path(__file__).parents[1]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, that appears whole or not at all, also if the process is killed."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(unfinished, path)


def refuse_to_replace(read: Iterable[str | None], html: str | None) -> None:
    """Raise a UserError if the page to write is one of the files that are read."""
    if html and any(os.path.realpath(html) == os.path.realpath(path) for path in read if path):
        raise UserError(f"--html would overwrite '{html}', which is read; name another file")


def to_json(value: Any, **options: Any) -> str:
    """Return JSON text by `json.dumps` with these options; NaN and infinity, which JSON does not have, are null."""
    return json.dumps(without_nan(value), allow_nan=False, **options)


def without_nan(value: Any) -> Any:
    """Return a value with None for each NaN and infinity in it, at any depth of dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short_names(paths: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Return by path as many of its last parts as tell all `paths` from each other and from the names `taken`."""
    parts = {path: [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")] for path in paths}
    taken, short = set(taken), {}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {path: "/".join(own[-depth:]) for path, own in parts.items()}
        if len(set(short.values())) == len(parts) and not taken.intersection(short.values()):
            break
    return short
