"""BERTScore against `bert-score` called pair by pair, and without what it needs."""

import importlib.util
import json
import logging
import math
import shutil
import socket
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import make_captions
from tokenizers import ByteLevelBPETokenizer
from transformers import DebertaConfig, DebertaModel

from captioning.errors import UserError
from captioning.scoring import bertscore as bertscore_module
from captioning.scoring.bertscore import bertscore
from metrics import imageclef_normalize


needs_bert_score = pytest.mark.skipif(
    importlib.util.find_spec("bert_score") is None, reason="bert-score is not installed"
)

MODEL = "deberta-tiny"


def reason(model=bertscore_module.BERTSCORE_MODEL) -> str:
    """Why there is no score."""
    with pytest.raises(UserError) as error:
        bertscore(["a cyst"], ["a cyst"], str(model))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def known_layers(monkeypatch):
    """Let bert-score know the tiny model, of which it compares the second of three layers."""
    if importlib.util.find_spec("bert_score"):
        from bert_score.utils import model2layers

        monkeypatch.setitem(model2layers, f"example/{MODEL}", 2)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    """Two folders of one random model: as the official weights are stored, and as bert-score loads without adaptation.

    The official ones are float16 in a `.bin` with a classification head, and their tokenizer sets no maximum length.
    """
    official, plain = (tmp_path_factory.mktemp(name) / MODEL for name in ("official", "plain"))
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
        folder.mkdir()
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
def test_bertscore_equals_bert_score_pair_by_pair_on_normalized_captions(deberta, monkeypatch):
    official, plain = deberta
    monkeypatch.setattr(bertscore_module, "BERTSCORE_CHUNK", 5)
    predictions, references = make_captions(17)[::-1], make_captions(17)
    predictions[3] = " ".join(make_captions(20))  # longer than the model reads
    score = bertscore(predictions, references, official)
    expected = pair_by_pair(predictions, references, plain)
    assert score.statistics[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert score.value == pytest.approx(np.mean(expected), abs=1e-5)
    assert np.std(expected) > 0.01, "the pairs are too alike to tell"


@needs_bert_score
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_bertscore_never_runs_code_of_a_model_and_does_not_ask(deberta, tmp_path, file):
    folder = tmp_path / MODEL
    shutil.copytree(deberta[0], folder)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | {"auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert reason(folder) == f"the BERTScore model {MODEL} needs custom code, which is never run: give another model"
    (folder / file).write_text("{")
    assert f"{file} cannot be read" in reason(folder)
    assert not (tmp_path / "ran").exists()


@needs_bert_score
def test_bertscore_of_empty_captions(deberta):
    predictions, references = ["", "", "a cyst", "an effusion"], ["", "a cyst", "", "an effusion"]
    values = bertscore(predictions, references, deberta[0]).statistics[:, 0]
    assert values.tolist() == pytest.approx([1, 0, 0, 1], abs=1e-5)


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
    score = bertscore(["", "a cyst"], ["a cyst", "an effusion"], deberta[0])
    logger.removeHandler(caplog.handler)
    assert math.isfinite(score.value)
    assert capfd.readouterr() == ("", "") and not caplog.records and not calls


@needs_bert_score
def test_a_model_goes_by_its_name_for_the_layer(deberta, tmp_path):
    from bert_score.utils import model2layers

    assert model2layers[bertscore_module.BERTSCORE_MODEL] == 40
    for name, message in (
        ("unknown", "does not know which layer of unknown to compare"),
        ("deberta-v3-small", "num_layers should be between 0 and 3"),  # it has 4 layers, and the random model has 3
    ):
        shutil.copytree(deberta[0], tmp_path / name)
        assert message in reason(tmp_path / name)


@needs_bert_score
def test_the_weights_are_found_in_the_cache(deberta, calls, monkeypatch, tmp_path):
    from bert_score.utils import model2layers

    repository = tmp_path / "models--microsoft--deberta-xlarge-mnli"
    shutil.copytree(deberta[0], repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(model2layers, bertscore_module.BERTSCORE_MODEL, 2)
    assert bertscore(["an effusion"], ["no effusion"]).statistics.shape == (1, 1) and not calls


@needs_bert_score
def test_without_weights_bertscore_says_how_to_get_them(deberta, calls, tmp_path):
    assert "`hf download microsoft/deberta-xlarge-mnli`" in reason()
    shutil.copytree(deberta[0], tmp_path, ignore=shutil.ignore_patterns("*.bin"), dirs_exist_ok=True)
    assert f"the weights of {tmp_path.name} are not on this machine" in reason(tmp_path) and not calls


def test_without_bert_score_bertscore_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("bert_score")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bert_score", None)
    assert reason() == "bert-score is not installed: `pip install bert-score`"
