"""UMLS concepts (CUIs) in captions, without a license or a download: learned from the training split."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence, Set

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MultiLabelBinarizer

from captioning.scoring.bootstrap import Score
from captioning.scoring.clinical import plain_text


_CUI = re.compile(r"C\d{7}")
MIN_IMAGES = 10  # training images that a concept needs to be learned
MIN_PAIRS = 30  # training captions with concepts; with fewer nothing is learned
# N-grams that are features of a concept: as many as its images, within these bounds
MIN_FEATURES, MAX_FEATURES = 200, 1000
CUES = 10  # its most telling n-grams; a caption that has one of them is a candidate
# Captions without the concept that it is learned from: per one with it, and at least
NEGATIVES, MIN_NEGATIVES = 10, 3000


class ConceptExtractor:
    """Reads concepts from captions, learned from the captions and concepts (`cuis`) of the training split.

    Most concepts of ROCOv2 were found in the captions by a tool, so a logistic regression per concept on words, pairs
    and triples of words can recover them. Its features are only the n-grams that correlate with the concept, so that a
    thousand concepts on 60,000 captions take about a minute of one core. Those of fewer than `MIN_IMAGES` images are
    not learned: `concepts` are the learned ones, sorted; `reason` is why there are none, else "".
    """

    def __init__(self, captions: Sequence[str], cuis: Sequence[Sequence[str]]):
        known = [known_concepts(own) for own in cuis]
        images = Counter(cui for own in known for cui in own)
        kept = sorted(cui for cui, number in images.items() if number >= MIN_IMAGES)
        self.concepts, self.reason = [], ""
        if sum(map(bool, known)) < MIN_PAIRS:
            self.reason = f"fewer than {MIN_PAIRS} training captions have concepts"
        elif not kept:
            self.reason = f"no concept has {MIN_IMAGES} training images"
        else:
            self._learn([plain_text(text) for text in captions], [own.intersection(kept) for own in known], kept)

    def _learn(self, texts: Sequence[str], known: Sequence[Set[str]], kept: list[str]) -> None:
        self._vectorizer = CountVectorizer(
            binary=True, lowercase=False, ngram_range=(1, 3), min_df=2, token_pattern=r"[a-z0-9]+", dtype=np.float32
        )
        try:
            grams = self._vectorizer.fit_transform(texts)
        except ValueError:  # an empty vocabulary
            self.reason = "the training captions have no words in common"
            return
        rng = np.random.default_rng(0)
        columns_of_grams, spread = grams.tocsc(), np.bincount(grams.indices, minlength=grams.shape[1])
        binarizer = MultiLabelBinarizer(classes=kept, sparse_output=True)
        truth = binarizer.fit_transform(known).astype(np.float32).tocsc()  # [captions, concepts]
        together = (grams.T @ truth).tocsc()  # [grams, concepts], captions that have both
        weights, self._intercepts = [], np.zeros(len(kept))
        for c in range(len(kept)):
            positive = truth[:, [c]].toarray()[:, 0] > 0
            features, question = _telling(grams, together[:, [c]], spread, positive)
            part = columns_of_grams[:, features].tocsr()
            weight, self._intercepts[c] = _separate(part, positive, question, rng)
            weights.append(sp.csc_matrix((weight, (features, np.zeros_like(features))), shape=(grams.shape[1], 1)))
        self._weights = sp.hstack(weights).tocsr()
        self._weights.eliminate_zeros()
        self.concepts = kept

    def predict(self, captions: Sequence[str]) -> list[frozenset[str]]:
        """Return the concepts that each caption names; none if nothing was learned."""
        if self.reason:
            return [frozenset()] * len(captions)
        grams = self._vectorizer.transform([plain_text(caption) for caption in captions])
        found = []
        for start in range(0, len(captions), 1000):  # dense scores of all captions would take a gigabyte
            scores = (grams[start : start + 1000] @ self._weights).toarray() + self._intercepts
            found += [frozenset(self.concepts[c] for c in np.flatnonzero(row)) for row in scores > 0]
        return found


def _telling(
    grams: sp.csr_matrix, together: sp.csc_matrix, spread: np.ndarray, positive: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the most telling n-grams, sorted, of the concept of the `positive` captions; and its candidates.

    Half of the n-grams are the most telling ones among all captions; half among the candidates, where "left lung" may
    show that "lung" was not meant alone. `grams` `[captions, grams]` says which caption has which n-gram, `spread`
    `[grams]` how many captions have it, and `together` `[grams, 1]` how many of the positive ones.
    """
    half = int(np.clip(positive.sum(), MIN_FEATURES, MAX_FEATURES)) // 2
    held = together.indices
    telling = held[_most_surprising(together.data, spread[held], positive, half)]
    cues = np.zeros(grams.shape[1], np.float32)
    cues[telling[:CUES]] = 1
    question = np.flatnonzero(grams @ cues)
    rows, asked = grams[question], positive[question]
    seen = np.bincount(rows.indices, minlength=len(cues))
    return np.union1d(telling, _most_surprising(rows.T @ asked.astype(np.float32), seen, asked, half)), question


def _most_surprising(both: np.ndarray, spread: np.ndarray, positive: np.ndarray, number: int) -> np.ndarray:
    """Return the `number` n-grams whose 2 x 2 table with a concept has the highest chi-squared.

    `spread` `[grams]` captions have the n-gram, `both` `[grams]` of them the concept, as `positive` `[captions]` says.
    """
    share = positive.sum() / len(positive)
    expected = spread * share
    variance = expected * (1 - spread / len(positive)) * (1 - share)
    surprise = np.divide((both - expected) ** 2, variance, out=np.zeros(len(spread)), where=variance > 1e-9)
    return np.argsort(-surprise, kind="stable")[:number]


def _separate(
    part: sp.csr_matrix, positive: np.ndarray, question: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Return the weights `[features]` and the intercept that separate the `positive` rows of `part` from the others.

    It is fitted to all positive rows, to candidates without the concept, and to as many rows drawn from all others.
    """
    most = max(MIN_NEGATIVES, NEGATIVES * int(positive.sum()))
    hard, others = question[~positive[question]], np.flatnonzero(~positive)
    if not len(others):
        return np.zeros(part.shape[1]), 1.0  # every caption has the concept
    drawn = [rng.permutation(rows)[:most] for rows in (hard, others)]
    rows = np.unique(np.concatenate([np.flatnonzero(positive), *drawn]))
    # L1, since few n-grams name a concept; liblinear shuffles by a seed of its own
    model = LogisticRegression(C=1.0, l1_ratio=1, solver="liblinear", tol=1e-2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a tighter fit scores the same
        model.fit(part[rows], positive[rows])
    return model.coef_[0], float(model.intercept_[0])


def known_concepts(cuis: Sequence[str]) -> frozenset[str]:
    """Return the concepts of one image; "nan" and blanks, which some mirrors have for an empty field, are left out."""
    return frozenset(cui for cui in map(str.strip, cuis) if _CUI.fullmatch(cui))


def concept_f1(predicted: Sequence[Set[str]], truth: Sequence[Set[str]]) -> Score:
    """Return ImageCLEFmedical's F1 of concept detection: the mean over images of the F1 of two sets of CUIs.

    As in the official evaluator, an image without concepts for which none is predicted scores 1.

    Raises:
        ValueError: there are not as many predictions as images.
    """
    pairs = zip(predicted, truth, strict=True)
    return Score.of(np.array([2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0 for a, b in pairs]))
