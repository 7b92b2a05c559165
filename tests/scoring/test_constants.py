"""The best constant for each score, against naive searches."""

from itertools import chain, combinations

import numpy as np
import pytest
from helpers import needs_java, real_captions

from captioning.scoring import TOKENIZERS
from captioning.scoring import constants as module
from captioning.scoring.captions import Captions
from captioning.scoring.clinical import item_agreement
from captioning.scoring.coco import coco_tokens, meteor_scores
from captioning.scoring.concepts import concept_f1
from captioning.scoring.constants import best_concepts, constant_values, find_constants
from captioning.scoring.ngrams import ngram_scores
from captioning.scoring.score import score
from captioning.scoring.training_split import Training
from metrics import wording_scores


def as_captions(references, predictions, cuis=None):
    ids = [str(i) for i in range(len(references))]
    return Captions(ids, predictions, references, cuis or [[] for _ in references])


def values_of(text, references, tokenizer):
    """What a system that repeats itself scores, without METEOR."""
    repeated = [text] * len(references)
    values = {name: own.mean() for name, own in wording_scores(tuple(repeated), tuple(references)).items()}
    if tokenizer:
        tokens = [coco_tokens(texts, tokenizer) for texts in (repeated, references)]
        found = ngram_scores({"": tokens[0]}, tokens[1])[""]
        values |= {f"{TOKENIZERS[tokenizer]}_{name}": own.value for name, own in found.items()}
    return values


@pytest.mark.parametrize("tokenizer", [None, "whitespace"])
def test_each_score_has_the_caption_that_is_best_for_it(tokenizer):
    training = real_captions(30)
    found = find_constants(training, [[] for _ in training], tokenizer)
    naive = [values_of(text, training, tokenizer) for text in training]
    for name, text in found.captions.items():
        if not name.endswith("meteor"):
            best = max(values[name] for values in naive)
            assert naive[training.index(text)][name] == pytest.approx(best, abs=1e-12), name
    assert len(set(found.captions.values())) > 1, "one caption would do for all"


@needs_java
def test_captions_of_punctuation_alone_have_no_best_constant():
    found = score(as_captions(["a mass"], ["a cyst"]), Training(["...", "- -"], [[], []]))
    assert not [name for name in found["baselines"]["constant"]["captions"] if name.startswith("coco")]
    assert "coco_bleu4" in found["scores"]


@pytest.mark.parametrize("tokenizer", [None, "whitespace"])
def test_what_a_constant_reaches_is_what_a_system_that_repeats_it_scores(tokenizer):
    training, references = real_captions(30), real_captions(70)[30:]
    constants = find_constants(training, [[] for _ in training], tokenizer)
    captions = as_captions(references, references)
    tokens = coco_tokens(references, tokenizer) if tokenizer else None
    values = constant_values(constants, captions, tokens, tokenizer)
    for name, text in constants.captions.items():
        if not name.endswith("meteor"):
            assert values[name] == pytest.approx(values_of(text, references, tokenizer)[name], abs=1e-12), name


@needs_java
@pytest.mark.slow
def test_the_constant_for_meteor_is_higher_than_those_for_other_scores():
    training = real_captions(200)
    found = score(as_captions(training, training), Training(training, [[] for _ in training]))
    captions, entry = found["baselines"]["constant"]["captions"], found["scores"]["coco_meteor"]
    others = {captions[name] for name in ("rougeL", "coco_bleu4", "coco_cider")} - {captions["coco_meteor"]}
    references = coco_tokens(training)
    rivals = meteor_scores({text: coco_tokens([text]) * len(training) for text in others}, references).values()
    assert others and entry["baselines"]["constant"] >= max(rival.value for rival in rivals)


def test_the_best_items_are_those_of_a_search_through_all_sets():
    rng = np.random.default_rng(0)
    for weights in ([0.7, 0.2, 0.1, 0.05], [0.5, 0.5, 0.4, 0.4]):
        stated = [frozenset(v for v, weight in zip("abcd", weights, strict=True) if rng.random() < weight)] * 2
        stated += [frozenset(v for v, p in zip("abcd", weights, strict=True) if rng.random() < p) for _ in range(40)]
        sets = [frozenset(s) for s in chain.from_iterable(combinations("abcd", k) for k in range(5))]

        def f1(items, stated=stated):
            return np.nan_to_num(item_agreement("region", [items] * len(stated), stated).value)

        def mean_f1(items, stated=stated):
            return concept_f1([items] * len(stated), stated).value

        assert f1(frozenset(module._best_items("region", stated))) == pytest.approx(max(map(f1, sets)))
        assert mean_f1(frozenset(best_concepts(stated))) == pytest.approx(max(map(mean_f1, sets)))
    assert best_concepts([frozenset()] * 3 + [frozenset("a")]) == [], "most images have none"


def test_lengths_agree_within_a_tolerance():
    stated = [frozenset(["10"]), frozenset(["10.5"]), frozenset(["9.6"]), frozenset(["30"]), frozenset(["30"])]
    assert module._best_items("measurement", stated) == ["10", "30"], "which agree with all five"
    assert module._best_items("measurement", [*stated, *[frozenset()] * 20]) == ["10"]
    assert module._best_items("measurement", [frozenset()] * 3) == []
