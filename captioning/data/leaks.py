"""Leaks: rows of a scored split that are in an earlier split too, by id, by pixels, by pixels and caption."""

import logging
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from captioning.data.splits import NEIGHBORS
from captioning.stages import stage


logger = logging.getLogger(__name__)

KINDS = ("image_id", "pixels", "pixels_and_caption", "caption")
EARLIER = {"validation": ("train",), "test": ("train", "validation")}
Leaks = Mapping[str, Mapping[str, int]]  # of a split: by the earlier split, what `find_leaks` counts


@stage("leaks")
def find_leaks(splits: Mapping[str, Dataset], log: bool = True) -> dict[str, dict[str, dict[str, int]]]:
    """Count, and `log`, the rows of each scored split that an earlier split has too.

    Pixels are compared where `check_rows` has opened the images; of a training split without `pixels`, those of its
    sample `NEIGHBORS`.

    Returns:
        By split and earlier split, the rows with the same value of each of `KINDS`; and how many `rows` the earlier
        split has, of which how many were `opened`.
    """
    keys = {split: _row_keys(rows) for split, rows in splits.items()}
    if NEIGHBORS in keys and not keys["train"]["pixels"]:
        keys["train"] |= {kind: keys[NEIGHBORS][kind] for kind in ("pixels", "pixels_and_caption")}
    found = {
        split: {other: _compare(keys[split], keys[other]) for other in others if other in keys}
        for split, others in EARLIER.items()
        if split in keys
    }
    if log:
        for split, leaks in found.items():
            for sentence in leaks_in_words(split, len(splits[split]), leaks):
                logger.warning("%s", sentence)
    return found


def leaks_in_words(split: str, number: int, leaks: Leaks) -> list[str]:
    """Return a sentence for each leak of a split of `number` rows, and one where pixels were not compared.

    Captions alone are no leak, since short ones repeat; they are reported where nothing more is known.
    """
    sentences = []
    for other, counts in leaks.items():
        if counts["image_id"]:
            sentences.append(f"{split}: {counts['image_id']:,} of {number:,} image ids are also in split '{other}'")
        if counts["pixels"]:
            what = f"{counts['pixels']:,} of {number:,} images are also in split '{other}' (same pixels)"
            both = f"{counts['pixels_and_caption']:,} of them with the same caption"
            sentences.append(f"{split}: {what}, {both}: the scores are too high")
        if counts["opened"] < counts["rows"]:
            what = f"{counts['opened']:,} of {counts['rows']:,} images of split '{other}', the others were not opened"
            same = f"{counts['caption']:,} of {number:,} captions are in both"
            sentences.append(f"{split}: pixels were compared with {what}; {same}")
    return sentences


def _row_keys(rows: Dataset) -> dict[str, pa.Array]:
    """Return the values by which rows are compared, as text, those of pixels of the images that were opened."""
    names = [name for name in ("image_id", "caption", "pixels") if name in rows.column_names]
    columns = rows.select_columns(names).with_format("arrow")[:]
    image_ids, captions, *pixels = (pc.cast(columns[name], pa.string()) for name in names)
    pixels = pixels[0] if pixels else pa.nulls(len(rows), pa.string())
    both = pc.binary_join_element_wise(pixels, captions, "\n")  # null where one of them is
    return dict(zip(KINDS, (image_ids, pixels.drop_null(), both.drop_null(), captions), strict=True))


def _compare(ours: Mapping[str, pa.Array], theirs: Mapping[str, pa.Array]) -> dict[str, int]:
    counts = {kind: pc.sum(pc.is_in(ours[kind], value_set=theirs[kind])).as_py() or 0 for kind in KINDS}
    return counts | {"rows": len(theirs["caption"]), "opened": len(theirs["pixels"])}
