"""Two systems side by side as a page: differences with intervals, then wins and losses image by image.

It is made of the template of `report.html`. Images are those that the report page of a run holds, if there is one
beside its predictions.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioning.errors import as_user_error
from captioning.reporting.page import render_page
from captioning.reporting.page_captions import Row, caption_row
from captioning.reporting.page_images import IMAGES_PER_BLOCK
from captioning.reporting.page_scores import interval_text, score_groups, score_label, three_digits
from captioning.scoring.captions import Captions
from captioning.scoring.clinical import modality_of
from captioning.scoring.score import HEADLINE
from metrics import wording_scores


SHOWN = 3  # wins and losses at the top of the page
OWN_SCALE = "_cider"  # not from 0 to 1
SCRIPT = re.compile(r'<script type="application/json" id="(payload|images-\d+)">(.*?)</script>', re.DOTALL)


def write_comparison(
    file: str, result: Mapping[str, Any], first: Captions, second: Captions, paths: tuple[str, str]
) -> None:
    """Write the page of two systems on the same N images.

    Args:
        file: the page.
        result: what `compare_captions` returns.
        first: the captions of one system.
        second: those of the other, in the same order.
        paths: the files of the two, which name them.

    Raises:
        UserError: the page cannot be written.
    """
    names = list(system_names(*paths))
    wording = [wording_scores(tuple(c.predictions), tuple(first.references))[HEADLINE] for c in (first, second)]
    columns = zip(wording[0] - wording[1], *wording, strict=True)
    texts = zip(
        first.image_ids, first.references, zip(first.predictions, second.predictions, strict=True), strict=True
    )
    rows = [
        caption_row(*text, modality_of(cuis, text[1]), cuis, scores)
        for text, cuis, scores in zip(texts, first.cuis, columns, strict=True)
    ]
    kinds = {"win": f"{names[0]} scores higher", "loss": f"{names[1]} scores higher", "tie": "same ROUGE-L"}
    for row in rows:
        row["kinds"] = ["win" if row["scores"][0] > 0 else "loss" if row["scores"][0] < 0 else "tie"]
    labels = ["ROUGE-L: difference", *(f"ROUGE-L of {name}" for name in names)]
    images = thumbnails(paths[0]) or thumbnails(paths[1])
    jpegs = [images.get(image_id) for image_id in first.image_ids] if images else []
    gallery = {"systems": names, "scores": labels, "onCard": labels, "kinds": kinds, "rows": rows, "attention": {}}
    gallery |= {"highlights": _largest(rows, names), "hasImages": bool(images)}
    comparison = {**result, "captions": len(rows), "names": names, "ends": _ends(result["scores"])}
    comparison["verdict"] = _difference_in_words(result["scores"][HEADLINE], names, rows)
    with as_user_error(f"'{file}' cannot be written", "name a file of a folder that exists"):
        render_page(
            Path(file),
            gallery,
            lambda _: (jpegs[i : i + IMAGES_PER_BLOCK] for i in range(0, len(jpegs), IMAGES_PER_BLOCK)),
            name=" against ".join(names),
            split="",
            comparison=comparison,
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
    ranked = sorted(range(len(rows)), key=lambda i: -rows[i]["scores"][0])
    found = []
    for name, kind, direction, order in ((names[0], "win", "high", ranked), (names[1], "loss", "low", ranked[::-1])):
        for row in (i for i in order[:SHOWN] if kind in rows[i]["kinds"]):
            title = f"{name} ahead by {abs(rows[row]['scores'][0]):.3f}"
            found.append({"title": title, "order": "0", "direction": direction, "kind": kind, "row": row})
    return found


def _ends(scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Return where the axis of each difference ends, on one scale for those under one heading; CIDEr has its own."""
    reach = {key: max(abs(row[end] or 0) for end in ("difference", "low", "high")) for key, row in scores.items()}
    ends = {}
    for keys in score_groups(scores).values():
        common = max((reach[key] for key in keys if not key.endswith(OWN_SCALE)), default=0)
        ends |= {key: reach[key] if key.endswith(OWN_SCALE) else common for key in keys}
    return ends


def _difference_in_words(row: Mapping[str, float], names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    clear = row["p_value"] < 0.05 and row["low"] * row["high"] > 0
    better, other = names if row["difference"] > 0 else names[::-1]
    counts = Counter(kind for own in rows for kind in own["kinds"])
    return [
        f"{better} scores higher than {other} in {score_label(HEADLINE)}."
        if clear
        else f"In {score_label(HEADLINE)} the two do not differ by more than chance may make.",
        f"{three_digits(row['first'])} − {three_digits(row['second'])} = {three_digits(row['difference'], '+')}, 95 % "
        f"interval {interval_text(row, '+')}, p = {row['p_value']:.4f}. By image: {names[0]} is higher on "
        f"{counts['win']:,}, {names[1]} on {counts['loss']:,}, the same on {counts['tie']:,}.",
    ]
