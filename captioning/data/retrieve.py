"""Captions of the training images that look most like an image, for its prompt: `--retrieved_captions`.

A vision model, the retriever, says which images look alike. Its features are cached by the pixels of an image.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.utils import WeakFileLock
from PIL import Image
from safetensors import SafetensorError, numpy, safe_open
from tqdm import tqdm

from captioning.data.checks import usable_rows
from captioning.data.images import open_image, pixel_hash
from captioning.data.own_data import GROUP
from captioning.errors import UserError, as_user_error
from captioning.files import write_whole
from captioning.models.retriever import Retriever
from captioning.scoring.baselines import similarities


logger = logging.getLogger(__name__)

CACHE = Path(HF_DATASETS_CACHE) / "retriever_features"
PORTION = 4096  # images after which the cache is written: a run that was stopped goes on from there
MAX_COSINES = 2**26  # in memory at a time
FOLDER = "retrieval"  # beside a model; never pushed, since captions may be private
FEATURES, TEXTS = "features.safetensors", "captions.json"
COLUMNS = Features({"retrieved": List(Value("string")), "retrieved_ids": List(Value("string"))})


# --- Features -------------------------------------------------------------------------------------------------


def cached_features(retriever: Retriever, rows: Dataset) -> np.ndarray:
    """Return the features of N images by a retriever, float32 `[N, D]`; those that the cache has are not computed.

    The cache knows an image by its pixels, in whatever data it is. One without `pixels`, which `check_rows` has not
    opened, is encoded each time.
    """
    file = CACHE / f"{retriever.digest()}.safetensors"
    known = _read_cache(file)
    keys = [("row", row) if key is None else key for row, key in enumerate(rows["pixels"][:])]
    missing = sorted({key: row for row, key in enumerate(keys) if key not in known}.values())
    images, hidden = rows.select_columns("image"), None if missing else True  # None: where there is no terminal
    shown = iter(tqdm(missing, "Encoding images for the retriever", unit=" images", disable=hidden))
    for start in range(0, len(missing), PORTION):
        portion = [keys[row] for row in missing[start : start + PORTION]]
        opened = (open_image(images[row]["image"]) for row in islice(shown, len(portion)))
        known |= zip(portion, retriever.features(opened), strict=True)
        _write_cache(file, {key: feature for key, feature in known.items() if not isinstance(key, tuple)})
    return np.stack([known[key] for key in keys])


def _read_cache(file: Path) -> dict[Any, np.ndarray]:
    with suppress(OSError, SafetensorError, KeyError, ValueError):  # there is none, or it is damaged: written anew
        content = numpy.load_file(file)
        return dict(zip(content["pixels"].tolist(), content["features"], strict=True))
    return {}


def _write_cache(file: Path, known: dict[int, np.ndarray]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(file.with_suffix(".lock")):
            known = _read_cache(file) | known  # of another run
            if known:
                content = {"pixels": np.array([*known], dtype=np.int64), "features": np.stack([*known.values()])}
                write_whole(file, numpy.save(content))
    except OSError as error:  # a cache of others, or a full disk
        logger.warning("features of images cannot be cached, the next run computes them again: %s", error)


# --- The nearest ----------------------------------------------------------------------------------------------


def nearest_rows(
    features: np.ndarray, others: np.ndarray, number: int, keys: Sequence[tuple[Sequence, Sequence]] = ()
) -> list[list[int]]:
    """Return for each of N images the `number` nearest of M others by cosine, of equal ones the first.

    Args:
        features: float `[N, D]`.
        others: float `[M, D]`, whose mean is subtracted from all.
        number: fewer are returned where the others are fewer.
        keys: pairs of N and M values; an image does not get another of its own value. None and "" are no values.
    """
    places: list[dict[Any, list[int]]] = [{} for _ in keys]
    for place, (_, values) in zip(places, keys, strict=True):
        for row, value in enumerate(values):
            place.setdefault(value, []).append(row)
    found = []
    for start, cosines in similarities(features, others, max(1, MAX_COSINES // len(others))):
        every = np.arange(len(cosines))
        for row, own in enumerate(cosines, start):
            for place, (values, _) in zip(places, keys, strict=True):
                if values[row] not in (None, ""):
                    own[place.get(values[row], [])] = -np.inf
        best = []
        for _ in range(min(number, len(others))):  # of few as fast as `torch.topk`, which takes any of equal ones
            best.append(cosines.argmax(axis=1))
            best[-1][np.isneginf(cosines[every, best[-1]])] = -1
            cosines[every, best[-1]] = -np.inf
        found += [[int(other) for other in own if other >= 0] for own in np.stack(best, axis=1)]
    return found


@dataclass(frozen=True)
class Pool:
    """The M training images whose captions are retrieved.

    Attributes:
        captions: M captions.
        image_ids: M ids.
        pixels: `pixel_hash` of the images.
        features: float32 `[M, D]`, by the retriever.
        retriever: its digest.
    """

    captions: Sequence[str]
    image_ids: Sequence[str]
    pixels: Sequence[int]
    features: np.ndarray
    retriever: str

    def save(self, folder: Path) -> None:
        """Store it in a folder."""
        folder.mkdir(exist_ok=True)
        content = {"pixels": np.array(self.pixels, dtype=np.int64), "features": self.features}
        write_whole(folder / FEATURES, numpy.save(content, {"retriever": self.retriever}))
        texts = [{"image_id": i, "caption": text} for i, text in zip(self.image_ids, self.captions, strict=True)]
        write_whole(folder / TEXTS, json.dumps(texts, indent=0, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Pool":
        """Return what `save` stored; raise UserError if it cannot be read."""
        with as_user_error(f"'{folder}' cannot be read", "remove it to caption without retrieved captions"):
            texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
            with safe_open(folder / FEATURES, "np") as file:
                digest = file.metadata()["retriever"]
            content = numpy.load_file(folder / FEATURES)
            if len({len(texts), *map(len, content.values())}) > 1:
                raise ValueError(f"{TEXTS} and {FEATURES} are not of the same images")
            columns = ([row[name] for row in texts] for name in ("caption", "image_id"))
            return cls(*columns, content["pixels"].tolist(), content["features"], digest)


class Retrieval:
    """A stored pool and its retriever, for images of one's own.

    Raises:
        UserError: it is another retriever than that of the pool.
    """

    def __init__(self, pool: Pool, retriever: Retriever, number: int):
        if retriever.digest() != pool.retriever:
            raise UserError("the retriever is another than that of the run; give the one that recipe.json names")
        self.pool, self.retriever, self.number = pool, retriever, number

    def captions(self, images: Sequence[Image.Image]) -> list[list[str]]:
        """Return the captions for the prompts of B images, none of the image itself."""
        own = [pixel_hash(image) for image in images]
        features = self.retriever.features(images)
        nearest = nearest_rows(features, self.pool.features, self.number, [(own, self.pool.pixels)])
        return [[self.pool.captions[row] for row in rows] for rows in nearest]


# --- Rows of a run --------------------------------------------------------------------------------------------


def retrieve(dataset: DatasetDict, args, max_samples: dict[str, int | None]) -> tuple[DatasetDict, Pool | None]:
    """Add the columns `retrieved` and `retrieved_ids` to checked splits: captions for the prompt, and their ids.

    They are of the training images that the run uses, but not of the image itself, by id or pixels, nor of its group,
    unless `retrieve_across_groups`.

    Args:
        dataset: what `check_rows` returned, with all training images.
        args: a run's `CaptioningArguments`, of which it reads the fields for retrieval.
        max_samples: rows of each split that are used at most; None: all.

    Returns:
        The splits, and the training images; as they are and None where no captions are retrieved.

    Raises:
        UserError: there is no training split, or no such retriever.
    """
    if not args.retrieved_captions:
        return dataset, None
    if "train" not in dataset:
        raise UserError("retrieved_captions: the data has no split 'train' to retrieve from; add it, or set it to 0")
    retriever = Retriever.from_pretrained(args.retriever, args.device, args.retriever_revision)
    used = {split: usable_rows(rows, max_samples[split]) for split, rows in dataset.items()}
    splits = {split: rows.select(used[split]) for split, rows in dataset.items()}
    features = {split: cached_features(retriever, rows) for split, rows in splits.items()}
    keys = {split: _keys_of(rows, not args.retrieve_across_groups) for split, rows in splits.items()}
    texts = {"retrieved": list(splits["train"]["caption"]), "retrieved_ids": keys["train"][0]}
    found = DatasetDict()
    for split, rows in dataset.items():
        pairs = list(zip(keys[split], keys["train"], strict=True))
        nearest = nearest_rows(features[split], features["train"], args.retrieved_captions, pairs)
        nearest = dict(zip(used[split].tolist(), nearest, strict=True))
        columns = {
            name: [[own[other] for other in nearest.get(row, ())] for row in range(len(rows))]
            for name, own in texts.items()
        }
        found[split] = concatenate_datasets([rows, Dataset.from_dict(columns, features=COLUMNS)], axis=1)
    return found, Pool(*texts.values(), keys["train"][1], features["train"], retriever.digest())


def _keys_of(rows: Dataset, with_groups: bool) -> list[list]:
    """Return by what an image is known: ids, pixels and, if asked for, groups."""
    groups = rows[GROUP][:] if with_groups and GROUP in rows.column_names else [None] * len(rows)
    groups = ["" if group is None else str(group).strip() for group in groups]
    return [list(rows["image_id"]), rows["pixels"][:], groups]
