"""Two systems side by side as a page: differences with intervals, then wins and losses image by image.

Images are those in the `report.html` of the runs, where there is one.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioning.errors import as_user_error
from captioning.reporting import page_scores
from captioning.reporting.page_captions import Row, caption_row
from captioning.reporting.page_images import IMAGES_PER_BLOCK
from captioning.reporting.render_page import render_page
from captioning.scoring.captions import Captions
from captioning.scoring.clinical import modality_of
from captioning.scoring.score import HEADLINE
from metrics import wording_scores


SHOWN = 3  # wins and losses at the top of the page
SCRIPT = re.compile(r'<script type="application/json" id="(payload|images-\d+)">(.*?)</script>', re.DOTALL)


def write_comparison(
    file: str, result: Mapping[str, Any], first: Captions, second: Captions, paths: tuple[str, str]
) -> None:
    """Write the page of two systems on the same N images in the same order, named by the `paths` of their captions.

    `result` is what `compare_captions` returns.

    Raises:
        UserError: the page cannot be written.
    """
    names, references = list(system_names(*paths)), tuple(first.references)
    ours, theirs = (wording_scores(tuple(own.predictions), references)[HEADLINE] for own in (first, second))
    rows = []
    for i, (image_id, reference, cuis) in enumerate(zip(first.image_ids, references, first.cuis, strict=True)):
        predictions, scores = (first.predictions[i], second.predictions[i]), (ours[i] - theirs[i], ours[i], theirs[i])
        rows.append(caption_row(image_id, reference, predictions, modality_of(cuis, reference), cuis, scores))
        rows[i]["kinds"] = ["win" if scores[0] > 0 else "loss" if scores[0] < 0 else "tie"]
    labels = ["ROUGE-L: difference", *(f"ROUGE-L of {name}" for name in names)]
    known = thumbnails(paths[1]) | thumbnails(paths[0])
    images = [known.get(image_id) for image_id in first.image_ids]
    blocks = [images[i : i + IMAGES_PER_BLOCK] for i in range(0, len(rows), IMAGES_PER_BLOCK)] if any(images) else []
    gallery = {"systems": names, "scores": labels, "onCard": labels, "rows": rows, "hasImages": bool(blocks)}
    gallery |= {"highlights": _largest(rows, names)}
    gallery["kinds"] = {"win": f"{names[0]} scores higher", "loss": f"{names[1]} scores higher", "tie": "same ROUGE-L"}
    with as_user_error(f"'{file}' cannot be written", "name a file of a folder that exists"):
        render_page(
            Path(file),
            gallery,
            lambda _: blocks,
            name=" against ".join(names),
            verdict=_difference_in_words(result["scores"][HEADLINE], names, rows),
            comparison={**result, "captions": len(rows), "names": names},
            page_scores=page_scores,
        )


def system_names(first: str, second: str) -> tuple[str, str]:
    """Return of two paths the parts by which they differ, numbered where they do not."""
    parts = [Path(path).parts for path in (first, second)]
    for turn in (1, -1):
        while min(map(len, parts)) > 1 and parts[0][::turn][0] == parts[1][::turn][0]:
            parts = [part[1:] if turn == 1 else part[:-1] for part in parts]
    ours, theirs = ("/".join(part) for part in parts)
    return (f"{ours} (1)", f"{theirs} (2)") if ours == theirs else (ours, theirs)


def thumbnails(predictions: str) -> dict[str, str]:
    """Return by image id the base64 JPEGs in the `report.html` of the run whose `predictions` these are, if any."""
    page = Path(predictions).resolve().parent.parent / "report.html"
    if not page.is_file():
        return {}
    found = {name: json.loads(text) for name, text in SCRIPT.findall(page.read_text(encoding="utf-8"))}
    rows = found.pop("payload", {}).get("rows", [])
    images = [image for block in found.values() for image in block]
    return {row["id"]: image for row, image in zip(rows, images, strict=False)}


def _largest(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    ranked, found = sorted(range(len(rows)), key=lambda i: -rows[i]["scores"][0]), []
    sides = (names[0], "win", "0 highest", ranked), (names[1], "loss", "0 lowest", ranked[::-1])
    for name, kind, order, ordered in sides:
        for row in (i for i in ordered[:SHOWN] if kind in rows[i]["kinds"]):
            title = f"{name} ahead by {abs(rows[row]['scores'][0]):.3f}"
            found.append({"title": title, "row": row, "order": order, "kind": kind})
    return found


def _difference_in_words(row: Mapping[str, float], names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    better, other = names if row["difference"] > 0 else names[::-1]
    counts = Counter(kind for own in rows for kind in own["kinds"])
    first, second = (page_scores.three_digits(row[key]) for key in ("first", "second"))
    difference, interval = page_scores.three_digits(row["difference"], "+"), page_scores.interval_text(row, "+")
    verdict = "In ROUGE-L the two do not differ by more than chance may make."
    if row["p_value"] < 0.05 and row["low"] * row["high"] > 0:
        verdict = f"{better} scores higher than {other} in ROUGE-L."
    return [
        verdict,
        f"{first} − {second} = {difference}, 95 % interval {interval or '–'}, p = {row['p_value']:.4f}. By image: "
        f"{names[0]} is higher on {counts['win']:,}, {names[1]} on {counts['loss']:,}, the same on "
        f"{counts['tie']:,}.",
    ]
