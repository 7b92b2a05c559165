"""The report page, `report.html` of the output folder: scores beside their baselines, curves, and every caption.

One file that needs no network and no other file. Whatever comes from the data is text to it: Jinja escapes, the script
writes text nodes only, and a Content-Security-Policy lets nothing run but the page's own script.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageChops

from captioning.scoring.captions import read_predictions


TEMPLATE = "page_template.html"

PAGE_BUDGET = 57_000_000  # bytes of the page; what captions leave of it goes to the images
LEAST_SHARE = 1500  # characters: an image of fewer shows nothing, so beyond 30,000 images the page outgrows its budget
SIDES = (512, 384, 320, 256, 224, 192, 160, 128, 96, 64, 48, 32)  # longer side of a stored image, pixels
QUALITIES = (80, 65, 50, 35)  # JPEG; below 35 blocks show, and a smaller side looks better
BYTES_A_PIXEL = 0.1  # what a radiograph takes at quality 80, so that most images fit at once
GRAY_TOLERANCE = 10  # channels of a gray image that was stored as a color JPEG differ by a few levels
IMAGES_A_BLOCK = 50  # the page parses the images in such portions, as they come into view

SCORES = {
    "Wording, rouge_score": {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"},
    "Wording, ImageCLEF's evaluator": {"imageclef_rouge1": "ROUGE-1", "imageclef_bertscore": "BERTScore"},
    "Wording, pycocoevalcap": {
        "coco_bleu1": "BLEU-1",
        "coco_bleu2": "BLEU-2",
        "coco_bleu3": "BLEU-3",
        "coco_bleu4": "BLEU-4",
        "coco_cider": "CIDEr",
        "coco_meteor": "METEOR",
        "coco_rougeL": "ROUGE-L",
    },
}
CLINICAL = "What is said, F1"  # all other scores
# Letter in the pictures, name
BASELINES = {
    "shuffled_references": ("R", "shuffled references"),
    "constant": ("C", "constant caption"),
    "typical_of_modality": ("M", "typical of modality"),
    "nearest_image": ("N", "nearest training image"),
    "shuffled_images": ("I", "shuffled images"),
}
PICTURE = {"width": 320, "height": 52, "margin": 8}  # units of the SVG, as below
LETTER, BOUND_WIDTH = 13, 26  # what the letter of a baseline and the word at an upper bound take
CHART = {"width": 460, "height": 216, "left": 46, "right": 12, "top": 12, "bottom": 36}
LARGEST = 1e100  # of a diverged loss, so that differences stay finite
POINTS = 600  # of a curve; more than a screen shows


def write_report(
    output_dir: Path,
    split: str,
    images: Iterable[Image.Image | None],
    modalities: Sequence[str],
    attention: Mapping[str, Sequence[tuple[str, np.ndarray]]] = {},
) -> None:
    """Write `report.html` into an output folder, whole or not at all.

    It is made from `predictions/<split>.jsonl` and, where they are there, `scores.json`, `recipe.json` and
    `trainer_state.json`. Images are taken one at a time and go into the file at once, so that memory does not grow
    with their number.

    Args:
        output_dir: the folder.
        split: the split whose captions are shown.
        images: one image for each prediction in the file's order, None where it cannot be read.
        modalities: one modality for each prediction.
        attention: of some image ids the words of the prediction, each with its attention over the image `[g, g]`,
            non-negative, rows from the top.

    Raises:
        ValueError: there are more or fewer images or modalities than predictions.
    """
    rows = read_predictions(output_dir / "predictions" / f"{split}.jsonl")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_showable,
    )
    source = environment.loader.get_source(environment, TEMPLATE)[0]
    recipe = _read_json(output_dir / "recipe.json")
    scores = _read_json(output_dir / "scores.json")
    payload = _json({"block": IMAGES_A_BLOCK, "rows": _rows(rows, modalities), "attention": _maps(rows, attention)})
    page = environment.get_template(TEMPLATE).generate(
        script_hash=_hash(source, "script"),
        style_hash=_hash(source, "style"),
        name=output_dir.resolve().name,
        split=split,
        facts=_facts(recipe, split, len(rows), _dict(scores.get(split))),
        summary=_dict(scores.get(split)),
        splits=[_split(name, _dict(scores[name])) for name in sorted(scores, key=lambda name: name != split)],
        charts=_charts(_read_json(output_dir / "trainer_state.json").get("log_history")),
        payload=payload,
        blocks=(_json(block) for block in _image_blocks(images, len(rows), PAGE_BUDGET - len(payload.encode()))),
    )
    unfinished = output_dir / "report.html.tmp"  # not `write_whole`: the page is never in memory at once
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(page)
        os.replace(unfinished, output_dir / "report.html")
    finally:
        unfinished.unlink(missing_ok=True)


# --- Data for the page's script -------------------------------------------------------------------------------


def _rows(rows: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": str(row.get("image_id", "")),
            "modality": str(modality or ""),
            "reference": str(row.get("reference") or ""),
            "prediction": str(row.get("prediction") or ""),
            "rougeL": _rounded(row.get("rougeL"), 4),
            "nll": _rounded(row.get("nll"), 2),
        }
        for row, modality in zip(rows, modalities, strict=True)
    ]


def _maps(
    rows: Sequence[Mapping[str, Any]], attention: Mapping[str, Sequence[tuple[str, np.ndarray]]]
) -> dict[int, list[dict[str, Any]]]:
    """Return the maps of the rows that have some, each in 256 levels of its own maximum."""
    found = {}
    for index, row in enumerate(rows):
        words = []
        for word, values in attention.get(row.get("image_id"), ()):
            grid = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
            levels = np.round(grid * (255 / max(grid.max(), 1e-12))).astype(np.uint8)
            words.append({"word": str(word), "columns": levels.shape[1], "levels": _base64(levels.tobytes())})
        if words:
            found[index] = words
    return found


def _image_blocks(images: Iterable[Image.Image | None], number: int, budget: int) -> Iterator[list[str | None]]:
    """Yield the images as base64 JPEG in portions of `IMAGES_A_BLOCK`, all of them in `budget` characters."""
    share = max(LEAST_SHARE, budget // max(number, 1))
    block: list[str | None] = []
    for index, image in zip(range(number), images, strict=True):
        jpeg = encode_image(image, share * 3 // 4)  # four characters for three bytes
        block.append(jpeg and _base64(jpeg))
        if len(block) == IMAGES_A_BLOCK or index == number - 1:
            yield block
            block = []


def encode_image(image: Image.Image | None, most_bytes: int) -> bytes | None:
    """Return an image as a JPEG of at most `most_bytes`, gray where the image is, None where it cannot be read.

    The side follows from the bytes; quality goes down before the side does. What is transparent is white, as for the
    model, and nothing but pixels is kept: a comment in the file may name a patient.
    """
    if image is None or 0 in image.size:
        return None
    try:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        small = image.convert("L" if image.mode in ("1", "L") else "RGB")
        small.info.clear()
    except (OSError, ValueError):  # opened, but broken further on
        return None
    fitting = [side for side in SIDES if side * side * BYTES_A_PIXEL <= most_bytes] or SIDES[-1:]
    for side in fitting:
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        small = small.convert("L") if _is_gray(small) else small
        for quality in QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= most_bytes:
                return buffer.getvalue()
    return None


def _is_gray(image: Image.Image) -> bool:
    if image.mode == "L":
        return True
    red, green, blue = image.split()
    differences = (ImageChops.difference(red, green), ImageChops.difference(green, blue))
    return all(difference.getextrema()[1] <= GRAY_TOLERANCE for difference in differences)


# --- Scores ---------------------------------------------------------------------------------------------------


def _split(name: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of one split in `scores.json`, of which every part may be absent."""
    scores = {key: _dict(value) for key, value in _dict(scored.get("scores")).items()}
    legend = _legend(baseline for score in scores.values() for baseline in _dict(score.get("baselines")))
    groups = {title: [key for key in labels if key in scores] for title, labels in SCORES.items()}
    groups[CLINICAL] = [key for key in scores if not any(key in labels for labels in SCORES.values())]
    return {
        "name": name,
        "captions": _number(scored.get("captions")),
        "legend": legend,
        "groups": [
            (title, [_score(key, scores[key], legend) for key in keys]) for title, keys in groups.items() if keys
        ],
        "has_upper_bound": any(_number(score.get("upper_bound")) is not None for score in scores.values()),
        "missing": {_label(key, full=True): why for key, why in _dict(scored.get("missing")).items()},
        "notes": [
            {
                "name": BASELINES.get(key, ("", key.replace("_", " ")))[1],
                "what": note.get("what"),
                "found_among": note.get("found_among"),
                "captions": {"": note["caption"]} if note.get("caption") else _dict(note.get("captions")),
            }
            for key, note in ((key, _dict(note)) for key, note in _dict(scored.get("baselines")).items())
        ],
        **_modalities({key: _dict(value) for key, value in _dict(scored.get("modalities")).items()}),
    }


def _score(key: str, score: Mapping[str, Any], legend: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return a row of the score table, its numbers as text."""
    value, low = _number(score.get("value")), _number(score.get("low"))
    baselines = []
    for baseline in legend:
        number = _number(_dict(score.get("baselines")).get(baseline["key"]))
        lost = None not in (number, value) and number >= value
        within = not lost and None not in (number, low) and number >= low
        baselines.append({**baseline, "text": _text(number), "state": "lost" if lost else "within" if within else ""})
    return {
        "label": _label(key),
        "value": _text(value),
        "interval": _interval(score),
        "baselines": baselines,
        "upper_bound": _text(_number(score.get("upper_bound"))),
        "picture": _picture(_label(key), score, legend),
    }


def _modalities(modalities: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the table of scores by modality, the largest modality first, all pictures on one scale."""
    known = [key for labels in SCORES.values() for key in labels]
    keys = {key for modality in modalities.values() for key in modality if key != "captions"}
    columns = [key for key in known if key in keys] + sorted(keys.difference(known))
    top = max((_most(_dict(modality.get("rougeL"))) for modality in modalities.values()), default=0.0)
    return {
        "columns": [_label(key, full=True) for key in columns],
        "modalities": [
            {
                "name": name,
                "captions": modality.get("captions", "–"),
                "cells": [
                    (_text(_number(_dict(modality.get(key)).get("value"))), _interval(_dict(modality.get(key))))
                    for key in columns
                ],
                "picture": _picture(f"ROUGE-L of {name}", _dict(modality.get("rougeL")), (), top),
            }
            for name, modality in sorted(modalities.items(), key=lambda item: -(_number(item[1].get("captions")) or 0))
        ],
    }


def _legend(baselines: Iterable[str]) -> list[dict[str, str]]:
    """Return the baselines that some score has, the known ones first, each with a letter of its own."""
    found = set(baselines)
    legend = []
    for key in [key for key in BASELINES if key in found] + sorted(found.difference(BASELINES)):
        used = {baseline["letter"] for baseline in legend} | {letter for letter, _ in BASELINES.values()}
        free = [letter for letter in f"{key.upper()}ABDEFGHJKLOPQSTUVWXYZ" if letter.isalpha() and letter not in used]
        letter, name = BASELINES.get(key, (free[0] if free else "?", key.replace("_", " ")))
        legend.append({"key": key, "letter": letter, "name": name})
    return legend


def _label(key: str, full: bool = False) -> str:
    """Return the name of a score; `full` where no heading says whose implementation it is."""
    for labels in SCORES.values():
        if key in labels:
            family = {"coco": "COCO ", "imageclef": "ImageCLEF "}.get(key.split("_")[0], "")
            return f"{family if full else ''}{labels[key]}"
    return key.removesuffix("_f1").replace("_", " ").capitalize() + (" F1" if full and key.endswith("_f1") else "")


def _most(score: Mapping[str, Any]) -> float:
    numbers = [score.get(key) for key in ("value", "high", "upper_bound")] + list(
        _dict(score.get("baselines")).values()
    )
    return max((number for number in map(_number, numbers) if number is not None), default=0.0)


def _interval(score: Mapping[str, Any]) -> str:
    low, high = _number(score.get("low")), _number(score.get("high"))
    return "" if low is None or high is None else f"{_text(low)} – {_text(high)}"


# --- Pictures: the geometry of the inline SVG ------------------------------------------------------------------


def _picture(
    label: str, score: Mapping[str, Any], legend: Sequence[Mapping[str, str]], top: float | None = None
) -> dict[str, Any] | None:
    """Return the picture of a score: its interval as a bar, its baselines and upper bound as lines with their letters.

    The axis starts at 0, so that lengths may be compared, and ends at `top` or at a round number beyond the largest.
    """
    value, low, high = (_number(score.get(key)) for key in ("value", "low", "high"))
    if value is None:
        return None
    top = _round_up(top or _most(score))
    left, right = PICTURE["margin"], PICTURE["width"] - PICTURE["margin"]

    def x(number: float) -> float:
        return round(left + (right - left) * min(max(number / top, 0), 1), 1)

    marks = [
        (baseline["letter"], baseline["name"], _dict(score.get("baselines")).get(baseline["key"]))
        for baseline in legend
    ]
    marks.append(("max", "upper bound", score.get("upper_bound")))
    marks = sorted((_number(at), letter, name) for letter, name, at in marks if _number(at) is not None)
    said = [f"{label} {_text(value)}", f"95 % interval {_interval(score)}" if _interval(score) else "no interval"]
    interval = None if low is None or high is None else (x(low), max(round(x(high) - x(low), 1), 1.0))
    labels = _spread(
        [x(at) for at, _, _ in marks],
        [BOUND_WIDTH if letter == "max" else LETTER for _, letter, _ in marks],
        right,
    )
    return {
        **PICTURE,
        "y": 0 if marks else 19,  # the band of the letters is left out where there are none
        "right": right,
        "top": f"{top:g}",
        "point": x(value),
        "interval": interval,
        "marks": [
            {"x": x(at), "label_x": label_x, "letter": letter, "upper_bound": letter == "max"}
            for (at, letter, _), label_x in zip(marks, labels, strict=True)
        ],
        "said": ", ".join(said + [f"{name} {_text(at)}" for at, _, name in marks]),
    }


def _spread(wanted: Sequence[float], widths: Sequence[float], right: float) -> list[float]:
    """Return the ascending positions, moved apart so that labels of these widths do not touch, none beyond `right`."""
    positions: list[float] = []
    for at, width in zip(wanted, widths, strict=True):
        before = positions[-1] + (widths[len(positions) - 1] + width) / 2 if positions else 0.0
        positions.append(max(at, before))
    for i in reversed(range(len(positions))):
        limit = right if i == len(positions) - 1 else positions[i + 1] - (widths[i] + widths[i + 1]) / 2
        positions[i] = min(positions[i], limit)
    return [round(position, 1) for position in positions]


def _charts(log: Any) -> list[dict[str, Any]]:
    """Return the learning curves of a `log_history`: the losses, and ROUGE-L, by optimizer step."""
    entries = [_dict(entry) for entry in log] if isinstance(log, list) else []
    curves = {
        key: [
            (step, value)
            for step, value in ((_number(entry.get("step")), _number(entry.get(key))) for entry in entries)
            if step is not None and value is not None and abs(value) < LARGEST
        ]
        for key in ("loss", "eval_loss", "eval_rougeL")
    }
    charts = [
        _chart("Loss, nats a token", {"training": curves["loss"], "validation": curves["eval_loss"]}),
        _chart("ROUGE-L, validation", {"validation": curves["eval_rougeL"]}, from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _chart(title: str, curves: Mapping[str, list[tuple[float, float]]], from_zero: bool = False) -> dict | None:
    curves = {name: _thinned(points) for name, points in curves.items() if points}
    if not curves:
        return None
    steps, values = zip(*(point for points in curves.values() for point in points), strict=True)
    last = max(*steps, 1)
    y_ticks = _ticks(0 if from_zero else min(values), max(values))
    left, bottom = CHART["left"], CHART["height"] - CHART["bottom"]
    width, height = CHART["width"] - CHART["right"] - left, bottom - CHART["top"]
    low, high = y_ticks[0], y_ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        return round(left + width * step / last, 1), round(bottom - height * (value - low) / (high - low), 1)

    return {
        **CHART,
        "title": title,
        "bottom": bottom,
        "right": left + width,
        "x_ticks": [(place(tick, low)[0], f"{tick:,.0f}") for tick in _ticks(0, last) if tick <= last],
        "y_ticks": [(place(0, tick)[1], f"{tick:g}") for tick in y_ticks],
        "lines": [{"name": name, "points": [place(*point) for point in points]} for name, points in curves.items()],
        "said": f"{title}, by step: "
        + "; ".join(
            f"{name} from {_text(points[0][1])} at step {points[0][0]:g} to {_text(points[-1][1])} at step "
            f"{points[-1][0]:g}"
            for name, points in curves.items()
        ),
    }


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most about `POINTS` of the points, the last among them."""
    step = math.ceil(len(points) / POINTS)
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])


def _ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers from at most `low` to at least `high`.

    Values that differ by less than they can be told apart get the ticks of their size.
    """
    size = max(abs(low), abs(high))
    span = max(high - low if high - low > 1e-6 * size else size, 1e-6)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _round_up(number: float) -> float:
    """Return a round number of at least `number`, and 1 where that is not positive."""
    if number <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(number))
    return round(
        next(power * factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * factor >= number), 12
    )


# --- Facts ----------------------------------------------------------------------------------------------------


def _facts(recipe: Mapping[str, Any], split: str, captions: int, scored: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what was run on what, as far as the recipe says, as rows of a name and a value."""
    start, config = recipe.get("model_name_or_path"), recipe.get("config_name")
    model = start and _with_revision(start, recipe.get("model_revision"))
    if model and recipe.get("do_train", True):
        model = f"fine-tuned from {model}"
    elif config:
        model = f"{PurePath(str(config)).stem}, from random weights"
    data = recipe.get("dataset_name")
    beams, tokens = recipe.get("num_beams"), recipe.get("max_new_tokens")
    distinct = _number(scored.get("unique_captions"))
    facts = [
        ("Model", model),
        ("Data", data and _with_revision(data, recipe.get("dataset_revision"))),
        ("Split", f"{split}, {captions:,} captions"),
        ("Distinct captions", None if distinct is None else f"{distinct:.0%}"),
        ("Decoding", beams and tokens and f"{'greedy' if beams == 1 else f'{beams} beams'}, up to {tokens} tokens"),
    ]
    return [(name, value) for name, value in facts if value]


def _with_revision(name: Any, revision: Any) -> str:
    """Return a Hub id with the start of its commit, or the last folder of a path: a page names no one's folders."""
    text = str(name)
    if PurePath(text).is_absolute() or text.startswith(("~", ".")) or "\\" in text:
        text = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return f"{text} @ {revision[:7]}" if isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision) else text


# --- Text that is safe ------------------------------------------------------------------------------------------


def _showable(value: Any) -> Any:
    """Return what UTF-8 and HTML can hold: lone surrogates and NUL become U+FFFD."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


def _json(value: Any) -> Markup:
    """Return JSON for a script element: UTF-8, and nothing in it that HTML could take for a tag or a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)  # which has no UTF-8
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _hash(source: str, element: str) -> str:
    """Return the hash by which the Content-Security-Policy knows the template's own script or style."""
    body = re.search(f"<{element}>(.*?)</{element}>", source, re.DOTALL)[1]
    return f"sha256-{_base64(hashlib.sha256(body.encode()).digest())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _number(value: Any) -> float | None:
    """Return a finite number, None for anything else: a score may be null or NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _rounded(value: Any, digits: int) -> float | None:
    number = _number(value)
    return None if number is None else round(number, digits)


def _text(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> Mapping[str, Any]:
    return _dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
