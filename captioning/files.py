"""Files that appear whole or not at all, what separates the fields of a CSV, and where this project lies."""

import os
import re
from pathlib import Path


PROJECT = Path(__file__).parents[1]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, that appears whole or not at all, also if the process is killed."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(unfinished, path)


def csv_delimiter(header: str) -> str:
    """Return what separates the fields of a CSV by its first line: a comma, a semicolon (as Excel writes) or a tab."""
    return max((",", ";", "\t"), key=re.sub('"[^"]*"', "", header).count)
