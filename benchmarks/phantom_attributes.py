"""What a caption of a phantom states: the inverse of `phantoms.reword`, and the scores that follow from it.

attribute_accuracy(predictions, references)    # {"modality": 1.0, ..., "size": 0.97}
oracle_captions(references, seed=0)            # right in every attribute, in a wording picked at random
"""

import re

import numpy as np

from captioning.data.phantoms import ATTRIBUTES, WORDS, reword


def _reader(wordings):
    # Longest first: "CT scan" before "CT". The "lower" of "lower limbs" is not a place.
    longest_first = sorted(wordings, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b(?! limbs)", re.IGNORECASE)


_VALUES = {name: {w.lower(): value for value, ws in values.items() for w in ws} for name, values in WORDS.items()}
_READERS = {name: _reader(values) for name, values in _VALUES.items()}


def read_attributes(caption: str) -> dict[str, str | None]:
    """Return the attributes that `caption` states, the first mention of each, else None: the inverse of `reword`."""
    caption = re.sub(r"\s*-\s*", "-", caption)  # tokenizers decode "X-ray" to "x - ray"
    found = {name: reader.search(caption) for name, reader in _READERS.items()}
    return {name: _VALUES[name][match[0].lower()] if match else None for name, match in found.items()}


def attribute_accuracy(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Return for each attribute the share, 0 to 1, of predictions that agree with a reference that states it."""
    right = {name: [] for name in ATTRIBUTES}
    for prediction, reference in zip(predictions, references, strict=True):
        predicted = read_attributes(prediction)
        for name, value in read_attributes(reference).items():
            if value is not None:
                right[name].append(predicted[name] == value)
    return {name: float(np.mean(hits)) for name, hits in right.items() if hits}


def oracle_captions(captions: list[str], seed: int = 0) -> list[str]:
    """Return for each caption another of its attributes, in a wording picked at random.

    Their score is the upper bound of a captioner that sees everything and can only guess the wording.
    """
    rng = np.random.default_rng(seed)
    return [reword(read_attributes(caption), rng) for caption in captions]
