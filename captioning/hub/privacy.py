"""What must not leave this machine: its paths, in the files that a push sends."""

import json
import os
import re
from pathlib import Path
from typing import Any

from captioning.files import PROJECT
from captioning.hub.revisions import COMMIT_HASH


# An absolute path, a file:// URL, or a path that leaves the current folder, also inside a longer text
LOCAL_PATH = re.compile(r"""(?<![\w.:/-])(?:file://)?(?:/|(?:\.\./)+)[^\s,;"']+""")


def without_local_paths(text: str) -> str:
    """Return a JSON object with its paths made public: `./recipes/configs/x.json` in this project, else `./<name>`.

    A relative path gets a `./` too: whoever reruns the recipe would otherwise take `data/rocov2` for a Hub id.
    """
    content = json.loads(text)
    for name in ("model_name_or_path", "dataset_name", "retriever"):
        given, revision = content.get(name), content.get(f"{name.split('_')[0]}_revision")
        if given and given != "phantoms" and not COMMIT_HASH.fullmatch(revision or ""):
            content[name] = _public_path(given)
    return json.dumps(_without_paths(content), indent=2) + "\n"


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "prompt" else _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str):
        return LOCAL_PATH.sub(lambda match: _public_path(match[0].removeprefix("file://")), value)
    return value


def _public_path(path: str) -> str:
    if os.path.isabs(path) and Path(path).is_relative_to(PROJECT):
        return f"./{Path(path).relative_to(PROJECT).as_posix()}"
    inside = not os.path.isabs(path) and ".." not in Path(path).parts
    return f"./{Path(path).as_posix() if inside else Path(path).name}"
