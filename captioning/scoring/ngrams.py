"""BLEU, CIDEr and ROUGE-L by `pycocoevalcap` 1.2, of the n-grams of all captions counted at once in sparse matrices.

`ngram_scores` scores pairs, `CandidateScores` one caption against all references: which one is the best? A loop over
pairs would take hours for 60,000 captions. What two captions have in common, repeated n-grams as often as they occur
in both, is a product of two rows of `NgramTable.occurrences`, so that a product of matrices takes its place.
"""

import functools
import itertools
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from captioning.scoring.bootstrap import Score
from metrics import lcs_length


CIDER_SIGMA, CIDER_SCALE = 6.0, 10.0  # `pycocoevalcap.cider.cider_scorer`
ROUGE_BETA = 1.2  # `pycocoevalcap.rouge.rouge.Rouge`; rouge_score weighs precision and recall alike
WORD_BITS = 64  # words of a candidate whose matches fit into one integer


class NgramTable:
    """The n-grams of N captions, lists of tokens.

    Attributes:
        lengths: int `[N]`, the number of tokens.
        ids: int `[T]`, all tokens, one caption after the other, as numbers below `num_tokens`.
        num_tokens: distinct tokens.
    """

    def __init__(self, captions: Sequence[Sequence[Hashable]]):
        vocabulary: dict[Hashable, int] = {}
        ids = [vocabulary.setdefault(token, len(vocabulary)) for tokens in captions for token in tokens]
        self.ids, self.num_tokens = np.array(ids, dtype=np.int64), len(vocabulary)
        self.lengths = np.array([len(tokens) for tokens in captions], dtype=np.int64)
        self.counts = functools.cache(self._counts)  # each score asks for them again

    def _counts(self, order: int) -> sp.csr_matrix:
        """Return how often each caption has each n-gram of this order, float64 `[N, G]`."""
        grams, rows = self.ids, np.repeat(np.arange(len(self.lengths)), self.lengths)
        for n in range(2, order + 1):  # an n-gram is an (n-1)-gram and a token
            pairs = grams[:-1] * self.num_tokens + self.ids[n - 1 :]
            grams = np.unique(pairs, return_inverse=True)[1]
        starts = rows[: len(grams)] == rows[order - 1 :]  # the others reach into the next caption
        grams, rows = grams[starts], rows[: len(grams)][starts]
        shape = len(self.lengths), int(grams.max(initial=-1)) + 1
        return sp.csr_matrix((np.ones(len(grams)), (rows, grams)), shape)

    def occurrences(self, order: int, values: np.ndarray | None = None) -> sp.csr_matrix:
        """Return a matrix `[N, O]` of ones: the second occurrence of an n-gram in a caption has a column of its own.

        `values` replace the ones: one for each entry of `counts(order).data`, in its order.
        """
        counts = self.counts(order)
        rows, grams = counts.nonzero()
        times = counts.data.astype(np.int64)
        rank = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        items = np.unique(rank * counts.shape[1] + np.repeat(grams, times), return_inverse=True)[1]
        shape = len(self.lengths), int(items.max(initial=-1)) + 1
        data = np.ones(len(items)) if values is None else np.repeat(values, times)
        return sp.csr_matrix((data, (np.repeat(rows, times), items)), shape)


def ngram_scores(systems: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Return `bleu1` to `bleu4`, `cider` and `rougeL` of each system, as `Bleu(4)`, `Cider()` and `Rouge()` give them.

    `systems` are N captions each, like the N references from `coco_tokens`. CIDEr is 0 for a single image: its inverse
    document frequencies are log(1 / 1).

    Raises:
        ValueError: a system does not have N captions.
    """
    if any(len(captions) != len(references) for captions in systems.values()):
        raise ValueError(f"there are {len(references)} references, and another number of captions of a system")
    row = {text: i for i, text in enumerate(dict.fromkeys(itertools.chain(references, *systems.values())))}
    table = NgramTable([text.split() for text in row])
    rows = {name: [row[text] for text in captions] for name, captions in systems.items()}
    of_reference = [row[text] for text in references]
    lengths, reference_lengths = table.lengths, table.lengths[of_reference]
    num_pairs = np.maximum(lengths - 1, 0)  # CIDEr's length of a caption is its number of 2-grams
    counted = {name: np.zeros((len(references), 8)) for name in systems}
    cider = {name: np.zeros(len(references)) for name in systems}
    for n in range(1, 5):
        counts = table.counts(n)
        reference = counts[of_reference]
        idf = inverse_document_frequencies(reference)
        weights = reference @ idf
        for name, own_rows in rows.items():
            own = counts[own_rows]
            counted[name][:, n - 1] = own.sum(axis=1).A1
            counted[name][:, n + 3] = own.minimum(reference).sum(axis=1).A1
            penalty = cider_penalty(num_pairs[own_rows] - num_pairs[of_reference])
            cider[name] += _cosines(own @ idf, weights) * penalty * (CIDER_SCALE / 4)
    scores = {}
    for name, own_rows in rows.items():
        sums = np.column_stack([counted[name], lengths[own_rows], reference_lengths])
        scores[name] = {f"bleu{n}": Score(sums, functools.partial(bleu, n)) for n in range(1, 5)}
        rouge_l = _rouge_l(systems[name], references)
        scores[name] |= {"cider": Score.of(cider[name]), "rougeL": Score.of(rouge_l)}
    return scores


def inverse_document_frequencies(counts: sp.csr_matrix) -> sp.dia_matrix:
    """Return CIDEr's weight of each n-gram, a diagonal matrix, from the counts `[N, G]` of N references."""
    number = np.bincount(counts.indices, minlength=counts.shape[1])
    return sp.diags(np.log(counts.shape[0]) - np.log(np.maximum(number, 1)))


def cider_penalty(difference: np.ndarray) -> np.ndarray:
    """Return CIDEr-D's factor for two captions whose lengths, in 2-grams, differ by so much."""
    return np.exp(-(difference**2) / (2 * CIDER_SIGMA**2))


def norms(weights: sp.csr_matrix) -> np.ndarray:
    """Return the Euclidean length of each row, `[N]`."""
    return np.sqrt(weights.multiply(weights).sum(axis=1).A1)


def _cosines(own: sp.csr_matrix, reference: sp.csr_matrix) -> np.ndarray:
    """Return CIDEr-D's similarity of each row of both, `[N]`: a cosine in which repeated n-grams are clipped."""
    common = own.minimum(reference).multiply(reference).sum(axis=1).A1
    total = norms(own) * norms(reference)
    return np.divide(common, total, out=np.zeros_like(total), where=total > 0)


def bleu(n: int, sums: np.ndarray, number: int) -> np.ndarray:
    """Return BLEU `[...]` of n-grams up to `n` by `BleuScorer.compute_score`'s formula.

    `sums` are `[..., 10]` over captions: possible and matched 1- to 4-grams, words, words of the reference. The
    `number` of captions is unused, because BLEU is not a mean over them.
    """
    small, tiny = 1e-9, 1e-15  # the scorer's constants against a division by zero
    guess, correct, (length, reference_length) = sums[..., :n], sums[..., 4 : 4 + n], np.moveaxis(sums[..., 8:], -1, 0)
    precision = np.prod((correct + tiny) / (guess + small), axis=-1) ** (1 / n)
    ratio = (length + tiny) / (reference_length + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def _rouge_l(captions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the ROUGE-L of each caption, `[N]`, by `Rouge.calc_score`: a token is what lies between single spaces."""
    pairs = [(a.split(" "), b.split(" ")) for a, b in zip(captions, references, strict=True)]
    common, own, stated = np.array([(lcs_length(a, b), len(a), len(b)) for a, b in pairs], float).T
    precision, recall = common / own, common / stated
    weighted = recall + ROUGE_BETA**2 * precision
    scaled = (1 + ROUGE_BETA**2) * precision * recall
    return np.divide(scaled, weighted, out=np.zeros(len(pairs)), where=common > 0)


class CandidateScores:
    """C candidates, each of which is scored as the caption of all of M references; all are lists of tokens."""

    def __init__(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]):
        self._table = NgramTable([*references, *candidates])
        self._number = len(references)
        self._reference_lengths, self._lengths = np.split(self._table.lengths, [self._number])
        ids = np.split(self._table.ids, np.cumsum(self._table.lengths)[:-1])
        self._references, self._candidates = ids[: self._number], ids[self._number :]

    def _in_common(self, order: int, values: np.ndarray | None = None) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        occurrences = self._table.occurrences(order, values)
        return occurrences[: self._number], occurrences[self._number :]

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

    def meteor_of_equal_words(self, alpha: float) -> np.ndarray:
        """Return METEOR's weighted mean of precision and recall, `[C]`, if only equal words matched, in any order."""
        in_references, in_candidates = self._in_common(1)
        common = in_candidates @ in_references.sum(axis=0).A1
        total = (1 - alpha) * self._number * self._lengths + alpha * self._reference_lengths.sum()
        return common / np.maximum(total, 1)


def _by_value(values: np.ndarray) -> tuple[np.ndarray, sp.csr_matrix]:
    """Return the distinct values `[V]`, and a matrix `[V, M]` whose product adds up the rows of equal value."""
    distinct, group = np.unique(values, return_inverse=True)
    return distinct, sp.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))))
