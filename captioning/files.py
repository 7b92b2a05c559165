"""Files that appear whole or not at all, and where this project lies."""

import os
from pathlib import Path


PROJECT = Path(__file__).parents[1]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, that appears whole or not at all, also if the process is killed."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(unfinished, path)
