"""The work of `python -m captioning prepare SOURCE --describe`: statistics of any data set; nothing is written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from captioning.data.checks import column, mark_rows, usable
from captioning.data.leaks import find_leaks, leaks_in_words
from captioning.errors import printable
from captioning.scoring.clinical import modality_of
from captioning.scoring.concept_detection import NAMES


BATCH = 1000  # rows whose texts are in memory at once
SHOWN = 6  # of the concepts of a split; all are in --json
# The rows of the table, and where in `describe` their values are
ROWS = (
    ("rows", "rows", ""),
    ("left out", "left_out", ""),
    ("words of a caption: mean, median, 95 %", "words", ""),
    ("characters: mean, median, 95 %", "characters", ""),
    ("repeated ids", "repeated", "image_id"),
    ("repeated captions", "repeated", "caption"),
    ("repeated images (same pixels)", "repeated", "pixels"),
    ("concepts", "concepts", "distinct"),
    ("images without concepts", "concepts", "images_without"),
    ("width: mean, median, 95 %", "images", "width"),
    ("height: mean, median, 95 %", "images", "height"),
    ("text burned in, as headers say", "images", "burned_in"),
)


def describe(dataset: DatasetDict, names: Mapping[str, str], num_proc: int | None = None) -> dict[str, Any]:
    """Return statistics of what `load_source` returned, with the `names` of concepts.

    Returns:
        `splits`, for each of them `rows`, `left_out` (reason -> rows), and of the other rows `words` and `characters`
        of captions, `modalities`, `concepts`, `images` and `repeated`; `leaks`, see `find_leaks`, in words `leakage`.
    """
    marked = {split: mark_rows(rows, split, num_proc) for split, rows in dataset.items()}
    kept = {split: usable(rows) for split, rows in marked.items()}
    leaks = find_leaks(kept, log=False)  # they are in the result
    return {
        "splits": {split: _describe_split(kept[split], rows, NAMES | names) for split, rows in marked.items()},
        "leaks": leaks,
        "leakage": [text for split, own in leaks.items() for text in leaks_in_words(split, len(kept[split]), own)],
    }


def _describe_split(kept: Dataset, marked: Dataset, names: Mapping[str, str]) -> dict[str, Any]:
    words, characters, counts, modalities, without = [], [], Counter(), Counter(), 0
    for batch in kept.select_columns(["caption", "cui"]).iter(BATCH):
        for caption, cuis in zip(batch["caption"], batch["cui"], strict=True):
            words.append(len(caption.split()))
            characters.append(len(caption))
            counts.update(set(cuis))
            without += not cuis
            modalities[modality_of(cuis, caption)] += 1
    reasons = Counter(reason.split(":")[0] for reason in column(marked, "rejected").to_pylist() if reason)
    columns = {name: column(kept, name) for name in ("caption", "pixels", "mode", "burned_in")}
    return {
        "rows": len(marked),
        "left_out": dict(reasons.most_common()),
        "words": _spread(words),
        "characters": _spread(characters),
        "modalities": dict(modalities.most_common()),
        "concepts": {
            "distinct": len(counts),
            "images_without": without,
            "most_frequent": [{"cui": c, "name": names.get(c), "images": n} for c, n in counts.most_common()],
        },
        "images": {
            **{side: _spread(column(kept, side).to_numpy(zero_copy_only=False)) for side in ("width", "height")},
            "modes": dict(Counter(columns["mode"].to_pylist()).most_common()),
            "burned_in": pc.sum(columns["burned_in"]).as_py() or 0,
        },
        # `check_rows` leaves a second row of an id out
        "repeated": {"image_id": reasons["repeated image_id"]}
        | {name: len(kept) - pc.count_distinct(columns[name]).as_py() for name in ("caption", "pixels")},
    }


def _spread(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    median, high = np.quantile(values, (0.5, 0.95))
    spread = {"min": min(values), "mean": np.mean(values), "median": median, "p95": high, "max": max(values)}
    return {name: round(float(value), 1) for name, value in spread.items()}


def description_table(name: str, result: Mapping[str, Any]) -> str:
    """Return the dict of `describe` as text."""
    splits = result["splits"]
    cells = {
        label: [_cell(own[first][second] if second else own[first]) for own in splits.values()]
        for label, first, second in ROWS
    }
    lines = pd.DataFrame.from_dict(cells, "index", columns=list(splits)).to_string().splitlines()
    for split, own in splits.items():
        lines += ["", f"{split}: modalities {_counted(own['modalities'])}; modes {_counted(own['images']['modes'])}"]
        frequent = {row["name"] or row["cui"]: row["images"] for row in own["concepts"]["most_frequent"]}
        lines += [f"  concepts: {_counted(frequent)}"] if frequent else []
        lines += [f"  left out: {_counted(own['left_out'])}"] if own["left_out"] else []
    none = "none found by id and pixels" if len(splits) > 1 else "there is one split"
    lines += ["", f"leaks between splits: {'; '.join(result['leakage']) or none}"]
    for split, leaks in result["leaks"].items():
        shared = (f"{counts['caption']:,} of them in '{other}'" for other, counts in leaks.items())
        lines.append(f"captions in common: {split}: {', '.join(shared)}")
    return "\n".join([f"dataset '{name}'", "", *map(printable, lines)])


def _cell(value: int | Mapping[str, float]) -> str:
    """Return a number, the sum of counts by reason, or the three numbers of a spread that its row names."""
    if isinstance(value, int):
        return f"{value:,}"
    if "mean" not in value:
        return f"{sum(value.values()):,}"
    return " ".join(f"{value[key]:g}" for key in ("mean", "median", "p95"))


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {number:,}" for key, number in islice(numbers.items(), SHOWN)) or "none"
