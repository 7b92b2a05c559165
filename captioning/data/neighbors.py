"""The training images that look most like an image, and their captions, as they are stored beside a model.

Without `datasets`, which takes seconds to import: captions of one's own images do without it.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import numpy, safe_open

from captioning.data.images import pixel_hash
from captioning.errors import UserError, as_user_error
from captioning.files import write_whole
from captioning.models.retriever import Retriever, similarities


MAX_COSINES = 2**26  # in memory at a time
FOLDER = "retrieval"  # beside a model; never pushed, since captions may be private
FEATURES, TEXTS = "features.safetensors", "captions.json"


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
    places: list[dict[Any, list[int]]] = [defaultdict(list) for _ in keys]
    for place, (_, values) in zip(places, keys, strict=True):
        for row, value in enumerate(values):
            place[value].append(row)
    found = []
    for start, cosines in similarities(features, others, max(1, MAX_COSINES // len(others))):
        every = np.arange(len(cosines))
        for row, own in enumerate(cosines, start):
            for place, (values, _) in zip(places, keys, strict=True):
                if values[row] not in (None, ""):
                    own[place[values[row]]] = -np.inf
        best = []
        for _ in range(min(number, len(others))):  # of few as fast as `torch.topk`, which takes any of equal ones
            best.append(cosines.argmax(axis=1))
            best[-1][np.isneginf(cosines[every, best[-1]])] = -1
            cosines[every, best[-1]] = -np.inf
        found += [[int(other) for other in own if other >= 0] for own in np.stack(best, axis=1)]
    return found


@dataclass(frozen=True)
class Pool:
    """The M training images whose captions are retrieved."""

    captions: Sequence[str]
    image_ids: Sequence[str]
    pixels: Sequence[int]  # `pixel_hash`
    features: np.ndarray  # float32 `[M, D]`
    retriever: str  # digest of the model that the features are of

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
    """A stored pool and its retriever, for images of one's own; UserError if that is another one."""

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
