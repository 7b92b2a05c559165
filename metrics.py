"""Scores of generated captions, as an `evaluate.Metric` that needs no network.

ROUGE is `rouge_score` 0.1.2, F1, no stemmer, mean over captions, from 0 to 1, against the full caption.
`evaluate.load("rouge")` is not used: it downloads its script and returns a bootstrap median, random in the fourth
digit.
"""

import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from rouge_score import rouge_scorer
from transformers import EvalPrediction, PreTrainedTokenizerBase


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
METRIC_NAMES = ("loss", "perplexity", *ROUGE_TYPES, "gen_len", "unique_captions")


class CaptionMetric(evaluate.Metric):
    """`rouge1`, `rouge2`, `rougeL` and `unique_captions` of predictions against one reference each.

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
        scores = {name: float(values.mean()) for name, values in rouge(predictions, references).items()}
        return scores | {"unique_captions": len(set(predictions)) / len(predictions)}


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the `rouge1`, `rouge2` and `rougeL` F1 of each pair, each float64 `[N]`, from 0 to 1.

    Raises:
        ValueError: there are not as many predictions as references.
    """
    scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=False)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores]) for name in ROUGE_TYPES}


def decode_captions(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Turn generated tokens `[N, T]`, padded with the padding token or -100, into N captions."""
    tokens = np.where(tokens < 0, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def compute_metrics(
    prediction: EvalPrediction, references: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Score what `CaptioningTrainer.prediction_step` gathered over a split.

    Args:
        prediction: its `predictions` are `nll` float `[N]` (nats, summed over each caption), `num_tokens` int `[N]`
            and, with `predict_with_generate`, the new tokens int `[N, T]`.
        references: the N full captions. The label ids would flatter the score: they are truncated (T9).
        tokenizer: decodes the tokens.

    Returns:
        `loss` (token-level, nats) and `perplexity`; with generated tokens also `rouge1`, `rouge2`, `rougeL`,
        `unique_captions` and `gen_len`, the mean number of new tokens, the closing `[SEP]` included.
    """
    nll, num_tokens, *generated = prediction.predictions
    # T6: a mean of batch means is not the token-level loss, and moves with the batch size
    loss = float(nll.sum(dtype=np.float64) / num_tokens.sum())
    scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # 709 is where a float64 overflows
    if generated:
        new_tokens = (generated[0] >= 0) & (generated[0] != tokenizer.pad_token_id)
        captions = decode_captions(generated[0], tokenizer)
        scores |= CaptionMetric().compute(predictions=captions, references=list(references))
        scores["gen_len"] = float(new_tokens.sum(axis=1).mean())
    return scores
