"""Scores of generated captions: the Trainer's `compute_metrics`, and an `evaluate.Metric` that needs no network.

ROUGE is that of `rouge_score` 0.1.2: F1, no stemmer, mean over captions, from 0 to 1, against the full caption (T9).
Tokens and formula are the same and give the same floats; the longest common subsequence is faster. It is not
`evaluate.load("rouge")`, which downloads its script and returns a bootstrap median, random in the fourth digit. This
file imports nothing from `captioning`, so that `evaluate.load("path/to/metrics.py")` works.
"""

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Set
from itertools import pairwise

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
METRIC_NAMES = ("loss", "perplexity", *ROUGE_TYPES, "imageclef_rouge1", "gen_len", "unique_captions")
NUMBER = re.compile(r"\d+")
ROUGE_WORD = re.compile(r"[a-z0-9]+")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class CaptionMetric(evaluate.Metric):
    """`rouge1`, `rouge2`, `rougeL`, `imageclef_rouge1`, `unique_captions` of predictions against one reference each.

    `CaptionMetric().compute(predictions=[...], references=[...])` returns a dict of floats, each from 0 to 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries. ACL workshop.",
            inputs_description=CaptionMetric.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        values = wording_scores(tuple(predictions), tuple(references))
        scores = {name: float(score.mean()) for name, score in values.items()}
        return scores | {"unique_captions": len(set(predictions)) / len(predictions)}


# Cached: the Trainer's metrics, the predictions file and `scores.json` need them for the same captions
@functools.lru_cache(maxsize=1)
def wording_scores(predictions: tuple[str, ...], references: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return `rouge1`, `rouge2`, `rougeL` and `imageclef_rouge1` of each pair, each float64 `[N]`, read-only.

    Raises:
        ValueError: there are not as many predictions as references.
    """
    return rouge(predictions, references) | {"imageclef_rouge1": imageclef_rouge1(predictions, references)}


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the `rouge1`, `rouge2` and `rougeL` F1 of each pair, each float64 `[N]`, from 0 to 1.

    Raises:
        ValueError: there are not as many predictions as references.
    """
    # Each text once: systems repeat themselves, and a baseline is one caption for all images
    words = {text: rouge_tokens(text) for text in {*predictions, *references}}
    single = {text: _numbered(tokens) for text, tokens in words.items()}
    bigrams = {text: _numbered([*pairwise(tokens)]) for text, tokens in words.items()}
    return {
        "rouge1": _f1_scores(_overlap, single, predictions, references),
        "rouge2": _f1_scores(_overlap, bigrams, predictions, references),
        "rougeL": _f1_scores(lcs_length, words, predictions, references),
    }


def _f1_scores(
    common: Callable[[Collection, Collection], int],
    tokens: Mapping[str, Collection],
    predictions: Sequence[str],
    references: Sequence[str],
) -> np.ndarray:
    """Return the F1 of each pair, `[N]`, by the operations of `rouge_score`, so that not even the last bit differs."""
    pairs = [(tokens[text], tokens[reference]) for text, reference in zip(predictions, references, strict=True)]
    shared, predicted, stated = np.array([(common(a, b), len(a), len(b)) for a, b in pairs]).reshape(-1, 3).T
    precision, recall = shared / np.maximum(predicted, 1), shared / np.maximum(stated, 1)
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros(len(total)), where=total > 0)


def rouge_tokens(text: str) -> list[str]:
    """Return the words of `text` that `rouge_score` compares: lower case, ASCII letters and digits."""
    return ROUGE_WORD.findall(text.lower())


def _numbered(items: Sequence[Hashable]) -> set[Hashable]:
    """Return the items as a set in which each repetition of one has its number, so that none is lost."""
    distinct, seen = set(items), Counter()
    for item in items if len(distinct) < len(items) else ():
        distinct.add((item, seen[item]) if seen[item] else item)
        seen[item] += 1
    return distinct


def _overlap(a: Set, b: Set) -> int:
    return len(a & b)


def lcs_length(a: Sequence, b: Sequence) -> int:
    """Return the length of the longest common subsequence of two word lists.

    A row of the usual table is one integer (Hyyrö, Bit-parallel LCS-length computation revisited, 2004): a bit of
    `state` is 0 where the length grows by one, so that each word of `b` costs one addition.
    """
    positions: dict[object, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    full = state = (1 << len(a)) - 1
    for word in b:
        if word in positions:
            matches = state & positions[word]
            state = (state + matches | state - matches) & full
    return len(a) - state.bit_count()


def imageclef_normalize(caption: str) -> str:
    """Return a caption as the official evaluator compares it: lower case, digits to "number", no ASCII punctuation.

    The order of the steps matters: "3.5" becomes "numbernumber" (ImageCLEFmedical Caption 2023 to 2026, function
    `preprocess_caption` of `evaluator.py`, github.com/taubsity/clef-caption-evaluation-2026).
    """
    return NUMBER.sub("number", caption.lower()).translate(WITHOUT_PUNCTUATION)


def imageclef_rouge1(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the official ROUGE-1 of each pair, float64 `[N]`: F1 of normalized captions, 1 where both are empty."""
    words = {text: _numbered(rouge_tokens(imageclef_normalize(text))) for text in {*predictions, *references}}
    scores = _f1_scores(_overlap, words, predictions, references)
    both_empty = [not text and not reference for text, reference in zip(predictions, references, strict=True)]
    return np.where(both_empty, 1.0, scores)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return `loss` (token-level, nats) and `perplexity` of an evaluation of `CaptioningTrainer`.

    With captions also the scores of `CaptionMetric` and `gen_len`, the mean number of new tokens, the end token
    included. `label_ids` are the N full reference captions (T9). `predictions` have `nll` float `[N]` in nats, summed
    over each reference, `num_tokens` int `[N]`, and, if captions were generated, the N `captions` and
    `num_new_tokens` int `[N]`.
    """
    found = prediction.predictions
    # T6: the mean of batch means is not the token-level loss, and depends on the batch size
    loss = float(found.nll.sum(dtype=np.float64) / found.num_tokens.sum())
    scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # the exponential of 710 overflows
    if found.captions is not None:
        scores |= CaptionMetric().compute(predictions=found.captions, references=prediction.label_ids)
        scores["gen_len"] = float(found.num_new_tokens.mean())
    return scores
