"""Captions that were not written for the image: the baselines that a model's scores are read beside.

A baseline is a system like any other: it gives one caption for each image, and is scored as the model is. On ROCOv2 a
constant caption reaches a ROUGE-L of .165, more than a published fine-tune.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from metrics import lcs_length, rouge_tokens


MAX_REFERENCES = 10_000  # training captions that the constant caption is judged on, a seeded sample
MIN_GROUP = 10  # captions of which one can be called typical
WORD_BITS = 64  # words of a candidate whose matches fit into one integer
CHUNK = 2048  # images whose neighbors are sought at a time


@dataclass(frozen=True)
class Baseline:
    """How a baseline is called.

    Attributes:
        name: in a legend.
        heading: over a column of a table.
        letter: in a picture.
        description: in a sentence.
    """

    name: str
    heading: str
    letter: str
    description: str


# By the key that it has in scores.json; the most telling first
BASELINES = {
    "constant": Baseline("constant caption", "constant", "C", "the best constant caption"),
    "typical_of_modality": Baseline(
        "typical of modality", "modality", "M", "the most typical caption of the true modality"
    ),
    "nearest_image": Baseline("nearest training image", "nearest", "N", "the caption of the nearest training image"),
    "shuffled_references": Baseline("shuffled references", "other refs", "R", "the reference of another image"),
    "shuffled_images": Baseline("shuffled images", "other images", "I", "the model's caption of another image"),
}


def shuffled(captions: Sequence[str], seed: int = 0) -> list[str]:
    """Return the captions in another order, none of two or more in its own place."""
    order = np.random.default_rng(seed).permutation(len(captions))
    source = np.empty(len(captions), dtype=np.int64)
    source[order] = np.roll(order, 1)  # one cycle through all of them
    return [captions[i] for i in source]


def sample_rows(number: int, most: int) -> list[int]:
    """Return up to `most` of `number` row numbers, drawn with a fixed seed and sorted."""
    return sorted(np.random.default_rng(0).permutation(number)[:most].tolist())


def nearest_captions(features: np.ndarray, train_features: np.ndarray, train_captions: Sequence[str]) -> list[str]:
    """Return for each image the caption of the training image whose features are most alike, by cosine.

    What all training images have in common is taken off first: it is most of a feature, and tells none from another.

    Args:
        features: float `[N, H]`, of the images that are scored.
        train_features: float `[M, H]`.
        train_captions: the M captions.
    """
    common = train_features.mean(axis=0)
    train = train_features - common
    train /= np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-12)
    nearest = [
        ((features[start : start + CHUNK] - common) @ train.T).argmax(axis=1)
        for start in range(0, len(features), CHUNK)
    ]
    return [train_captions[i] for i in np.concatenate(nearest)]


def typical_captions(
    captions: Sequence[str], groups: Sequence[str], fewest: int = MIN_GROUP, seed: int = 0
) -> dict[str, str]:
    """Return for each group, such as a modality, its best constant caption among its own.

    Groups of fewer than `fewest` captions are left out: what is typical of one caption is that caption.
    """
    members: dict[str, list[str]] = {}
    for caption, group in zip(captions, groups, strict=True):
        members.setdefault(group, []).append(caption)
    return {group: constant_caption(own, own, seed) for group, own in members.items() if len(own) >= fewest}


# --- The best constant caption --------------------------------------------------------------------------------


def constant_caption(candidates: Sequence[str], references: Sequence[str], seed: int = 0) -> str:
    """Return the candidate with the highest mean ROUGE-L F1 against all references, the first of equals.

    The search is exact. No candidate can have more than its mean ROUGE-1, since a common subsequence is no longer than
    the words in common; that mean is had for all candidates at once, and from the highest bound down few have to be
    tried. Of more than `MAX_REFERENCES` references a seeded sample is taken.

    Raises:
        ValueError: there is no candidate or no reference.
    """
    if not candidates or not references:
        raise ValueError("a constant caption needs candidates and references")
    if len(references) > MAX_REFERENCES:
        sample = np.random.default_rng(seed).choice(len(references), MAX_REFERENCES, replace=False)
        references = [references[i] for i in np.sort(sample)]
    texts = list(dict.fromkeys(candidates))
    words = [rouge_tokens(text) for text in texts]
    against = _References([rouge_tokens(reference) for reference in references])
    bounds = against.mean_rouge1(words)
    best, best_score = 0, -1.0
    for i in np.argsort(-bounds, kind="stable"):
        if bounds[i] < best_score - 1e-12:
            break
        score = against.mean_rouge_l(words[i])
        if score > best_score or (score == best_score and i < best):
            best, best_score = int(i), score
    return texts[best]


class _References:
    """Word lists that one candidate after the other is scored against, all at once."""

    def __init__(self, references: Sequence[Sequence[str]]):
        self.references = references
        self.lengths = np.array([len(words) for words in references])
        self.vocabulary: dict[str, int] = {}
        ids = [self.vocabulary.setdefault(word, len(self.vocabulary)) for words in references for word in words]
        self.words = np.array(ids, dtype=np.int64)
        self.rows = np.repeat(np.arange(len(references)), self.lengths)

    def mean_rouge1(self, candidates: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the mean ROUGE-1 F1 of each candidate, `[C]`.

        F1 is 2 x common / (words of both), and the words in common with all references of one length are a sum over
        the candidate's words: one product of sparse matrices instead of a loop over pairs.
        """
        numbering: dict[tuple[str, int], int] = {}  # the k-th time that a word occurs in a caption
        reference_words, rows = _occurrences(self.references, numbering)
        lengths, by_length = np.unique(self.lengths, return_inverse=True)
        candidate_words, candidate_rows = _occurrences(candidates, numbering)
        shape = (len(numbering), len(lengths))
        counts = csr_matrix((np.ones(len(rows)), (reference_words, by_length[rows])), shape)
        shape = (len(candidates), len(numbering))
        common = csr_matrix((np.ones(len(candidate_rows)), (candidate_rows, candidate_words)), shape) @ counts
        own = np.array([len(words) for words in candidates])
        total = np.maximum(own[:, None] + lengths[None, :], 1)
        return (2 * common.toarray() / total).sum(axis=1) / len(self.references)

    def mean_rouge_l(self, candidate: Sequence[str]) -> float:
        """Return the mean ROUGE-L F1 of a candidate."""
        total = np.maximum(len(candidate) + self.lengths, 1)
        return float((2 * self._lcs_lengths(candidate) / total).mean())

    def _lcs_lengths(self, candidate: Sequence[str]) -> np.ndarray:
        """Return `metrics.lcs_length` of the candidate and each reference, one word of all references a step."""
        if len(candidate) > WORD_BITS:
            return np.array([lcs_length(candidate, words) for words in self.references])
        if not candidate:
            return np.zeros(len(self.references), dtype=np.int64)
        positions = np.zeros(len(self.vocabulary), dtype=np.uint64)
        for i, word in enumerate(candidate):
            if word in self.vocabulary:
                positions[self.vocabulary[word]] |= np.uint64(1 << i)
        matches = positions[self.words]
        shared = np.flatnonzero(matches)  # words that the candidate lacks change nothing
        matches = matches[shared]
        steps = np.bincount(self.rows[shared], minlength=len(self.references))
        first = np.cumsum(steps) - steps
        order = np.argsort(-steps, kind="stable")  # those that go on longest first: a step works on a prefix
        first, steps = first[order], steps[order]
        full = np.uint64((1 << len(candidate)) - 1)
        state = np.full(len(self.references), full)
        for step in range(steps[0]):
            active = np.searchsorted(-steps, -step, side="left")
            here = state[:active]
            common = here & matches[first[:active] + step]
            state[:active] = (here + common) | (here - common)
        lengths = np.empty(len(self.references), dtype=np.int64)
        lengths[order] = len(candidate) - np.bitwise_count(state & full)
        return lengths


def _occurrences(
    captions: Sequence[Sequence[str]], numbering: dict[tuple[str, int], int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return column and row of each word in a matrix of captions; the second "the" of a caption has its own column.

    `numbering` is extended by the words that it lacks.
    """
    columns, rows = [], []
    for row, words in enumerate(captions):
        seen: Mapping[str, int] = {}
        for word in words:
            seen[word] = seen.get(word, 0) + 1
            columns.append(numbering.setdefault((word, seen[word]), len(numbering)))
            rows.append(row)
    return np.array(columns, dtype=np.int64), np.array(rows, dtype=np.int64)
