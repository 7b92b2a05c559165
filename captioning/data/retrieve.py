"""Captions of the training images that look most like an image, for its prompt: `--retrieved_captions`.

A vision model, the retriever, says which images look alike. Its features are cached by the pixels of an image.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, numpy
from tqdm import tqdm

from captioning.data.checks import usable_rows
from captioning.data.images import open_image
from captioning.data.neighbors import Pool, nearest_rows
from captioning.data.own_data import GROUP
from captioning.errors import UserError
from captioning.files import write_whole
from captioning.models.retriever import Retriever


logger = logging.getLogger(__name__)

CACHE = Path(HF_DATASETS_CACHE) / "retriever_features"
COLUMNS = Features({"retrieved": List(Value("string")), "retrieved_ids": List(Value("string"))})


def cached_features(retriever: Retriever, rows: Dataset) -> np.ndarray:
    """Return the features of N images by a retriever, float32 `[N, D]`, each computed once.

    The cache knows an image by its pixels, in whatever data it is. One that `check_rows` has not opened has no
    `pixels` and is encoded each time.
    """
    file = CACHE / f"{retriever.digest()}.safetensors"
    known: dict[Any, np.ndarray] = _read_cache(file)
    keys = [("row", row) if key is None else key for row, key in enumerate(rows["pixels"][:])]
    missing = {key: row for row, key in enumerate(keys) if key not in known}
    if missing:
        images = rows.select_columns("image").select(missing.values())
        shown = tqdm(images, "Encoding images for the retriever", unit=" images", disable=None)  # only on a terminal
        known |= zip(missing, retriever.features(open_image(row["image"]) for row in shown), strict=True)
        try:
            _add_to_cache(file, {key: known[key] for key in missing if not isinstance(key, tuple)})
        except OSError as error:  # a cache of others, or a full disk
            logger.warning("features of images cannot be cached, the next run computes them again: %s", error)
    return np.stack([known[key] for key in keys])


def _add_to_cache(file: Path, features: dict[int, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(file.with_suffix(".lock")):
        if known := _read_cache(file) | features:
            content = {"pixels": np.array([*known], dtype=np.int64), "features": np.stack([*known.values()])}
            write_whole(file, numpy.save(content))


def _read_cache(file: Path) -> dict[int, np.ndarray]:
    with suppress(OSError, SafetensorError, KeyError, ValueError):  # there is none, or it is damaged: written anew
        content = numpy.load_file(file)
        return dict(zip(content["pixels"].tolist(), content["features"], strict=True))
    return {}


def retrieve(dataset: DatasetDict, args, max_samples: dict[str, int | None]) -> tuple[DatasetDict, Pool | None]:
    """Add the columns `retrieved` and `retrieved_ids` to checked splits: captions for the prompt, and their ids.

    They are of the training images that the run uses, but not of the image itself, by id or pixels, nor of its group,
    unless `retrieve_across_groups`.

    Args:
        dataset: what `check_rows` returned, with all training images.
        args: a run's `CaptioningArguments`.
        max_samples: rows of each split that are used at most; None: all.

    Returns:
        The splits and the training images; `dataset` and None where no captions are retrieved.

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
