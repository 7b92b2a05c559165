"""BLIP is loaded, built and adapted as described, and generates what stock `generate` does, token for token."""

import json
import time

import numpy as np
import pytest
import torch
from helpers import SHARED, TINY_CONFIG, make_captions, make_noise, read_json, save_captioner, stock_copy
from processes import ROOT
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering, GenerationConfig
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioning.errors import UserError
from captioning.models.load import build_captioner, load_captioner
from captioning.models.tokenizer import add_blip_tokens, load_tokenizer, train_tokenizer


@pytest.fixture
def saved(captioner, tmp_path):
    return save_captioner(captioner, tmp_path / "saved")


def test_a_saved_model_comes_back(saved, model, processor):
    loaded = load_captioner(str(saved))
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, loaded.model.state_dict()[name]), name
    assert loaded.tokenizer("An effusion.") == processor.tokenizer("An effusion.")


def test_half_precision_checkpoints_are_trained_in_float32(saved, model):
    model.half().save_pretrained(saved)
    assert {parameter.dtype for parameter in load_captioner(str(saved)).model.parameters()} == {torch.float32}


def test_the_image_processor_is_the_pil_one(saved):
    """T11: the class named on disk is torchvision's where that is installed."""
    on_disk = read_json(saved / "processor_config.json")["image_processor"]
    assert on_disk["image_processor_type"] != "BlipImageProcessorPil"
    assert isinstance(load_captioner(str(saved)).processor.image_processor, BlipImageProcessorPil)


def test_a_tokenizer_with_another_start_token_does_not_move_generation(saved, captioner, make_trainer):
    """The Trainer overwrites the ids in the text config with those of the tokenizer (T3)."""
    captioner.tokenizer.bos_token = captioner.tokenizer.eos_token = "[CLS]"
    captioner.processor.save_pretrained(saved)
    loaded, start = load_captioner(str(saved)), captioner.config.text_config.bos_token_id
    for each in (loaded, captioner):
        make_trainer(captioner=each, max_steps=1, do_eval=False, save_strategy="no").train()
    text = loaded.config.text_config
    assert (text.bos_token_id, text.eos_token_id) == (start, text.sep_token_id)
    assert captioner.config.text_config.bos_token_id != start, "the Trainer leaves the ids alone now"


def test_a_checkpoint_of_another_blip_is_refused(saved, model):
    vqa = BlipForQuestionAnswering(model.config)
    del vqa.text_decoder
    vqa.save_pretrained(saved)
    with pytest.raises(UserError, match=r"lacks \d+ weights \('text_decoder.*', ...\); give another checkpoint"):
        load_captioner(str(saved))


def test_a_tokenizer_larger_than_the_embedding_is_refused(saved, processor):
    processor.tokenizer.add_tokens(["brandnew"])
    processor.save_pretrained(saved)
    with pytest.raises(UserError, match=r"its tokenizer has (\d+) entries, its embedding \d+; give the tokenizer"):
        load_captioner(str(saved))


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere"])
def test_an_unknown_model_is_named(name):
    with pytest.raises(UserError, match=f"model '{name}' cannot be loaded"):
        load_captioner(name)


@pytest.mark.parametrize(
    ("files", "content", "message"),
    [
        (["model.safetensors"], "", "model '.*' cannot be loaded"),
        (["config.json"], "[]", "model '.*' cannot be loaded"),
        (["tokenizer.json"], "{}", "tokenizer '.*' cannot be loaded"),
        (["tokenizer.json", "tokenizer_config.json"], None, "tokenizer '.*' has no words"),
    ],
)
def test_a_damaged_model_folder_is_named(saved, files, content, message):
    for file in files:
        (saved / file).unlink() if content is None else (saved / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_captioner(str(saved))


def test_a_processor_of_another_size_gives_way_to_the_model(saved, processor, caplog):
    processor.image_processor.size = {"height": 48, "width": 48}
    processor.save_pretrained(saved)
    assert load_captioner(str(saved)).processor.image_processor.size == {"height": 32, "width": 32}
    assert "images are resized to 32 pixels" in caplog.text


@pytest.mark.parametrize(
    "part", [{"hidden_size": 30}, {"hidden_size": "x"}, {"hidden_act": "none"}, {"patch_size": 0}]
)
def test_a_config_that_builds_no_model_is_named(build_model, tmp_path, part):
    config = TINY_CONFIG | {"vision_config": TINY_CONFIG["vision_config"] | {"num_attention_heads": 4} | part}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json' (builds no model|cannot be loaded)"):
        build_model(config=tmp_path / "config.json")


@pytest.mark.parametrize(
    "content", [None, "{", "{}", '{"model_type": "blip", "hidden_size": 32}', '{"hidden_size": 32}']
)
def test_a_config_that_does_not_describe_a_blip_is_refused(tmp_path, content):
    """Stock would build BLIP-base, by its defaults."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    reason = r"config '.*' (does not describe a BLIP|cannot be loaded).*recipes/configs/ has examples"
    with pytest.raises(UserError, match=reason):
        build_captioner(str(tmp_path), 0, None, make_captions(4), 100)


def test_building_is_deterministic_by_seed(build_model):
    first, again, other = (build_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    assert any(not torch.equal(value, first[name]) for name, value in other.items())


def test_a_built_model_has_a_vision_model_of_usable_weights(build_model, tmp_path):
    """The default `initializer_range` of BlipVisionConfig is 1e-10: every image would be encoded alike."""
    config = {key: {k: v for k, v in part.items() if k != "initializer_range"} for key, part in TINY_CONFIG.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_model(config=tmp_path / "config.json")
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.std() > 0.01


def test_the_model_and_the_tokenizer_agree(tiny_captioner):
    text, tokenizer = tiny_captioner.config.text_config, tiny_captioner.tokenizer
    decoder = tiny_captioner.model.text_decoder
    assert text.vocab_size == len(tokenizer) == decoder.cls.predictions.decoder.out_features
    ids = tokenizer.convert_tokens_to_ids(["[PAD]", "[SEP]", "[DEC]", "[ENC]"])
    assert ids == [text.pad_token_id, text.sep_token_id, text.bos_token_id, len(tokenizer) - 1]


def test_a_vocabulary_file_alone_is_a_tokenizer(tmp_path):
    """T13: `BertTokenizerFast(vocab_file=...)` ignores it without a word."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "effusion", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == 8
    assert tokenizer("An effusions")["input_ids"] == [2, 5, 6, 7, 3]
    (tmp_path / "vocab.txt").write_text("an\neffusion\n")
    with pytest.raises(UserError, match=r"lacks \[CLS\]"):
        load_tokenizer(str(tmp_path))


def test_the_vocabulary_of_blip(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("BERT's vocabulary is not beside the project")
    tokenizer = add_blip_tokens(load_tokenizer(str(SHARED / "bert_vocab")))
    assert tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[DEC]", "[ENC]"]) == [101, 102, 30522, 30523]


def test_training_a_tokenizer_is_deterministic():
    """Not even twice in one process would it be by default: each training seeds the hash maps anew."""
    first, *others = (train_tokenizer(make_captions(20), 150).get_vocab() for _ in range(5))
    assert all(vocabulary == first for vocabulary in others)


def test_a_word_of_100_000_characters_costs_a_tokenizer_nothing_and_changes_nothing():
    """The time of a merge grows with the length of the longest word: this one took 10 s, or minutes at full size."""
    word = "".join(np.random.default_rng(0).choice(list("abcdefz"), 100_000))
    captions = [*make_captions(20), f"Small {'q' * 100} nodule {word}."]
    began = time.process_time()
    vocabulary = train_tokenizer(captions, 300).get_vocab()
    assert time.process_time() - began < 2
    assert vocabulary == train_tokenizer([*captions[:-1], f"small {'q' * 100} nodule ."], 300).get_vocab()
    assert "##q" in vocabulary and "##z" not in vocabulary


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/configs").glob("*.json")), ids=lambda path: path.name)
def test_configs_of_the_repository_are_blip(path):
    config = BlipConfig.from_pretrained(path)
    assert 0.001 < config.vision_config.initializer_range < 0.1
    known = BlipConfig().to_dict()
    content = read_json(path)
    for part in ("text_config", "vision_config"):
        assert set(content[part]) <= set(known[part]), "a misspelled key would be kept without effect"


def test_another_image_size_equals_stock_interpolation(captioner, tmp_path):
    model = captioner.model
    pixel_values = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=True).last_hidden_state
    captioner.adapt(image_size=48)
    save_captioner(captioner, tmp_path)
    stock = BlipForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(stock.vision_model(pixel_values=pixel_values).last_hidden_state, expected, atol=1e-6)
    assert load_captioner(str(tmp_path)).pixel_values([make_noise()]).shape == (1, 3, 48, 48)


def test_the_same_image_size_changes_nothing_and_one_that_cuts_patches_is_refused(captioner):
    before = captioner.model.vision_model.embeddings.position_embedding.clone()
    captioner.adapt(image_size=32)
    assert torch.equal(captioner.model.vision_model.embeddings.position_embedding, before)
    with pytest.raises(UserError, match="set --image_size to 40"):
        captioner.adapt(image_size=42)


def test_a_frozen_vision_model_and_a_smoothed_loss(captioner):
    captioner.adapt(freeze_vision_model=True, label_smoothing=0.1)
    frozen = {name.split(".")[0] for name, p in captioner.model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_model"}
    assert captioner.config.text_config.label_smoothing == captioner.model.text_decoder.label_smoothing == 0.1


def test_lengths_are_held_against_the_positions(captioner):
    captioner.check_lengths(64, 63)
    with pytest.raises(UserError, match=r"max_caption_length 65 exceeds the model's 64 .*; set .* to 64 or less$"):
        captioner.check_lengths(65, 10)
    captioner.prompt_ids = [7, 8, 9]
    with pytest.raises(UserError, match=r"max_new_tokens 61 after 4 tokens of the prompt .* to 60 or less"):
        captioner.check_lengths(64, 61)
    captioner.prompt_ids = [7] * 63  # as many as tokens of an image may be
    with pytest.raises(UserError, match=r"the model's 64 text positions; take a model with more$"):
        captioner.check_lengths(64, 1)


def test_decode_settings_are_written_beside_the_model(captioner, tmp_path):
    settings = {"num_beams": 4, "max_new_tokens": 9, "length_penalty": 1.3}
    captioner.set_generation_config(GenerationConfig(do_sample=False, **settings))
    captioner.model.save_pretrained(tmp_path)
    saved = read_json(tmp_path / "generation_config.json")
    assert {key: saved[key] for key in settings} == settings
    assert saved["eos_token_id"] == captioner.config.text_config.sep_token_id


UNUSUAL = {"renormalize_logits": True, "encoder_repetition_penalty": 2.0}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 1}, {"do_sample": True}, UNUSUAL], ids=str)
def test_generation_equals_stock_whatever_the_settings(captioner, fast, settings):
    """What the fast path does not know, as sampling, it leaves to stock."""
    captioner.adapt(fast=fast)
    pixel_values = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    config = GenerationConfig(max_new_tokens=15, **settings)
    torch.manual_seed(0)
    with captioner.evaluation():
        ours = captioner.generate(captioner.encode_images({"pixel_values": pixel_values}), config)
    torch.manual_seed(0)
    stock = stock_copy(captioner.model).generate(pixel_values=pixel_values, max_new_tokens=15, **settings)
    assert torch.equal(ours, stock[:, 1:])
    assert len({tuple(row) for row in ours.tolist()}) > 1, "all captions are the same: the test sees nothing"


def test_new_tokens_are_counted_up_to_the_first_end_token(captioner):
    """Stock beam search fills up with `[SEP]` where the padding token is 0, to the longest caption of a batch."""
    end, pad = captioner.tokenizer.sep_token_id, captioner.tokenizer.pad_token_id
    tokens = np.array([[7, 8, end, end, end, -100], [7, end, pad, pad, -100, -100], [7, 8, 9, 7, 8, -100], [end] * 6])
    assert captioner.num_new_tokens(tokens).tolist() == [3, 2, 5, 1]


@torch.no_grad()
def test_attention_maps_are_those_of_the_position_that_wrote_the_token(captioner):
    """Computed again by stock BLIP, one growing prefix at a time."""
    torch.manual_seed(0)
    encoded = captioner.encode_images({"pixel_values": torch.randn(1, 3, 32, 32)})
    captioner.prompt_ids = [7, 9]
    tokens = captioner.generate(encoded, GenerationConfig(num_beams=2, max_new_tokens=5))[0]
    maps = captioner.attention_maps(encoded, tokens)
    assert maps.shape == (len(tokens), 4, 4)
    settings = {"encoder_hidden_states": encoded.image_embeds, "use_cache": False, "output_attentions": True}
    for t, attention in enumerate(maps):
        prefix = torch.tensor([[*captioner.prompt_row, *tokens[:t].tolist()]])
        layers = captioner.model.text_decoder(input_ids=prefix, **settings).cross_attentions
        expected = torch.stack(layers)[:, 0, :, -1].mean(dim=(0, 1))
        torch.testing.assert_close(attention.flatten(), expected[1:], rtol=0, atol=1e-6)
        assert float(attention.sum() + expected[0]) == pytest.approx(1, abs=1e-5)
