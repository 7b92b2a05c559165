"""A page of captions as a file that needs no network and no other file, whatever it shows of scores.

All that comes from the data is text to it: Jinja escapes, the page's script sets text nodes only, and a
Content-Security-Policy lets no other script run.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from captioning.reporting.page_images import IMAGES_PER_BLOCK, to_base64


TEMPLATE = Path(__file__).parent / "page_template.html"
ATTENTION_SCRIPT = (Path(__file__).parent / "attention.js").read_text(encoding="utf-8")
PAGE_BUDGET = 57_000_000  # bytes of the page; what the captions leave of it goes to the images
# Of the template
EMPTY = {"comparison": None, "summary": {}, "facts": {}, "verdict": [], "splits": {}, "curves": [], "tuned": {}}
EMPTY |= {"unscored": False, "split": ""}


def render_page(
    file: Path, gallery: dict[str, Any], blocks: Callable[[int], Iterable[Sequence[str | None]]], **content: Any
) -> None:
    """Write a page of captions, whole or not at all.

    `gallery` is what its script shows, `content` what its template shows beside `EMPTY`. `blocks` takes the bytes of
    the gallery, and returns the images as base64 JPEG, in portions of `IMAGES_PER_BLOCK`.
    """
    source = TEMPLATE.read_text(encoding="utf-8").replace("/* attention.js */", ATTENTION_SCRIPT)
    payload = _script_json(gallery | {"block": IMAGES_PER_BLOCK})
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_invalid_characters,
    )
    page = environment.from_string(source).generate(
        EMPTY | content,
        script_hash=_policy_hash(source, "script"),
        style_hash=_policy_hash(source, "style"),
        examples=gallery["highlights"],
        payload=payload,
        blocks=map(_script_json, blocks(len(payload.encode()))),
    )
    unfinished = file.with_name(f"{file.name}.tmp")  # not `write_whole`: the page is never in memory at once
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            stream.writelines(page)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


# --- Text that is safe ------------------------------------------------------------------------------------------


def _without_invalid_characters(value: Any) -> Any:
    """Return text without what UTF-8 or HTML cannot hold: lone surrogates and NUL become U+FFFD."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


def _script_json(value: Any) -> Markup:
    """Return JSON for a script element: UTF-8, and nothing in it that HTML could take for a tag or a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


def _policy_hash(source: str, element: str) -> str:
    """Return the hash by which the Content-Security-Policy knows the template's own script or style."""
    body = re.search(f"<{element}>(.*?)</{element}>", source, re.DOTALL)[1]
    return f"sha256-{to_base64(hashlib.sha256(body.encode()).digest())}"
