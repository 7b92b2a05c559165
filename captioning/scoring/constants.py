"""The best constant for each score: one caption, or one set of items, given for every image.

A constant that is best for ROUGE-L is not best for another score, so that each score has its own. They are found on
the training captions:

* ROUGE and ImageCLEF's ROUGE-1: exactly, among all of them, against at most `MAX_REFERENCES` of them;
* BLEU, CIDEr and COCO's ROUGE-L: exactly among at most `MAX_REFERENCES`, against the same;
* METEOR, whose program is too slow for a search: the one of these that would be best if only equal words matched and
  their order did not matter;
* attributes and concepts: the best set of items, exactly; of lengths, which agree within a tolerance, by adding the
  best one until nothing is gained.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

from captioning.errors import UserError
from captioning.scoring.captions import Captions
from captioning.scoring.clinical import ATTRIBUTES, item_agreement, stated_attributes
from captioning.scoring.coco import ROUGE_BETA, TOKENIZERS, coco_tokens
from captioning.scoring.concepts import concept_f1, known_concepts
from captioning.scoring.constant_caption import CandidateScores, sampled
from metrics import imageclef_normalize, rouge_tokens


MAX_ITEMS = 100  # concepts of an image, by ImageCLEF's rules


@dataclass(frozen=True)
class Constants:
    """The best constants, by score: `captions` for wording, sorted `items` for attributes and concepts."""

    captions: dict[str, str]
    items: dict[str, list[str]]


def find_constants(captions: Sequence[str], cuis: Sequence[Sequence[str]], tokenizer: str | None) -> Constants:
    """Search the constants for all scores on the training split.

    Args:
        captions: M training captions.
        cuis: the concepts of each image, empty where none are known.
        tokenizer: of the COCO metrics; None leaves them out.
    """
    texts, references = list(dict.fromkeys(captions)), sampled(captions)
    found = {}
    for prefix, tokens in (("", _rouge), ("imageclef_", _imageclef)):
        scores = CandidateScores(tokens(texts), tokens(references))
        found[f"{prefix}rouge1"] = texts[scores.rouge_n(1).argmax()]
        if not prefix:
            found |= {"rouge2": texts[scores.rouge_n(2).argmax()], "rougeL": texts[scores.best_by_rouge_l()]}
    if tokenizer:
        found |= {f"{TOKENIZERS[tokenizer]}_{key}": text for key, text in _coco_constants(references, tokenizer)}
    attributes = [stated_attributes(text) for text in references]
    items = {f"{name}_f1": _best_items(name, [stated[name] for stated in attributes]) for name in ATTRIBUTES}
    truth = [known_concepts(known) for known in cuis]
    return Constants(found, items | ({"concept_f1": best_concepts(truth)} if any(truth) else {}))


def constant_values(
    constants: Constants, captions: Captions, reference_tokens: Sequence[str] | None, tokenizer: str | None
) -> dict[str, float]:
    """Return what the best constant for each score reaches on N images; METEOR, which is slow, is not among them.

    Args:
        constants: of the training split.
        captions: their references and concepts.
        reference_tokens: the references after `coco_tokens`; None leaves the COCO metrics out.
        tokenizer: of these tokens.
    """
    values = {}
    for tokens, names in ((_rouge, ("rouge1", "rouge2", "rougeL")), (_imageclef, ("imageclef_rouge1",))):
        scores = CandidateScores(tokens([constants.captions[name] for name in names]), tokens(captions.references))
        for i, name in enumerate(names):
            values[name] = scores.rouge_l(i) if name == "rougeL" else float(scores.rouge_n(int(name[-1]))[i])
    if reference_tokens is not None:
        prefix = f"{TOKENIZERS[tokenizer]}_"
        names = [name for name in constants.captions if name.startswith(prefix) and name != f"{prefix}meteor"]
        own = coco_tokens([constants.captions[name] for name in names], tokenizer)
        scores, in_order = _coco_candidates(own, reference_tokens)
        tables = {f"bleu{n}": column for n, column in enumerate(scores.bleu().T, start=1)} | {"cider": scores.cider()}
        for i, name in enumerate(names):
            key = name.removeprefix(prefix)
            values[name] = in_order.rouge_l(i, ROUGE_BETA) if key == "rougeL" else float(tables[key][i])
    attributes = [stated_attributes(text) for text in captions.references]
    for name in ATTRIBUTES:
        best = [frozenset(constants.items[f"{name}_f1"])] * len(captions)
        values[f"{name}_f1"] = item_agreement(name, best, [stated[name] for stated in attributes]).value
    if "concept_f1" in constants.items:
        best = [frozenset(constants.items["concept_f1"])] * len(captions)
        values["concept_f1"] = concept_f1(best, [known_concepts(known) for known in captions.cuis]).value
    return values


# --- Wording --------------------------------------------------------------------------------------------------


def _rouge(texts: Sequence[str]) -> list[list[str]]:
    return [rouge_tokens(text) for text in texts]


def _imageclef(texts: Sequence[str]) -> list[list[str]]:
    return [rouge_tokens(imageclef_normalize(text)) for text in texts]


def _coco_constants(captions: Sequence[str], tokenizer: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each score with its best caption; none where the tokenizer is missing."""
    try:
        tokens = coco_tokens(captions, tokenizer)
        first = {text: caption for text, caption in zip(reversed(tokens), reversed(captions), strict=True) if text}
        texts = list(first)
        scores, in_order = _coco_candidates(texts, tokens)
        for n, column in enumerate(scores.bleu().T, start=1):
            yield f"bleu{n}", first[texts[column.argmax()]]
        yield "cider", first[texts[scores.cider().argmax()]]
        yield "rougeL", first[texts[in_order.best_by_rouge_l(ROUGE_BETA)]]
        yield "meteor", first[texts[scores.meteor_of_equal_words().argmax()]]
    except UserError:  # of a missing program, which `coco_scores` names
        return


def _coco_candidates(texts: Sequence[str], references: Sequence[str]) -> tuple[CandidateScores, CandidateScores]:
    """Return the candidates for BLEU and CIDEr, and for ROUGE-L, which takes two spaces for an empty token."""
    return tuple(
        CandidateScores([text.split(space) for text in texts], [text.split(space) for text in references])
        for space in (None, " ")
    )


# --- Items ----------------------------------------------------------------------------------------------------


def _best_items(attribute: str, stated: Sequence[Set[str]]) -> list[str]:
    """Return the set with the highest micro F1 against the items of M captions, sorted.

    Of k items the most frequent are the best: F1 is 2 x common / (k x M + all items).
    """
    if attribute == "measurement":
        return _best_lengths(stated)
    frequent = Counter(item for items in stated for item in sorted(items)).most_common()
    common = np.cumsum([number for _, number in frequent])
    f1 = 2 * common / (np.arange(1, len(common) + 1) * len(stated) + common[-1:].sum())
    return sorted(item for item, _ in frequent[: f1.argmax() + 1]) if len(f1) else []


def _best_lengths(stated: Sequence[Set[str]]) -> list[str]:
    def f1(lengths: Collection[str]) -> float:
        return item_agreement("measurement", [frozenset(lengths)] * len(stated), stated).value

    candidates = [item for item, _ in Counter(item for items in stated for item in sorted(items)).most_common(20)]
    best: list[str] = []
    while candidates:
        longer = max(([*best, item] for item in candidates if item not in best), key=f1, default=best)
        if len(longer) == len(best) or (best and f1(longer) <= f1(best)):
            break
        best = longer
    return sorted(best, key=float)


def best_concepts(truth: Sequence[Set[str]]) -> list[str]:
    """Return the set of concepts with the highest mean F1 against those of M images, sorted.

    Of k concepts the best are those with the largest sums of 2 / (k + concepts of the image) over their images.
    """
    sizes = np.array([len(concepts) for concepts in truth])
    concepts = sorted({cui for own in truth for cui in own})
    row = {cui: i for i, cui in enumerate(concepts)}
    images = np.zeros((len(concepts), sizes.max(initial=0) + 1))  # by the number of concepts of the image
    for own in truth:
        for cui in own:
            images[row[cui], len(own)] += 1
    best, best_f1 = [], float((sizes == 0).mean())  # an empty set is right where the truth is empty
    for k in range(1, min(MAX_ITEMS, len(concepts)) + 1):
        gains = images @ (2 / (k + np.arange(images.shape[1])))
        chosen = np.argsort(-gains, kind="stable")[:k]
        if (f1 := gains[chosen].sum() / len(truth)) > best_f1 + 1e-12:
            best, best_f1 = [concepts[i] for i in chosen], f1
    return sorted(best)
