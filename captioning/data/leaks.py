"""Leaks: rows of a scored split that are in an earlier split too, by id, by pixels, by pixels and caption."""

import logging
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


logger = logging.getLogger(__name__)

KINDS = ("image_id", "pixels", "pixels_and_caption", "caption")
EARLIER = {"validation": ("train",), "test": ("train", "validation")}
Leaks = Mapping[str, Mapping[str, int | None]]  # of a split: by the earlier split, what `find_leaks` counts


def find_leaks(splits: Mapping[str, Dataset]) -> dict[str, dict[str, dict[str, int | None]]]:
    """Count and log the rows of each scored split that an earlier split has too.

    Args:
        splits: rows with `image_id` and `caption`, and `pixels` where `check_rows` has opened the images.

    Returns:
        By split and earlier split, the number of rows with the same `image_id`, `pixels`, `pixels_and_caption`, and
        `caption`; None for pixels where the images of one of the two were not opened.
    """
    keys = {split: _keys(rows) for split, rows in splits.items() if split == "train" or split in EARLIER}
    found = {
        split: {
            other: {kind: _shared(values, keys[other][kind]) for kind, values in keys[split].items()}
            for other in others
            if other in keys
        }
        for split, others in EARLIER.items()
        if split in keys
    }
    for split, leaks in found.items():
        for sentence in leaks_in_words(split, len(splits[split]), leaks):
            logger.warning("%s", sentence)
    return found


def leaks_in_words(split: str, number: int, leaks: Leaks) -> list[str]:
    """Return a sentence for each leak of a split of `number` rows, and one where pixels were not compared.

    Captions alone are no leak, since short ones repeat; they are told where nothing more is known.
    """
    sentences = []
    for other, counts in leaks.items():
        ids, images, both, captions = (counts[kind] for kind in KINDS)
        if ids:
            sentences.append(f"{split}: {ids:,} of {number:,} image ids are also in split '{other}'")
        if images:
            sentences.append(f"{split}: {images:,} of {number:,} images are also in split '{other}' (same pixels), "
                             f"{both:,} of them with the same caption: the scores are too high")  # fmt: skip
        if images is None:
            sentences.append(f"{split}: pixels were not compared with split '{other}', whose images were not opened; "
                             f"{captions:,} of {number:,} captions are in both, word for word")  # fmt: skip
    return sentences


def _keys(rows: Dataset) -> dict[str, pa.Array]:
    """Return the values by which rows are compared, as text."""
    names = [name for name in ("image_id", "caption", "pixels") if name in rows.column_names]
    columns = rows.select_columns(names).with_format("arrow")[:]
    texts = {name: pc.cast(columns[name], pa.string()) for name in names}
    pixels = texts.get("pixels", pa.nulls(len(rows), pa.string()))
    both = pc.binary_join_element_wise(pixels, texts["caption"], "\n")  # null where one of them is
    return dict(zip(KINDS, (texts["image_id"], pixels, both, texts["caption"]), strict=True))


def _shared(values: pa.Array, others: pa.Array) -> int | None:
    if values.null_count == len(values) or others.null_count == len(others):
        return None
    return pc.sum(pc.is_in(values, value_set=others, skip_nulls=True)).as_py()
