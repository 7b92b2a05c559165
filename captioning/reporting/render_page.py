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


HERE = Path(__file__).parent
ATTENTION_SCRIPT, PAGE_SCRIPT, PAGE_STYLE = (
    Markup((HERE / name).read_text(encoding="utf-8")) for name in ("attention.js", "page.js", "page.css")
)
PAGE_BUDGET = 57_000_000  # bytes of the page; what the captions leave of it goes to the images
# What not every page has: of its script, of a row, and of its template
GALLERY = {"scores": [], "onCard": [], "kinds": {}, "highlights": [], "attention": {}, "hasImages": True}
ROW = {"modality": "", "reference": "", "concepts": [], "kinds": [], "scores": []}
CONTENT = {"comparison": None, "facts": {}, "verdict": [], "splits": {}, "split": "", "curves": [], "tuned": {}}


def render_page(
    file: Path,
    gallery: dict[str, Any],
    blocks: Callable[[int], Iterable[Sequence[str | None]]],
    unscored: bool = False,
    **content: Any,
) -> None:
    """Write a page of captions, whole or not at all.

    `gallery` is what its script shows, rows and the names of systems beside `GALLERY`, `content` what its template
    shows, a name beside `CONTENT`. `blocks` takes the bytes of the gallery and returns the images as base64 JPEG, in
    portions of `IMAGES_PER_BLOCK`. The captions of an `unscored` page have no references.
    """
    rows = [ROW | row for row in gallery["rows"]]
    payload = _script_json(GALLERY | gallery | {"rows": rows, "unscored": unscored, "block": IMAGES_PER_BLOCK})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = ATTENTION_SCRIPT + PAGE_SCRIPT
    page = environment.get_template("page_template.html").generate(
        CONTENT | content,
        unscored=unscored,
        script=script,
        script_hash=_policy_hash(script),
        style=PAGE_STYLE,
        style_hash=_policy_hash(PAGE_STYLE),
        examples=gallery.get("highlights"),
        payload=payload,
        blocks=map(_script_json, blocks(len(payload.encode()))),
    )
    unfinished = file.with_name(f"{file.name}.tmp")  # not `write_whole`: the page is never in memory at once
    try:
        with open(unfinished, "w", encoding="utf-8", errors="replace") as stream:  # UTF-8 has no lone surrogates
            stream.writelines(page)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _script_json(value: Any) -> Markup:
    """Return JSON for a script element: UTF-8, and nothing in it that HTML could take for a tag or a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


def _policy_hash(text: str) -> str:
    """Return the hash by which the Content-Security-Policy knows the page's own script or style."""
    return f"sha256-{to_base64(hashlib.sha256(text.encode()).digest())}"
