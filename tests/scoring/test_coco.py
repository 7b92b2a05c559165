"""BLEU, CIDEr, ROUGE-L and METEOR against `pycocoevalcap` called plainly, and without what they need."""

import os
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from helpers import HAS_LIBRARY, make_captions, needs_java, real_captions

from captioning.errors import UserError
from captioning.scoring import coco
from captioning.scoring.coco import coco_scores, coco_tokens, meteor_scores
from captioning.scoring.ngrams import ngram_scores


NAMES = ["bleu1", "bleu2", "bleu3", "bleu4", "cider", "rougeL", "meteor"]
LINE_BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]

needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="pycocoevalcap is not installed")


BUILT = {  # what has its own path: alike, another case, empty, METEOR's separator, a repeated word, a paraphrase
    "No abnormality.": "No abnormality.",
    "a cyst": "A cyst",
    "": "",
    "Cysts |||  3.5 cm wide": "A cyst (arrow); 3.5 cm ||| wide",
    "the": "The the the U.S.",
    "Several nodules were found in the lung": "A number of nodules were found in the lung",
}


def built_pairs():
    """Predictions and references. The predictions are the shorter ones, for the brevity penalty of BLEU."""
    captions = make_captions(8)
    return [*(text.rsplit(" ", 2)[0] for text in captions[::-1]), *BUILT], [*captions, *BUILT.values()]


def real_pairs(number=240):
    """Predictions that begin as their reference does, and end as another caption."""
    captions = real_captions(2 * number, ("test", "validation"))
    references, others = captions[:number], captions[number:]
    cuts = np.random.default_rng(0).integers(0, 12, number)
    pairs = zip(references, others, cuts, strict=True)
    return [" ".join(text.split()[:cut] + other.split()[cut:]) for text, other, cut in pairs], references


class Library:
    """`pycocoevalcap`, called as `COCOEvalCap.evaluate` does; one METEOR, which takes seconds to start."""

    def __init__(self):
        from pycocoevalcap.meteor.meteor import Meteor

        self.meteor = Meteor()

    def tokens(self, captions):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        tokens = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
        return [tokens[i][0] for i in range(len(captions))]

    def scores(self, predictions, references):
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        res = {i: [text] for i, text in enumerate(predictions)}
        gts = {i: [text] for i, text in enumerate(references)}
        values = [scorer.compute_score(gts, res)[0] for scorer in (Bleu(4), Cider(), Rouge(), self.meteor)]
        return dict(zip(NAMES, [*values[0], *values[1:]], strict=True))


@pytest.fixture(scope="module")
def library():
    return Library()


def score_one(prediction, reference, tokenizer="ptb"):
    scores, missing, _ = coco_scores({"": [prediction]}, [reference], tokenizer)
    return scores.get("", {}), missing


def values(scores, prefix="coco"):
    return {name.removeprefix(f"{prefix}_"): score.value for name, score in scores.items()}


@needs_java
@pytest.mark.parametrize("pairs", [built_pairs, pytest.param(real_pairs, marks=pytest.mark.slow)])
def test_captions_and_resamples_score_as_pycocoevalcap_scores_them(pairs, library):
    predictions, references = pairs()
    other = references[::-1]
    scores, missing, _ = coco_scores({"own": predictions, "other": other}, references)
    tokens = [coco_tokens(texts) for texts in (predictions, references)]
    assert tokens == [library.tokens(predictions), library.tokens(references)]
    expected = library.scores(*tokens)
    assert values(scores["own"]) == pytest.approx(expected, abs=1e-12) and not missing
    assert values(scores["other"]) == pytest.approx(library.scores(coco_tokens(other), tokens[1]), abs=1e-12)
    assert 0.05 < expected["bleu4"] < 0.95 and expected["meteor"] > 0.1, "the pairs are too easy or too hard"

    number = len(references)
    draws = np.random.default_rng(1).integers(0, number, (3, number - 4))
    expected = library.scores(*([texts[i] for i in draws[0]] for texts in tokens))
    for name in ("bleu1", "bleu4", "rougeL", "meteor"):  # CIDEr keeps the document frequencies of all references
        score = scores["own"][f"coco_{name}"]
        assert score.part(draws[0]).value == pytest.approx(expected[name], abs=1e-9), name
        at_once = score.combine(score.statistics[draws].sum(axis=1), number - 4)
        assert at_once == pytest.approx([score.part(rows).value for rows in draws], abs=1e-12)


@needs_java
def test_lower_cased_scores_are_those_of_pycocoevalcap_on_lower_cased_text(library):
    # Without METEOR's separator, which the library does not remove from references
    pairs = [pair for pair in zip(*built_pairs(), strict=True) if "|||" not in pair[1]]
    predictions, references = map(list, zip(*pairs, strict=True))
    cider = {}
    for tokenizer, change in (("whitespace", str), ("whitespace_lower", str.lower)):
        expected = library.scores(*([change(text).strip() for text in texts] for texts in (predictions, references)))
        found = coco_scores({"": predictions}, references, tokenizer)[0][""]
        assert values(found, coco.TOKENIZERS[tokenizer]) == pytest.approx(expected, abs=1e-12)
        cider |= {name: score.value for name, score in found.items() if name.endswith("cider")}
    assert cider["nlgeval_lower_cider"] > 1.05 * cider["nlgeval_cider"], "case does not matter here"


def test_a_pair_goes_to_meteor_once_and_counts_as_often_as_it_occurs(monkeypatch):
    java = Mock(side_effect=lambda pairs: np.array([[len(text) for text in pair] for pair in pairs]))
    monkeypatch.setattr(coco, "_meteor_statistics", java)
    found = meteor_scores({"own": ["a", "bbb", "a"], "constant": ["a"] * 3}, ["x", "yy", "x"])
    assert java.call_args.args[0] == [("a", "x"), ("bbb", "yy"), ("a", "yy")]
    assert found["own"].statistics.tolist() == [[1, 1], [3, 2], [1, 1]]
    assert found["constant"].statistics.tolist() == [[1, 1], [1, 2], [1, 1]]


@needs_library
def test_the_separator_of_meteor_in_a_caption_does_not_add_a_reference(monkeypatch):
    sent = []
    monkeypatch.setattr(coco, "_java", lambda library, options, lines: sent.extend(lines) or [])
    with pytest.raises(UserError, match="answer"):
        meteor_scores({"": ["a ||| cyst", "a cyst"]}, ["a cyst", "a |||||| cyst"])
    assert [line.split() for line in sent] == [["SCORE", "|||", "a", "cyst", "|||", "a", "cyst"]] * 2


@needs_library
def test_of_many_captions_only_the_first_two_systems_have_a_meteor(monkeypatch):
    monkeypatch.setattr(coco, "METEOR_CAPTIONS", 6)
    monkeypatch.setattr(coco, "meteor_scores", lambda systems, references: dict.fromkeys(systems))
    for captions, constant, expected in (
        (make_captions(2), None, [*"abc"]),
        (make_captions(20), None, [*"ab"]),
        (make_captions(20), "a cyst", ["a", "constant"]),
    ):
        found, _, _ = coco_scores(dict.fromkeys("abcd", captions), captions, "whitespace", constant)
        assert [name for name in found if "nlgeval_meteor" in found[name]] == expected


@needs_java
def test_tokens_are_lower_case_without_punctuation_unless_they_are_split_at_white_space():
    assert coco_tokens([" A  Cyst (arrow).\n"], "whitespace") == ["A  Cyst (arrow)."]
    found = coco_tokens(["A Cyst; can't, 3.5 cm - wide.", "", " ", "(arrow)", "half a pair \ud800", ""])
    # The library's list of punctuation has brackets in upper case alone
    assert found == ["a cyst ca n't 3.5 cm wide", "", "", "-lrb- arrow -rrb-", found[4], ""]
    assert coco_tokens([""]) == [""]


@needs_java
@pytest.mark.parametrize("tokenizer", coco.TOKENIZERS)
def test_a_line_break_in_a_caption_does_not_shift_the_others(tokenizer):
    captions = make_captions(len(LINE_BREAKS) + 1)
    broken = [text.replace(" shows ", f" shows{ends}") for text, ends in zip(captions, LINE_BREAKS, strict=False)]
    assert coco_tokens([*broken, captions[-1]], tokenizer) == coco_tokens(captions, tokenizer)


@pytest.mark.parametrize(
    ("captions", "references", "expected"), [("a|", "|", [0, 0.5, 0]), ("a small cyst", "a small cyst", [0, 1, 1])]
)
def test_empty_references_and_a_single_caption_have_a_cider_of_zero(captions, references, expected):
    scores = ngram_scores({"": captions.split("|")}, references.split("|"))[""]
    assert [scores[name].value for name in ("cider", "rougeL", "bleu3")] == pytest.approx(expected, abs=1e-6)


def test_meteor_without_a_match_is_zero_and_warns_of_nothing(recwarn):
    sums = np.array([[0, 0, 5, 5, 0, 0], [0, 0, 0, 5, 0, 0], [0, 0, 0, 0, 0, 0], [4, 4, 4, 4, 0, 4]], dtype=float)
    assert coco._meteor(sums, 1).tolist() == [0, 0, 0, pytest.approx(1)]
    assert not recwarn.list


@needs_java
def test_nothing_is_printed_written_or_left_running(capfd):
    import pycocoevalcap

    folder = Path(next(iter(pycocoevalcap.__path__)))
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    children = psutil.Process().children()
    odd = "a cyst \u2061 (arrow)"  # the tokenizer logs that it does not know the sign
    ngram_scores({"": coco_tokens([odd, "an effusion"])}, coco_tokens(["a cyst", "no effusion"]))
    assert capfd.readouterr() == ("", "")
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before
    assert psutil.Process().children() == children


@needs_library
def test_without_java_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores, missing = score_one("a cyst", "a cyst")
    assert scores == {} and list(missing) == ["coco_*"]
    assert "`java` cannot be run" in missing["coco_*"] and "apt install default-jre-headless" in missing["coco_*"]
    scores, missing = score_one("A cyst.", "a cyst.", "whitespace")
    assert list(scores) == [f"nlgeval_{name}" for name in NAMES[:-1]] and list(missing) == ["nlgeval_meteor"]
    assert "default-jre-headless" in missing["nlgeval_meteor"]
    assert scores["nlgeval_bleu1"].value == pytest.approx(0.5), "case is kept"


@needs_library
@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for Java")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Could not create' >&2; echo out of memory >&2; exit 1", "status 1 (Could not create out of memory)"),
        ("echo 1 2 3; echo", "its answer is not that of the program"),
    ],
)
def test_a_java_that_does_not_work_is_named_with_the_reason(monkeypatch, tmp_path, script, reason):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for tokenizer in coco.TOKENIZERS:
        line = list(score_one("a cyst", "a cyst", tokenizer)[1].values())[-1]
        assert reason in line and "apt install" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("tokenizer", coco.TOKENIZERS)
def test_without_pycocoevalcap_the_message_says_how_to_get_it(tokenizer, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    scores, missing = score_one("a cyst", "a cyst", tokenizer)
    prefix = coco.TOKENIZERS[tokenizer]
    assert missing.keys() == {f"{prefix}_*" if tokenizer == "ptb" else f"{prefix}_meteor"}
    assert scores == {} if tokenizer == "ptb" else scores[f"{prefix}_rougeL"].value == 1
    assert "`pip install pycocoevalcap`" in "".join(missing.values())


def test_systems_and_references_must_be_as_many():
    with pytest.raises(ValueError, match="another number"):
        coco_scores({"": ["a", "b"]}, ["a"], "whitespace")
