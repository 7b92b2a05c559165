"""A second captioner, of a few lines and unlike BLIP, runs through script, Trainer, scores and card.

It is an encoder-decoder without a start token, whose labels are not shifted, whose words are separated by spaces and
whose batch has keys of its own. What it answers is `captioning.models.captioner.Captioner` and nothing else.
"""

import shutil

import numpy as np
import pytest
import torch
from helpers import flags, outcome, read_json, score_flags
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

import run_captioning
from captioning.errors import UserError
from captioning.models.captioner import Captioner, CardFacts, sum_nll
from captioning.models.load import CAPTIONERS, load_captioner
from captioning.scoring.captions import read_predictions


SIDE, WIDTH = 16, 24


class StubConfig(PreTrainedConfig):
    model_type = "stub"
    vocab_size: int = 0


class StubModel(PreTrainedModel, GenerationMixin):
    config_class = StubConfig

    def __init__(self, config):
        super().__init__(config)
        self.look, self.head = nn.Linear(SIDE**2, WIDTH), nn.Linear(WIDTH, config.vocab_size)
        self.embed, self.read = nn.Embedding(config.vocab_size, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.post_init()

    def decode(self, looked, tokens):
        """Return the logits `[B, L, V]` of tokens `[B, L]`, each predicted from those before it."""
        words = self.embed(tokens[:, :-1])
        states, _ = self.read(torch.cat([torch.zeros_like(looked)[:, None], words], dim=1), looked[None].contiguous())
        return self.head(states)

    def forward(self, gray, tokens, labels, use_cache=False):
        logits = self.decode(self.look(gray), tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class StubCaptioner(Captioner):
    card = CardFacts(
        kind="stub",
        tags=("stub",),
        transformers="5.0",
        license_note="The stub's weights are free.",
        citation="@misc{stub}",
        usage="stub.caption({{ name }}, {{ settings }})",
        plain_generate="{% if suffices %}Plain.{% endif %}",
    )
    tokenizer = property(lambda self: self.processor)  # there is no image processor
    vision_model = property(lambda self: self.model.look)
    text_model = property(lambda self: self.model.read)

    @classmethod
    def from_pretrained(cls, name, revision=None, dtype=torch.float32):
        return cls(StubModel.from_pretrained(name), PreTrainedTokenizerFast.from_pretrained(name))

    @classmethod
    def from_config(cls, config, name, seed, tokenizer_name, captions, vocab_size):
        special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
        words = Tokenizer(models.WordLevel(unk_token="<unk>"))
        words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[*special.values()])
        words.train_from_iterator(captions, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
        torch.manual_seed(seed)
        return cls(StubModel(StubConfig.from_dict(config | {"vocab_size": len(tokenizer)})).eval(), tokenizer)

    def set_generation_config(self, config):
        self.model.generation_config = config

    def collate(self, images, rows):
        gray = [np.array(image.convert("L").resize((SIDE, SIDE)), dtype=np.float32) for image in images]
        rows = [torch.tensor(row) for row in rows]
        tokens, labels = (pad_sequence(rows, True, value) for value in (self.tokenizer.pad_token_id, -100))
        return {"gray": torch.tensor(np.stack(gray)).flatten(1) / 255, "tokens": tokens, "labels": labels}

    def encode_images(self, batch):
        return self.model.look(batch["gray"])

    def caption_nll(self, encoded, batch):
        logits, labels = self.model.decode(encoded, batch["tokens"]), batch["labels"]
        return sum_nll(logits[labels != -100], labels)

    def generate(self, encoded, config):
        tokens = torch.empty(len(encoded), 0, dtype=torch.long)
        ended = torch.zeros(len(encoded), dtype=torch.bool)
        for _ in range(config.max_new_tokens):
            logits = self.model.decode(encoded, torch.nn.functional.pad(tokens, (0, 1)))[:, -1]
            new = logits.argmax(dim=-1).masked_fill(ended, self.tokenizer.pad_token_id)
            tokens, ended = torch.cat([tokens, new[:, None]], dim=1), ended | (new == self.end_token_id)
        return tokens

    def image_features(self, encoded):
        return encoded


@pytest.fixture(scope="module", autouse=True)
def stub():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CAPTIONERS, "stub", StubCaptioner)
        yield


@pytest.fixture(scope="module")
def stub_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("stub") / "config.json"
    path.write_text('{"model_type": "stub"}')
    return path


def stub_flags(config, dataset, folder, **values):
    return flags(config, dataset, folder, num_train_epochs=3, learning_rate=1e-2, neighbor_samples=8, **values)


@pytest.fixture(scope="module")
def run_folder(stub_config, parquet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_captioning.main(stub_flags(stub_config, parquet_folder, folder))
    return folder


def test_another_captioner_is_trained_and_scored(run_folder):
    losses = [entry["eval_loss"] for entry in outcome(run_folder)["history"] if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    baselines = read_json(run_folder / "scores.json")["test"]["scores"]["rougeL"]["baselines"]
    assert baselines["nearest_image"] is not None, "it needs features of the training images"
    assert len(read_predictions(run_folder / "predictions" / "test.jsonl")) == 7


def test_its_loss_counts_the_first_token_and_its_text_has_no_special_tokens(run_folder, raw_dataset):
    captioner, validation = load_captioner(str(run_folder)), raw_dataset["validation"]
    tokens, _ = captioner.tokenize(validation["caption"], 64)
    expected = captioner.model(**captioner.collate(validation["image"], tokens)).loss.item()
    assert outcome(run_folder)["results"]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert captioner.decode(np.array([[5, 6, 2, 0, -100]])) == [captioner.tokenizer.decode([5, 6])]


def test_its_card_says_what_it_is_and_its_page_has_no_attention_maps(run_folder):
    card, page = ((run_folder / name).read_text() for name in ("README.md", "report.html"))
    for fact in ("A stub that writes", "- stub", "The stub's weights are free.", "@misc{stub}", "Plain."):
        assert fact in card
    assert f'stub.caption("{run_folder.name}", num_beams=' in card
    for word in ("BLIP", "[SEP]", "[DEC]", "None"):
        assert word not in card
    assert read_predictions(run_folder / "predictions" / "test.jsonl")[0]["image_id"] in page
    assert '"attention":{}' in page.replace(" ", "")


def test_its_model_is_scored_alone_as_at_the_end_of_its_training(run_folder, parquet_folder, tmp_path):
    scored = run_captioning.main(score_flags(run_folder, parquet_folder, tmp_path, neighbor_samples=8))
    assert (tmp_path / "predictions" / "test.jsonl").read_text() == outcome(run_folder)["predictions"]["test.jsonl"]
    assert scored["predict_loss"] == outcome(run_folder)["results"]["predict_loss"]


def test_its_training_is_resumed_to_the_same_weights(run_folder, stub_config, parquet_folder, tmp_path):
    folder = tmp_path / run_folder.name
    shutil.copytree(run_folder, folder)
    (folder / "model.safetensors").unlink()
    shutil.rmtree(max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    run_captioning.main(stub_flags(stub_config, parquet_folder, folder, resume_from_checkpoint=True))
    assert outcome(folder) == outcome(run_folder)


def test_a_model_of_an_unsupported_type_is_refused(tmp_path):
    reason = r"is of model type {}; supported: blip, .*, git, .*, stub; give one such as Salesforce/blip"
    for content, model_type in (("{}", "None"), ('{"model_type": "bert"}', "bert")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=reason.format(model_type)):
            load_captioner(str(tmp_path))
