"""The best constant caption: the one caption that, given for every image, scores the highest ROUGE-L."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from metrics import lcs_length, rouge_tokens


MAX_REFERENCES = 10_000  # references that candidates are scored against, a seeded sample of more
MIN_GROUP = 10  # captions of a group that has a typical one
WORD_BITS = 64  # words of a candidate whose matches fit into one integer


def typical_captions(captions: Sequence[str], groups: Sequence[str], fewest: int = MIN_GROUP) -> dict[str, str]:
    """Return the best constant caption of each group, such as a modality, among its own captions.

    Groups of fewer than `fewest` captions are left out: the typical one of a single caption would be that caption.
    """
    members: dict[str, list[str]] = {}
    for caption, group in zip(captions, groups, strict=True):
        members.setdefault(group, []).append(caption)
    return {group: constant_caption(own, own) for group, own in members.items() if len(own) >= fewest}


def constant_caption(candidates: Sequence[str], references: Sequence[str]) -> str:
    """Return the candidate with the highest mean ROUGE-L F1 against all references, the first of equals.

    The search is exact. The mean ROUGE-1 of a candidate is an upper bound, since a common subsequence is not longer
    than the words in common. It is computed for all candidates at once, and the candidates are tried from the highest
    bound down until no bound is left above the best score.
    """
    if len(references) > MAX_REFERENCES:
        sample = np.random.default_rng(0).choice(len(references), MAX_REFERENCES, replace=False)
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
    """The word lists of M references, against all of which a candidate is scored at once."""

    def __init__(self, references: Sequence[Sequence[str]]):
        self.references = references
        self.lengths = np.array([len(words) for words in references])
        self.vocabulary: dict[str, int] = {}
        ids = [self.vocabulary.setdefault(word, len(self.vocabulary)) for words in references for word in words]
        self.words = np.array(ids, dtype=np.int64)
        self.rows = np.repeat(np.arange(len(references)), self.lengths)

    def mean_rouge1(self, candidates: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the mean ROUGE-1 F1 of each candidate, `[C]`.

        F1 is 2 x common / (words of both). The words in common with all references of one length are a sum over the
        candidate's words, so that one product of sparse matrices replaces a loop over pairs.
        """
        numbering: dict[tuple[str, int], int] = {}
        in_references, in_candidates = (_occurrences(texts, numbering) for texts in (self.references, candidates))
        in_references.resize(len(self.references), len(numbering))
        lengths, group = np.unique(self.lengths, return_inverse=True)
        of_length = csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))))  # [lengths, M]
        common = in_candidates @ (of_length @ in_references).T
        own = np.array([len(words) for words in candidates])
        total = np.maximum(own[:, None] + lengths[None, :], 1)
        return (2 * common.toarray() / total).sum(axis=1) / len(self.references)

    def mean_rouge_l(self, candidate: Sequence[str]) -> float:
        """Return the mean ROUGE-L F1 of a candidate."""
        total = np.maximum(len(candidate) + self.lengths, 1)
        return float((2 * self._lcs_lengths(candidate) / total).mean())

    def _lcs_lengths(self, candidate: Sequence[str]) -> np.ndarray:
        """Return `metrics.lcs_length` of the candidate and each reference, `[M]`; a step reads one word of each."""
        if len(candidate) > WORD_BITS:
            return np.array([lcs_length(candidate, words) for words in self.references])
        positions = np.zeros(len(self.vocabulary), dtype=np.uint64)
        for i, word in enumerate(candidate):
            if word in self.vocabulary:
                positions[self.vocabulary[word]] |= np.uint64(1 << i)
        matches = positions[self.words]
        shared = np.flatnonzero(matches)  # words that the candidate lacks change nothing
        matches = matches[shared]
        steps = np.bincount(self.rows[shared], minlength=len(self.references))
        first = np.cumsum(steps) - steps
        order = np.argsort(-steps, kind="stable")  # longest first, so that a step works on a prefix
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


def _occurrences(captions: Sequence[Sequence[str]], numbering: dict[tuple[str, int], int]) -> csr_matrix:
    """Return a matrix `[captions, words]` of ones; the second "the" of a caption has a column of its own.

    Args:
        captions: word lists.
        numbering: the column of the k-th occurrence of a word; new ones are added.
    """
    columns = []
    for words in captions:
        seen: dict[str, int] = {}
        for word in words:
            seen[word] = seen.get(word, 0) + 1
            columns.append(numbering.setdefault((word, seen[word]), len(numbering)))
    ends = np.cumsum([0, *map(len, captions)])
    return csr_matrix((np.ones(len(columns)), columns, ends), (len(captions), len(numbering)))
