"""TODO."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from captioning.files import PROJECT
from captioning.hub.revisions import COMMIT_HASH


logger = logging.getLogger(__name__)

# An absolute path, a file:// address, or a path out of the current folder, inside a longer text too
LOCAL_PATH = re.compile(r"""(?<![\w.:/-])(?:file://)?(?:/|(?:\.\./)+)[^\s,;"']+""")


# --- What must not leave the machine ---------------------------------------------------------------------------


def without_local_paths(text: str) -> str:
    """Return a JSON object whose paths are `./recipes/configs/x.json` within this project, and `./<name>` elsewhere.

    A relative path gets its `./`, too: `data/rocov2` would be read as an id on the Hub by whoever reruns the recipe.
    """
    content = json.loads(text)
    for name, revision in (("model_name_or_path", "model_revision"), ("dataset_name", "dataset_revision")):
        given = content.get(name)
        if given and given != "phantoms" and not COMMIT_HASH.fullmatch(content.get(revision) or ""):
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
