"""The n-grams of many captions, counted at once in sparse matrices.

What two captions have in common, repeated n-grams as often as they occur in both, is a product of two rows of
`occurrences`: so that a product of matrices takes the place of a loop over pairs.
"""

import functools
from collections.abc import Hashable, Sequence

import numpy as np
import scipy.sparse as sp


class NgramTable:
    """The n-grams of N captions.

    Args:
        captions: N lists of tokens.

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
