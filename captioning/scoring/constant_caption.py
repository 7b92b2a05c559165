"""The mean score of one caption, given for every image, against all references at once: which one is the best?

Every search is exact for its candidates and references. A loop over pairs would take hours for 60,000 captions; here
what a candidate has in common with all references of one length is a product of sparse matrices.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from captioning.scoring.coco import (
    ALPHA,
    CIDER_SCALE,
    bleu,
    cider_penalty,
    inverse_document_frequencies,
    norms,
)
from captioning.scoring.ngrams import NgramTable
from metrics import lcs_length, rouge_tokens


MAX_REFERENCES = 10_000  # references that candidates are scored against, a seeded sample of more
MIN_GROUP = 10  # captions of a group that has a typical one
WORD_BITS = 64  # words of a candidate whose matches fit into one integer


def constant_caption(candidates: Sequence[str], references: Sequence[str]) -> str:
    """Return the candidate with the highest mean ROUGE-L F1 against all references, the first of equals."""
    texts = list(dict.fromkeys(candidates))
    tokens = [[rouge_tokens(text) for text in side] for side in (texts, sampled(references))]
    return texts[CandidateScores(*tokens).best_by_rouge_l()]


def typical_captions(captions: Sequence[str], groups: Sequence[str], fewest: int = MIN_GROUP) -> dict[str, str]:
    """Return the best constant caption of each group, such as a modality, among its own captions.

    Groups of fewer than `fewest` captions are left out: the typical one of a single caption would be that caption.
    """
    members: dict[str, list[str]] = {}
    for caption, group in zip(captions, groups, strict=True):
        members.setdefault(group, []).append(caption)
    return {group: constant_caption(own, own) for group, own in members.items() if len(own) >= fewest}


def sampled(captions: Sequence[str], number: int = MAX_REFERENCES) -> list[str]:
    """Return the captions, or so many of them drawn with a fixed seed."""
    if len(captions) <= number:
        return list(captions)
    drawn = np.random.default_rng(0).choice(len(captions), number, replace=False)
    return [captions[i] for i in np.sort(drawn)]


class CandidateScores:
    """C candidates, each of which is scored as the caption of all of M images.

    Args:
        candidates: C lists of tokens.
        references: M lists of tokens.
    """

    def __init__(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]):
        self._table = NgramTable([*references, *candidates])
        self._number = len(references)
        self._reference_lengths, self._lengths = np.split(self._table.lengths, [self._number])
        ids = np.split(self._table.ids, np.cumsum(self._table.lengths)[:-1])
        self._references, self._candidates = ids[: self._number], ids[self._number :]

    def _in_common(self, order: int, values: np.ndarray | None = None) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        occurrences = self._table.occurrences(order, values)
        return occurrences[: self._number], occurrences[self._number :]

    # --- ROUGE ------------------------------------------------------------------------------------------------

    def rouge_n(self, order: int, beta: float = 1.0) -> np.ndarray:
        """Return the mean F-score of n-grams of each candidate, `[C]`.

        It is (1 + beta^2) x common / (n-grams of the candidate + beta^2 x n-grams of the reference).
        """
        in_references, in_candidates = self._in_common(order)
        own, stated = (np.maximum(part - order + 1, 0) for part in (self._lengths, self._reference_lengths))
        sizes, of_size = _by_value(stated)
        common = (in_candidates @ (of_size @ in_references).T).toarray()
        total = np.maximum(own[:, None] + beta**2 * sizes[None, :], 1)
        return ((1 + beta**2) * common / total).sum(axis=1) / self._number

    def best_by_rouge_l(self, beta: float = 1.0) -> int:
        """Return the candidate with the highest mean ROUGE-L, the first of equals.

        A common subsequence is not longer than the words in common, so that the mean ROUGE-1 is an upper bound.
        Candidates are tried from the highest bound down until no bound is left above the best score.
        """
        bounds = self.rouge_n(1, beta)
        best, best_score = 0, -1.0
        for i in np.argsort(-bounds, kind="stable"):
            if bounds[i] < best_score - 1e-12:
                break
            score = self.rouge_l(i, beta)
            if score > best_score or (score == best_score and i < best):
                best, best_score = int(i), score
        return best

    def rouge_l(self, candidate: int, beta: float = 1.0) -> float:
        """Return the mean ROUGE-L of one candidate."""
        total = np.maximum(self._lengths[candidate] + beta**2 * self._reference_lengths, 1)
        return float(((1 + beta**2) * self.lcs_lengths(candidate) / total).mean())

    def lcs_lengths(self, index: int) -> np.ndarray:
        """Return `metrics.lcs_length` of one candidate and each reference, `[M]`; a step reads one word of each."""
        candidate = self._candidates[index]
        if len(candidate) > WORD_BITS:
            return np.array([lcs_length(candidate.tolist(), words.tolist()) for words in self._references])
        positions = np.zeros(self._table.num_tokens, dtype=np.uint64)
        for i, word in enumerate(candidate):
            positions[word] |= np.uint64(1 << i)
        matches = positions[self._table.ids[: self._reference_lengths.sum()]]
        shared = np.flatnonzero(matches)  # words that the candidate lacks change nothing
        matches = matches[shared]
        rows = np.repeat(np.arange(self._number), self._reference_lengths)
        steps = np.bincount(rows[shared], minlength=self._number)
        first = np.cumsum(steps) - steps
        # Longest first, so that a step works on a prefix; small integers are sorted by radix, ten times as fast
        order = np.argsort((-steps).astype(np.min_scalar_type(-steps.max() - 1)), kind="stable")
        first, steps = first[order], steps[order]
        full = np.uint64((1 << len(candidate)) - 1)
        state = np.full(self._number, full)
        for step in range(steps[0]):
            active = np.searchsorted(-steps, -step, side="left")
            here = state[:active]
            common = here & matches[first[:active] + step]
            state[:active] = (here + common) | (here - common)
        lengths = np.empty(self._number, dtype=np.int64)
        lengths[order] = len(candidate) - np.bitwise_count(state & full)
        return lengths

    # --- BLEU, CIDEr, METEOR ----------------------------------------------------------------------------------

    def bleu(self) -> np.ndarray:
        """Return the BLEU-1 to BLEU-4 of each candidate, `[C, 4]`."""
        sums = np.zeros((len(self._lengths), 10))
        for order in range(1, 5):
            in_references, in_candidates = self._in_common(order)
            sums[:, order - 1] = self._number * np.maximum(self._lengths - order + 1, 0)
            sums[:, order + 3] = in_candidates @ in_references.sum(axis=0).A1
        sums[:, 8], sums[:, 9] = self._number * self._lengths, self._reference_lengths.sum()
        return np.column_stack([bleu(order, sums, self._number) for order in range(1, 5)])

    def cider(self) -> np.ndarray:
        """Return the CIDEr of each candidate, `[C]`; document frequencies are those of the references."""
        own, stated = (np.maximum(part - 1, 0) for part in (self._lengths, self._reference_lengths))  # in 2-grams
        sizes, of_size = _by_value(stated)
        penalty = cider_penalty(own[:, None] - sizes[None, :])
        total = np.zeros(len(self._lengths))
        for order in range(1, 5):
            counts = self._table.counts(order)
            idf = inverse_document_frequencies(counts[: self._number])
            length = norms(counts @ idf)
            rows, grams = counts.nonzero()
            # What two captions share of an n-gram, min(a, b) x b, is its squared weight times b for each occurrence
            # that both have
            shared = np.where(rows < self._number, counts.data * idf.data[0][grams] ** 2, 1.0)
            scaled = np.divide(shared, length[rows], out=np.zeros(len(rows)), where=length[rows] > 0)
            in_references, in_candidates = self._in_common(order, scaled)
            total += ((in_candidates @ (of_size @ in_references).T).toarray() * penalty).sum(axis=1)
        return total * CIDER_SCALE / 4 / self._number

    def meteor_of_equal_words(self) -> np.ndarray:
        """Return METEOR's weighted mean of precision and recall, `[C]`, if only equal words matched, in any order."""
        in_references, in_candidates = self._in_common(1)
        common = in_candidates @ in_references.sum(axis=0).A1
        total = (1 - ALPHA) * self._number * self._lengths + ALPHA * self._reference_lengths.sum()
        return common / np.maximum(total, 1)


def _by_value(values: np.ndarray) -> tuple[np.ndarray, sp.csr_matrix]:
    """Return the distinct values `[V]`, and a matrix `[V, M]` whose product adds up the rows of equal value."""
    distinct, group = np.unique(values, return_inverse=True)
    return distinct, sp.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))))
