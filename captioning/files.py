"""Files that appear whole or not at all, what JSON can hold, and where this project lies."""

import json
import math
import os
from pathlib import Path
from typing import Any


PROJECT = Path(__file__).parents[1]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, that appears whole or not at all, also if the process is killed."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(unfinished, path)


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
