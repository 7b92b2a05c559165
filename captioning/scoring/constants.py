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
from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np

from captioning.errors import UserError
from captioning.models.concept_head import MAX_CONCEPTS
from captioning.scoring import TOKENIZERS
from captioning.scoring.captions import Captions
from captioning.scoring.clinical import ATTRIBUTES, item_agreement, stated_attributes
from captioning.scoring.coco import ALPHA, coco_tokens
from captioning.scoring.concepts import concept_f1, known_concepts
from captioning.scoring.ngrams import ROUGE_BETA, CandidateScores
from metrics import imageclef_normalize, rouge_tokens


MAX_REFERENCES = 10_000  # references that candidates are scored against, a seeded sample of more
MIN_GROUP = 10  # captions of a group that has a typical one


class Constants(NamedTuple):
    """The best constants, by score: `captions` for wording, sorted `items` for attributes and concepts."""

    captions: dict[str, str]
    items: dict[str, list[str]]


def find_constants(captions: Sequence[str], cuis: Sequence[Sequence[str]], tokenizer: str | None) -> Constants:
    """Search the constants for all scores on M training captions and the concepts of their images, where known.

    `tokenizer` is that of the COCO metrics; None leaves them out.
    """
    texts, references = list(dict.fromkeys(captions)), sampled(captions)
    found = {}
    for tokens, names in WORDING.items():
        scores = CandidateScores(tokens(texts), tokens(references))
        for name in names:
            best = scores.best_by_rouge_l() if name == "rougeL" else scores.rouge_n(int(name[-1])).argmax()
            found[name] = texts[best]
    if tokenizer:
        found |= _coco_constants(references, tokenizer)
    attributes = [stated_attributes(text) for text in references]
    items = {f"{name}_f1": _best_items(name, [stated[name] for stated in attributes]) for name in ATTRIBUTES}
    truth = [known_concepts(known) for known in cuis]
    return Constants(found, items | ({"concept_f1": best_concepts(truth)} if any(truth) else {}))


def constant_values(
    constants: Constants, captions: Captions, reference_tokens: Sequence[str] | None, tokenizer: str | None
) -> dict[str, float]:
    """Return what the best constant for each score reaches on N images; METEOR, which is slow, is not among them.

    `reference_tokens` are the references after `coco_tokens`; None leaves the COCO metrics out.
    """
    values = {}
    for tokens, names in WORDING.items():
        scores = CandidateScores(tokens([constants.captions[name] for name in names]), tokens(captions.references))
        for i, name in enumerate(names):
            values[name] = scores.rouge_l(i) if name == "rougeL" else float(scores.rouge_n(int(name[-1]))[i])
    prefix = f"{TOKENIZERS.get(tokenizer)}_"
    names = [name for name in constants.captions if name.startswith(prefix) and name != f"{prefix}meteor"]
    if reference_tokens is not None and names:
        own = coco_tokens([constants.captions[name] for name in names], tokenizer)
        columns, in_order = _coco_candidates(own, reference_tokens)
        for i, name in enumerate(names):
            key = name.removeprefix(prefix)
            values[name] = in_order.rouge_l(i, ROUGE_BETA) if key == "rougeL" else float(columns[key][i])
    attributes = [stated_attributes(text) for text in captions.references]
    for name in ATTRIBUTES:
        best = [frozenset(constants.items[f"{name}_f1"])] * len(captions)
        values[f"{name}_f1"] = item_agreement(name, best, [stated[name] for stated in attributes]).value
    if "concept_f1" in constants.items:
        best = [frozenset(constants.items["concept_f1"])] * len(captions)
        values["concept_f1"] = concept_f1(best, [known_concepts(known) for known in captions.cuis]).value
    return values


def constant_caption(candidates: Sequence[str], references: Sequence[str]) -> str:
    """Return the candidate with the highest mean ROUGE-L F1 against all references, the first of equals."""
    texts = list(dict.fromkeys(candidates))
    return texts[CandidateScores(_rouge(texts), _rouge(sampled(references))).best_by_rouge_l()]


def typical_captions(captions: Sequence[str], groups: Sequence[str], fewest: int = MIN_GROUP) -> dict[str, str]:
    """Return the best constant caption of each group, such as a modality, among its own captions.

    Groups of fewer than `fewest` captions are left out: the typical one of a single caption would be that caption.
    """
    members: dict[str, list[str]] = {}
    for caption, group in zip(captions, groups, strict=True):
        members.setdefault(group, []).append(caption)
    return {group: constant_caption(own, own) for group, own in members.items() if len(own) >= fewest}


def sampled(captions: Sequence[str]) -> list[str]:
    """Return the captions, or `MAX_REFERENCES` of them drawn with a fixed seed."""
    if len(captions) <= MAX_REFERENCES:
        return list(captions)
    drawn = np.random.default_rng(0).choice(len(captions), MAX_REFERENCES, replace=False)
    return [captions[i] for i in np.sort(drawn)]


def _rouge(texts: Sequence[str]) -> list[list[str]]:
    return [rouge_tokens(text) for text in texts]


def _imageclef(texts: Sequence[str]) -> list[list[str]]:
    return [rouge_tokens(imageclef_normalize(text)) for text in texts]


WORDING = {_rouge: ("rouge1", "rouge2", "rougeL"), _imageclef: ("imageclef_rouge1",)}


def _coco_constants(captions: Sequence[str], tokenizer: str) -> dict[str, str]:
    """Return the best caption by the name of the score; none where the tokenizer is missing."""
    try:
        tokens = coco_tokens(captions, tokenizer)
    except UserError:  # of a missing program, which `coco_scores` names
        return {}
    first = {text: caption for text, caption in zip(reversed(tokens), reversed(captions), strict=True) if text}
    if not first:  # punctuation alone
        return {}
    texts = list(first)
    columns, in_order = _coco_candidates(texts, tokens)
    best = {name: column.argmax() for name, column in columns.items()}
    best["rougeL"] = in_order.best_by_rouge_l(ROUGE_BETA)
    return {f"{TOKENIZERS[tokenizer]}_{name}": first[texts[i]] for name, i in best.items()}


def _coco_candidates(texts: Sequence[str], references: Sequence[str]) -> tuple[dict[str, np.ndarray], CandidateScores]:
    """Return the scores of each candidate `[C]` by name, but for ROUGE-L; for this, a space apart is a token apart."""
    scores = CandidateScores([text.split() for text in texts], [text.split() for text in references])
    columns = {f"bleu{n}": column for n, column in enumerate(scores.bleu().T, start=1)}
    columns |= {"cider": scores.cider(), "meteor": scores.meteor_of_equal_words(ALPHA)}
    return columns, CandidateScores([text.split(" ") for text in texts], [text.split(" ") for text in references])


def _best_items(attribute: str, stated: Sequence[Set[str]]) -> list[str]:
    """Return the set with the highest micro F1 against the items of M captions, sorted.

    Of k items the most frequent are the best: F1 is 2 x common / (k x M + all items).
    """
    frequent = Counter(item for items in stated for item in sorted(items)).most_common()
    if attribute == "measurement":
        return _best_lengths([item for item, _ in frequent[:20]], stated)
    common = np.cumsum([number for _, number in frequent])
    f1 = 2 * common / (np.arange(1, len(common) + 1) * len(stated) + common[-1:].sum())
    return sorted(item for item, _ in frequent[: f1.argmax() + 1]) if len(f1) else []


def _best_lengths(candidates: Sequence[str], stated: Sequence[Set[str]]) -> list[str]:
    def f1(lengths: list[str]) -> float:
        return item_agreement("measurement", [frozenset(lengths)] * len(stated), stated).value

    best: list[str] = []
    while longer := max(([*best, item] for item in candidates if item not in best), key=f1, default=None):
        if best and f1(longer) <= f1(best):
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
        images[[row[cui] for cui in own], len(own)] += 1
    best, best_f1 = [], float((sizes == 0).mean())  # an empty set is right where the truth is empty
    for k in range(1, min(MAX_CONCEPTS, len(concepts)) + 1):
        gains = images @ (2 / (k + np.arange(images.shape[1])))
        chosen = np.argsort(-gains, kind="stable")[:k]
        if (f1 := gains[chosen].sum() / len(truth)) > best_f1 + 1e-12:
            best, best_f1 = [concepts[i] for i in chosen], f1
    return sorted(best)
