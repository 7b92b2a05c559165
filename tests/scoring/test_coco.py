"""The field's metrics, against the reference implementations called plainly, and without what they need."""

import importlib.util
import json
import logging
import math
import os
import shutil
import socket
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import psutil
import pytest
import torch
from helpers import SHARED, make_captions, real_captions
from tokenizers import ByteLevelBPETokenizer
from transformers import DebertaConfig, DebertaModel

from captioning.scoring import bertscore as bertscore_module
from captioning.scoring import coco
from captioning.scoring.bertscore import bertscore
from captioning.scoring.coco import MissingError, coco_scores, coco_scores_of_tokens, coco_tokens
from metrics import imageclef_normalize


NAMES = ["bleu1", "bleu2", "bleu3", "bleu4", "cider", "rougeL", "meteor"]
LINE_BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]

has_library = importlib.util.find_spec("pycocoevalcap") is not None
needs_library = pytest.mark.skipif(not has_library, reason="pycocoevalcap is not installed")
needs_java = pytest.mark.skipif(
    not has_library or shutil.which("java") is None, reason="pycocoevalcap or a Java runtime is not installed"
)
needs_bert_score = pytest.mark.skipif(
    importlib.util.find_spec("bert_score") is None, reason="bert-score is not installed"
)


def built_pairs():
    """What has its own path: empty, alike, repeated, a paraphrase of another length, and the separator of METEOR.

    The predictions are the shorter ones, for the brevity penalty of BLEU.
    """
    references = [*make_captions(8), "No abnormality.", "", "", "A cyst (arrow); 3.5 cm ||| wide", "The the the U.S."]
    predictions = [text.rsplit(" ", 2)[0] for text in make_captions(8)[::-1]]
    predictions += ["No abnormality.", "a cyst", "", "Cysts |||  3.5 cm wide", "the"]
    references += ["A number of nodules were found in the lung"]
    predictions += ["Several nodules were found in the lung"]
    return predictions, references


def real_pairs(number):
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
        gts = {i: [text] if isinstance(text, str) else text for i, text in enumerate(references)}
        values = [scorer.compute_score(gts, res)[0] for scorer in (Bleu(4), Cider(), Rouge(), self.meteor)]
        return dict(zip(NAMES, [*values[0], *values[1:]], strict=True))


@pytest.fixture(scope="module")
def library():
    return Library()


@pytest.fixture(scope="module")
def real():
    """240 real pairs, their tokens and their scores."""
    predictions, references = real_pairs(240)
    tokens = [coco_tokens(texts) for texts in (predictions, references)]
    return predictions, references, tokens, coco_scores(predictions, references)


def values(scores, prefix="coco"):
    return {name.removeprefix(f"{prefix}_"): score.value for name, score in scores.items()}


# BLEU, CIDEr, ROUGE-L and METEOR


@needs_java
def test_real_captions_score_as_pycocoevalcap_scores_them(real, library):
    predictions, references, tokens, (scores, missing) = real
    expected = library.scores(library.tokens(predictions), library.tokens(references))
    assert tokens == [library.tokens(predictions), library.tokens(references)]
    assert values(scores) == pytest.approx(expected, abs=1e-9) and not missing
    assert values(scores)["meteor"] == pytest.approx(expected["meteor"], abs=1e-12), "the jar prints 17 digits"
    assert 0.05 < expected["bleu4"] < 0.95 and expected["meteor"] > 0.1, "the pairs are no test"
    mean_of_captions = np.mean([scores["coco_meteor"].of_rows([i]) for i in range(240)])
    assert abs(mean_of_captions - expected["meteor"]) > 1e-3, "METEOR of a set is no mean, and this would not tell"


@needs_java
def test_a_resample_scores_as_pycocoevalcap_scores_it(real, library):
    *_, (predictions, references), (scores, _) = real
    draws = np.random.default_rng(1).integers(0, 240, (3, 200))
    for name in ("bleu1", "bleu4", "rougeL", "meteor"):  # CIDEr keeps the document frequencies of all references
        score = scores[f"coco_{name}"]
        at_once = score.combine(score.statistics[draws].sum(axis=1), 200)
        assert at_once == pytest.approx([score.of_rows(rows) for rows in draws], abs=1e-12)
        for rows in draws[:1]:
            expected = library.scores([predictions[i] for i in rows], [references[i] for i in rows])[name]
            assert score.of_rows(rows) == pytest.approx(expected, abs=1e-9), name


@needs_java
def test_built_captions_score_as_pycocoevalcap_scores_them(library):
    predictions, references = built_pairs()
    tokens = [coco_tokens(texts) for texts in (predictions, references)]
    assert tokens == [library.tokens(predictions), library.tokens(references)]
    several = tokens[0] * 2, [*tokens[1], *([text, *tokens[1][:2]] for text in tokens[1])]  # one reference, and three
    scores, missing = coco_scores_of_tokens(*several)
    assert values(scores) == pytest.approx(library.scores(*several), abs=1e-9) and not missing


@needs_java
def test_the_separator_of_meteor_in_a_caption_makes_no_second_reference():
    text = "a small cyst at the left lower pole"
    parted = [text.replace(" at ", f"{separator}at ") for separator in (" ||| ", " |||||| ", "\r")]  # or a line more
    pairs = [(text, [text]), *((text, [other]) for other in parted), *((other, [text]) for other in parted)]
    statistics = coco._meteor_statistics(pairs)
    assert len(statistics) == 7 and (statistics == statistics[0]).all()


@needs_java
def test_the_published_values_of_nlg_eval():
    folder = SHARED / "nlg_eval"
    if not folder.is_dir():
        pytest.skip("nlg-eval's cases are not beside the project")
    predictions, *references = [(folder / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")]
    references = list(zip(*references, strict=True))
    expected = json.loads((folder / "expected.json").read_text())
    names = {"Bleu_1": "bleu1", "Bleu_2": "bleu2", "Bleu_3": "bleu3", "Bleu_4": "bleu4"}
    names |= {"CIDEr": "cider", "ROUGE_L": "rougeL"}
    individual = expected["individual"][0]
    alone = [individual["hyp"]], [individual["refs"]]
    for case, texts in ((expected, (predictions, references)), (individual, alone)):
        scores, missing = coco_scores_of_tokens(*texts, prefix="nlgeval", meteor=False)
        assert values(scores, "nlgeval") == pytest.approx({ours: case[name] for name, ours in names.items()}, abs=1e-5)
        assert not missing
    together = [*predictions, individual["hyp"]], [*references, individual["refs"]]  # METEOR takes seconds to start
    meteor = coco_scores_of_tokens(*together, prefix="nlgeval")[0]["nlgeval_meteor"]
    assert meteor.of_rows([0, 1]) == pytest.approx(expected["METEOR"], abs=1e-5)
    assert meteor.of_rows([2]) == pytest.approx(individual["METEOR"], abs=1e-5)


@needs_library
def test_whitespace_scores_have_names_and_values_of_their_own():
    assert coco_tokens([" A  Cyst (arrow).\n"], "whitespace") == ["A  Cyst (arrow)."]
    scores, missing = coco_scores(["A cyst."], ["a cyst."], "whitespace", meteor=False)
    assert list(scores) == [f"nlgeval_{name}" for name in NAMES if name != "meteor"] and not missing
    assert scores["nlgeval_bleu1"].value == pytest.approx(0.5), "case is kept"


@needs_java
def test_tokens_are_lower_case_without_punctuation():
    assert coco_tokens(["A Cyst; can't, 3.5 cm - wide."]) == ["a cyst ca n't 3.5 cm wide"]
    assert coco_tokens(["(arrow)"]) == ["-lrb- arrow -rrb-"], "the library's list has these in upper case alone"


@needs_java
@pytest.mark.parametrize("tokenizer", coco.TOKENIZERS)
def test_a_line_break_in_a_caption_does_not_shift_the_others(tokenizer):
    captions = make_captions(len(LINE_BREAKS) + 1)
    broken = [text.replace(" shows ", f" shows{ends}") for text, ends in zip(captions, LINE_BREAKS, strict=False)]
    assert coco_tokens([*broken, captions[-1]], tokenizer) == coco_tokens(captions, tokenizer)
    scores, _ = coco_scores([*broken, captions[-1]], captions, tokenizer, meteor=False)
    assert scores[f"{coco.TOKENIZERS[tokenizer]}_bleu4"].value == pytest.approx(1, abs=1e-6)


@needs_java
def test_empty_captions_keep_their_place():
    assert coco_tokens(["", "a", " ", "b", ""]) == ["", "a", "", "b", ""]
    assert coco_tokens([""]) == [""] and coco_tokens([]) == []
    assert coco_tokens(["half a pair \ud800", "b"])[1] == "b"


@needs_library
def test_references_without_a_word_score_zero_cider():
    scores, _ = coco_scores_of_tokens(["a", ""], ["", ""], meteor=False)
    assert scores["coco_cider"].value == 0 and scores["coco_bleu4"].value == pytest.approx(0, abs=1e-6)


@needs_library
def test_cider_of_a_single_caption_is_zero():
    scores, _ = coco_scores_of_tokens(["a small cyst"], ["a small cyst"], meteor=False)
    assert scores["coco_cider"].value == 0 and scores["coco_rougeL"].value == pytest.approx(1)


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
    scores, missing = coco_scores([odd, "an effusion"], ["a cyst", "no effusion"])
    assert len(scores) == len(NAMES) and not missing
    assert capfd.readouterr() == ("", "")
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before
    assert psutil.Process().children() == children


@needs_library
def test_without_java_all_says_how_to_mend_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores, missing = coco_scores(["a cyst"], ["a cyst"])
    assert scores == {} and list(missing) == [f"coco_{name}" for name in NAMES]
    for line in missing.values():
        assert "java" in line and "apt install default-jre-headless" in line and "--tokenizer whitespace" in line
        assert len(line.splitlines()) == 1
    assert list(coco_scores(["a cyst"], ["a cyst"], meteor=False)[1]) == [f"coco_{n}" for n in NAMES if n != "meteor"]
    with pytest.raises(MissingError, match="apt install"):
        coco_tokens(["a cyst"])


@needs_library
def test_without_java_whitespace_misses_meteor_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores, missing = coco_scores(["a cyst"], ["a cyst"], "whitespace")
    assert list(scores) == [f"nlgeval_{name}" for name in NAMES if name != "meteor"]
    assert list(missing) == ["nlgeval_meteor"]
    assert "default-jre-headless" in missing["nlgeval_meteor"] and "--tokenizer" not in missing["nlgeval_meteor"]


@needs_library
@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for Java")
def test_a_java_that_does_not_start_is_named_with_its_reason(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Could not create the virtual machine.' >&2\necho out of memory >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for tokenizer in coco.TOKENIZERS:
        line = list(coco_scores(["a cyst"], ["a cyst"], tokenizer)[1].values())[-1]
        assert "status 1 (Could not create the virtual machine. out of memory)" in line and "apt install" in line
        assert len(line.splitlines()) == 1


@pytest.mark.parametrize("tokenizer", coco.TOKENIZERS)
def test_without_pycocoevalcap_all_says_how_to_mend_it(tokenizer, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    scores, missing = coco_scores(["a cyst"], ["a cyst"], tokenizer)
    needed = NAMES if tokenizer == "ptb" else ["meteor"]  # the tokenizer and METEOR are jars of the package
    assert [name.split("_")[1] for name in missing] == needed
    assert len(scores) == len(NAMES) - len(needed)
    assert all("`pip install pycocoevalcap`" in line for line in missing.values())


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="2 predictions, but 1 references"):
        coco_scores(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no captions"):
        coco_scores([], [])
    with pytest.raises(ValueError, match="has no reference"):
        coco_scores_of_tokens(["a"], [[]])
    with pytest.raises(ValueError, match="ptb or whitespace"):
        coco_scores(["a"], ["a"], "moses")
    with pytest.raises(ValueError, match="2 predictions, but 1 references"):
        bertscore(["a", "b"], ["a"])


# BERTScore


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    """Two folders of one random model: as the official weights are stored, and as bert-score needs no mends for.

    The official ones are float16 in a `.bin` with a classification head, and their tokenizer names no longest input.
    """
    official, plain = (tmp_path_factory.mktemp(name) for name in ("official", "plain"))
    bpe = ByteLevelBPETokenizer()
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    bpe.train_from_iterator([imageclef_normalize(text) for text in make_captions(20)], 320, special_tokens=special)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config |= {"vocab_size": bpe.get_vocab_size(), "max_position_embeddings": 64, "initializer_range": 0.3}
    config |= {"relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}
    config |= {"max_relative_positions": -1, "type_vocab_size": 0, "padding_idx": 0, "layer_norm_eps": 1e-7}
    torch.manual_seed(0)
    model = DebertaModel(DebertaConfig(**config)).half()
    for folder in (official, plain):
        bpe.save_model(str(folder))
    (official / "config.json").write_text(json.dumps({"model_type": "deberta"} | config))
    (official / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "gpt2"}))
    head = {"classifier.weight": torch.zeros(3, 32).half(), "classifier.bias": torch.zeros(3).half()}
    weights = {f"deberta.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(weights | head, official / "pytorch_model.bin")
    model.float().save_pretrained(plain)
    (plain / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "model_max_length": 64}))
    return str(official), str(plain)


def pair_by_pair(predictions, references, model):
    """The loop of ImageCLEF's evaluator, on bert-score itself."""
    from bert_score import BERTScorer

    predictions, references = ([imageclef_normalize(text) for text in texts] for texts in (predictions, references))
    scorer = BERTScorer(model_type=model, num_layers=2, idf=True, idf_sents=references, nthreads=0)
    return [scorer.score([p], [r])[2].item() for p, r in zip(predictions, references, strict=True)]


@needs_bert_score
def test_bertscore_equals_bert_score_pair_by_pair(deberta, monkeypatch):
    official, plain = deberta
    monkeypatch.setattr(bertscore_module, "BERTSCORE_CHUNK", 5)
    predictions, references = make_captions(17)[::-1], make_captions(17)
    predictions[3] = " ".join(make_captions(20))  # longer than the model reads
    score, missing = bertscore(predictions, references, official, num_layers=2)
    expected = pair_by_pair(predictions, references, plain)
    assert missing is None
    assert score.statistics[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert score.value == pytest.approx(np.mean(expected), abs=1e-5)
    assert np.std(expected) > 0.01, "the pairs are too alike to tell"


@needs_bert_score
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_bertscore_runs_no_code_of_a_model_and_does_not_ask(deberta, tmp_path, file):
    folder = tmp_path / "model"
    shutil.copytree(deberta[0], folder)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | {"auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    score, reason = bertscore(["a cyst"], ["a cyst"], str(folder), num_layers=2)
    assert score is None
    assert reason == "the BERTScore model model wants code of its own to be run, which is not done: take another"
    (folder / file).write_text("{")
    assert f"{file} cannot be read" in bertscore(["a cyst"], ["a cyst"], str(folder), num_layers=2)[1]
    assert not (tmp_path / "ran").exists()


@needs_bert_score
def test_bertscore_normalizes_captions(deberta):
    texts = ["A cyst (3 cm).", "an effusion"], ["a cyst number cm", "no effusion, 12"]
    score, _ = bertscore(*texts, deberta[0], num_layers=2)
    assert score.statistics[0] == pytest.approx(1, abs=1e-5) and score.statistics[1] < 0.999


@needs_bert_score
def test_bertscore_of_empty_captions(deberta):
    predictions, references = ["", "", "a cyst", "an effusion"], ["", "a cyst", "", "an effusion"]
    score, _ = bertscore(predictions, references, deberta[0], num_layers=2)
    assert score.statistics[:, 0].tolist() == pytest.approx([1, 0, 0, 1], abs=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """The network, unplugged, and the calls that were tried though the Hub client may make them."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("the network is unplugged")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tried


@needs_bert_score
def test_bertscore_prints_nothing_and_needs_no_network(deberta, calls, capfd, caplog):
    logger = logging.getLogger("transformers")  # its own handler writes to the stderr of before the test
    logger.addHandler(caplog.handler)
    score, _ = bertscore(["", "a cyst"], ["a cyst", "an effusion"], deberta[0], num_layers=2)
    logger.removeHandler(caplog.handler)
    assert math.isfinite(score.value)
    assert capfd.readouterr() == ("", "") and not caplog.records and not calls


@needs_bert_score
def test_a_model_goes_by_its_name_for_the_layer(deberta, tmp_path):
    from bert_score.utils import model2layers

    assert model2layers[bertscore_module.BERTSCORE_MODEL] == 40
    score, line = bertscore(["a"], ["a"], deberta[0])
    assert score is None and "num_layers" in line and "\n" not in line
    named = tmp_path / "deberta-v3-small"  # 4 layers, and the random model has 3
    shutil.copytree(deberta[0], named)
    score, line = bertscore(["a"], ["a"], str(named))
    assert score is None and "num_layers should be between 0 and 3" in line and "\n" not in line


@needs_bert_score
def test_the_weights_are_found_in_the_cache(deberta, calls, monkeypatch, tmp_path):
    repository = tmp_path / "models--microsoft--deberta-xlarge-mnli"
    shutil.copytree(deberta[0], repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    score, missing = bertscore(["an effusion"], ["no effusion"], num_layers=2)
    assert missing is None and score.statistics.shape == (1, 1) and not calls


@needs_bert_score
def test_without_weights_bertscore_says_how_to_get_them(deberta, calls, tmp_path):
    score, line = bertscore(["a cyst"], ["a cyst"])
    assert score is None and "`hf download microsoft/deberta-xlarge-mnli`" in line and "\n" not in line
    shutil.copytree(deberta[0], tmp_path, ignore=shutil.ignore_patterns("*.bin"), dirs_exist_ok=True)
    score, line = bertscore(["a cyst"], ["a cyst"], str(tmp_path), num_layers=2)
    assert score is None and f"the weights of {tmp_path.name} are not on this machine" in line and not calls


def test_without_bert_score_bertscore_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("bert_score")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bert_score", None)
    score, line = bertscore(["a cyst"], ["a cyst"])
    assert score is None and "`pip install bert-score`" in line and "`hf download" in line and "\n" not in line
