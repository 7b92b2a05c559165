"""The report page, `report.html` of the output folder: scores beside their baselines, curves, and every caption.

One file that needs no network and no other file. All that comes from the data is text to it: Jinja escapes, the page's
script sets text nodes only, and a Content-Security-Policy lets no other script run.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from captioning.reporting import page_scores
from captioning.reporting.curves import inline_curves
from captioning.reporting.page_captions import caption_payload
from captioning.reporting.page_images import IMAGES_PER_BLOCK, image_blocks, to_base64
from captioning.reporting.run_record import RunRecord
from captioning.reporting.score_table import items_in_words
from captioning.scoring.baselines import BASELINES


TEMPLATE = Path(__file__).parent / "page_template.html"
ATTENTION_SCRIPT = (Path(__file__).parent / "attention.js").read_text(encoding="utf-8")
PAGE_BUDGET = 57_000_000  # bytes of the page; what the captions leave of it goes to the images
COMMIT_DIGITS = 7
WORD = re.compile(r"\w")
# Of the template
EMPTY = {"comparison": None, "summary": {}, "facts": {}, "verdict": [], "splits": {}, "curves": [], "tuned": {}}

Words = Sequence[tuple[str, np.ndarray]]  # of a caption, each with its attention map


def write_report(
    record: RunRecord,
    split: str,
    images: Iterable[Image.Image | None],
    modalities: Sequence[str],
    attention: Mapping[str, Words] = {},
    num_tokens: Sequence[int] | None = None,
) -> None:
    """Write `report.html` into the output folder of a run, whole or not at all.

    Images are taken one at a time and go into the file at once, so that memory does not grow with their number.

    Args:
        record: of the run.
        split: the split whose captions are shown.
        images: N images in the order of the predictions, None for one that cannot be read.
        modalities: N modalities.
        attention: of some image ids the words of the prediction, each with its attention map over the image `[H, W]`,
            non-negative, rows from the top.
        num_tokens: of the N references, for the negative log-likelihood per token.

    Raises:
        ValueError: there are more or fewer images, modalities or numbers of tokens than predictions.
    """
    summary = record.scores.get(split, {})
    gallery = caption_payload(record.predictions(split), modalities, num_tokens)
    rows = gallery["rows"]
    gallery["attention"] = {
        i: maps for i, row in enumerate(rows) if (maps := map_levels(attention.get(row["id"], ())))
    }
    facts = record.facts(COMMIT_DIGITS) | {"split": f"{split}, {len(rows):,} captions"}
    if not gallery["attention"]:
        facts["attention maps"] = "this model gives none"
    if summary:
        facts["distinct captions"] = f"{summary['unique_captions']:.0%}"
    render_page(
        record.folder / "report.html",
        gallery,
        lambda size: image_blocks(images, len(rows), PAGE_BUDGET - size),
        name=record.folder.resolve().name,
        split=split,
        facts=facts,
        summary=summary,
        verdict=[*([summary["verdict"]] if summary else []), *record.leaks],
        splits={name: record.scores[name] for name in sorted(record.scores, key=lambda name: name != split)},
        curves=inline_curves(record.log_history),
        tuned=record.recipe["tuned_decoding"],
    )


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
        baselines=BASELINES,
        page_scores=page_scores,
        items_in_words=items_in_words,
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


def map_levels(words: Words) -> list[dict[str, Any]]:
    """Return the maps of the words of a caption, each in 256 levels of its own maximum; punctuation has none."""
    found = []
    for word, values in words:
        grid = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=0.0, neginf=0.0).clip(min=0)
        levels = np.round(grid * (255 / max(grid.max(), 1e-12))).astype(np.uint8)
        if WORD.search(word):
            found.append({"word": word, "columns": levels.shape[1], "levels": to_base64(levels.tobytes())})
    return found


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
