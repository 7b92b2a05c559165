"""Captions that were not written for the image: the baselines beside which a model's scores are read.

A baseline is a system like any other: it gives one caption for each image, and is scored as the model is. On 10,437
published captions a constant one reaches a ROUGE-L of .165, more than a fine-tune reports on ROCOv2.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from captioning.models.retriever import similarities
from captioning.scoring.captions import Captions
from captioning.scoring.training_split import Training
from captioning.stages import stage


class Baseline(NamedTuple):
    """What a baseline is called: in a sentence and on the page, above a column of a text table, and what it is."""

    name: str
    heading: str
    description: str


# By their keys in scores.json, the most telling first
BASELINES = {
    "constant": Baseline("constant caption", "constant", "the constant that is best for the score"),
    "typical_of_modality": Baseline("typical of modality", "typical", "the most typical caption of the true modality"),
    "nearest_image": Baseline("nearest training image", "nearest", "the caption of the nearest training image"),
    "shuffled_references": Baseline("shuffled references", "shuffled refs", "the reference of another image"),
    "shuffled_images": Baseline("shuffled images", "shuffled images", "the model's caption of another image"),
}


@stage("baselines")
def baseline_captions(
    captions: Captions, modalities: Sequence[str], split: Training, features: np.ndarray | None, constant: str
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the N captions of each baseline but the constant, by the keys of `BASELINES`, and notes on them.

    `split` is the training split, or the references in its place; `features` are float `[N, H]` of the images, for the
    nearest training image. An image whose modality has no typical caption gets the `constant`.
    """
    typical = split.typical
    found = {"typical_of_modality": [typical.get(modality, constant) for modality in modalities]}
    notes = {"typical_of_modality": {"captions": typical, "found_among": split.source}}
    if split.features is not None and features is not None:
        found["nearest_image"] = nearest_captions(features, split.features, split.neighbors)
        notes["nearest_image"] = {"found_among": f"{len(split.neighbors):,} training images"}
    if len(captions) > 1:  # else there is no other image
        found["shuffled_references"] = shuffled(captions.references)
        found["shuffled_images"] = shuffled(captions.predictions)
    return found, notes


def shuffled(captions: Sequence[str]) -> list[str]:
    """Return the captions in another order, in which none of two or more keeps its place."""
    order = np.random.default_rng(0).permutation(len(captions))
    source = np.empty(len(captions), dtype=np.int64)
    source[order] = np.roll(order, 1)  # one cycle through all of them
    return [captions[i] for i in source]


def nearest_captions(features: np.ndarray, train_features: np.ndarray, train_captions: Sequence[str]) -> list[str]:
    """Return for each of N images the caption of that of M training images with the most similar features, by cosine.

    Features are float `[N, H]` and `[M, H]`; see `similarities`.
    """
    nearest = [cosines.argmax(axis=1) for _, cosines in similarities(features, train_features)]
    return [train_captions[i] for i in np.concatenate(nearest)]
