"""Loading and building BLIP, and generation that equals stock `generate` token for token."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SHARED, TINY_CONFIG, make_captions, make_rows
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioning.errors import UserError
from captioning.models import blip
from captioning.models.tokenizer import add_blip_tokens, load_tokenizer, train_tokenizer


ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- Load and build -------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back(saved, model, processor):
    loaded, loaded_processor = blip.load_blip(str(saved))
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, loaded.state_dict()[name]), name
    assert loaded_processor.tokenizer("An effusion.") == processor.tokenizer("An effusion.")


def test_half_precision_checkpoints_are_trained_in_float32(saved, model):
    model.half().save_pretrained(saved)
    loaded, _ = blip.load_blip(str(saved))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_the_image_processor_is_the_pil_one(saved):
    """T11: what is on disk names a class that becomes torchvision's where that is installed."""
    assert json.loads((saved / "processor_config.json").read_text())["image_processor"]["image_processor_type"] != (
        "BlipImageProcessorPil"
    )
    _, processor = blip.load_blip(str(saved))
    assert isinstance(processor.image_processor, BlipImageProcessorPil)


def test_a_tokenizer_with_another_start_token_does_not_move_generation(saved, model, processor, make_trainer):
    """The Trainer overwrites the ids in the text config with those of the tokenizer (T3)."""
    processor.tokenizer.bos_token = processor.tokenizer.eos_token = "[CLS]"
    processor.save_pretrained(saved)
    loaded, loaded_processor = blip.load_blip(str(saved))
    start, end = loaded.config.text_config.bos_token_id, loaded.config.text_config.eos_token_id
    trainer = make_trainer(model=loaded, max_steps=1, do_eval=False, save_strategy="no")
    trainer.processing_class = loaded_processor
    trainer.train()
    assert loaded.config.text_config.bos_token_id == start
    assert loaded.config.text_config.eos_token_id == end
    moved = make_trainer(model=model, max_steps=1, do_eval=False, save_strategy="no")
    moved.processing_class = processor
    moved.train()
    assert model.config.text_config.bos_token_id != start, "the Trainer leaves the ids alone now"


def test_a_checkpoint_of_another_blip_is_refused(saved, model):
    vqa = BlipForQuestionAnswering(model.config)
    del vqa.text_decoder
    vqa.save_pretrained(saved)
    with pytest.raises(UserError, match=r"lacks \d+ weights of a captioning BLIP"):
        blip.load_blip(str(saved))


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere"])
def test_an_unknown_model_is_named(name):
    with pytest.raises(UserError, match=f"model '{name}' cannot be loaded"):
        blip.load_blip(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="is no BLIP but None"):
        blip.load_blip(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is no BLIP but bert"):
        blip.load_blip(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer '.*' cannot be loaded"),
        (lambda folder: [(folder / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    ],
    ids=["weights", "config", "tokenizer", "no tokenizer"],
)
def test_a_damaged_model_folder_is_named(saved, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message):
        blip.load_blip(str(saved))


def test_a_processor_of_another_size_gives_way_to_the_model(saved, processor, caplog):
    processor.image_processor.size = {"height": 48, "width": 48}
    processor.save_pretrained(saved)
    _, loaded = blip.load_blip(str(saved))
    assert loaded.image_processor.size == {"height": 32, "width": 32}
    assert "images are made 32 pixels" in caplog.text


@pytest.mark.parametrize(
    "part", [{"hidden_size": 30}, {"hidden_size": "x"}, {"hidden_act": "none"}, {"patch_size": 0}]
)
def test_a_config_that_builds_no_model_is_named(processor, tmp_path, part):
    config = TINY_CONFIG | {"vision_config": TINY_CONFIG["vision_config"] | {"num_attention_heads": 4} | part}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json' (builds no model|cannot be loaded)"):
        blip.build_blip(str(tmp_path / "config.json"), processor.tokenizer, seed=0)


def test_a_vocabulary_without_special_tokens_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("an\neffusion\n")
    with pytest.raises(UserError, match=r"lacks \[CLS\]"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [None, {}, {"model_type": "bert", "hidden_size": 32}, {"hidden_size": 32}])
def test_a_config_that_describes_no_blip_builds_none(processor, tmp_path, content):
    """Stock would build BLIP-base, by its defaults."""
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config '.*' (describes no BLIP|cannot be loaded).*configs/ has examples"):
        blip.build_blip(str(tmp_path), processor.tokenizer, seed=0)


def test_an_unreadable_config_is_named(processor, tmp_path):
    with pytest.raises(UserError, match=r"config 'nowhere\.json' cannot be loaded"):
        blip.build_blip("nowhere.json", processor.tokenizer, seed=0)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        blip.build_blip(str(tmp_path / "bad.json"), processor.tokenizer, seed=0)


def test_building_is_deterministic_by_seed(config_file, processor):
    def weights(seed):
        return blip.build_blip(str(config_file), processor.tokenizer, seed)[0].state_dict()

    first = weights(1)
    assert all(torch.equal(value, first[name]) for name, value in weights(1).items())
    assert any(not torch.equal(value, first[name]) for name, value in weights(2).items())


def test_a_built_model_has_a_living_vision_tower(processor, tmp_path):
    """The default `initializer_range` of BlipVisionConfig is 1e-10: every image would be encoded alike."""
    config = {key: {k: v for k, v in part.items() if k != "initializer_range"} for key, part in TINY_CONFIG.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = blip.build_blip(str(tmp_path / "config.json"), processor.tokenizer, seed=0)
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.std() > 0.01


def test_the_model_and_the_tokenizer_agree(tiny_blip):
    model, processor = tiny_blip
    text, tokenizer = model.config.text_config, processor.tokenizer
    assert text.vocab_size == len(tokenizer) == model.text_decoder.cls.predictions.decoder.out_features
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[SEP]", "[DEC]"]) == [
        text.pad_token_id,
        text.sep_token_id,
        text.bos_token_id,
    ]
    assert tokenizer.convert_tokens_to_ids("[ENC]") == len(tokenizer) - 1


def test_a_vocabulary_file_alone_is_a_tokenizer(tmp_path):
    """T13: `BertTokenizerFast(vocab_file=...)` ignores it without a word."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "effusion", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == 8
    assert tokenizer("An effusions")["input_ids"] == [2, 5, 6, 7, 3]


def test_the_vocabulary_of_blip(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("BERT's vocabulary is not beside the project")
    tokenizer = add_blip_tokens(load_tokenizer(str(SHARED / "bert_vocab")))
    assert tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[DEC]", "[ENC]"]) == [101, 102, 30522, 30523]


def test_training_a_tokenizer_is_deterministic_across_processes():
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from helpers import make_captions\n"
        "from blip import train_tokenizer\n"
        "print(sorted(train_tokenizer(make_captions(20), 150).get_vocab().items(), key=lambda item: item[1]))"
    )
    runs = [subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.strip() == str(
        sorted(train_tokenizer(make_captions(20), 150).get_vocab().items(), key=lambda item: item[1])
    )


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.json")), ids=lambda path: path.name)
def test_configs_of_the_repository_are_blip(path):
    config = BlipConfig.from_pretrained(path)
    assert 0.001 < config.vision_config.initializer_range < 0.1
    known = BlipConfig().to_dict()
    content = json.loads(path.read_text())
    for part in ("text_config", "vision_config"):
        assert set(content[part]) <= set(known[part]), "a misspelt key would be kept without effect"


# --- Adapt ----------------------------------------------------------------------------------------------------


def test_another_image_size_equals_stock_interpolation(model, processor, tmp_path):
    pixel_values = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=True).last_hidden_state
    blip.resize_images(model, processor, 48)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stock = BlipForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(stock.vision_model(pixel_values=pixel_values).last_hidden_state, expected, atol=1e-6)
    images = BlipProcessor.from_pretrained(tmp_path)(images=make_rows(1)["image"][:], return_tensors="pt")
    assert images["pixel_values"].shape == (1, 3, 48, 48)


def test_the_same_image_size_changes_nothing(model, processor):
    before = model.vision_model.embeddings.position_embedding.clone()
    blip.resize_images(model, processor, 32)
    assert torch.equal(model.vision_model.embeddings.position_embedding, before)


def test_an_image_size_that_cuts_patches_is_refused(model, processor):
    with pytest.raises(UserError, match="set --image_size to 40"):
        blip.resize_images(model, processor, 42)


def test_lengths_are_held_against_the_positions(model):
    blip.check_lengths(model, 64, 1, 63)
    with pytest.raises(UserError, match="max_caption_length 65 exceeds the model's 64"):
        blip.check_lengths(model, 65, 1, 10)
    with pytest.raises(UserError, match="set --max_new_tokens to 60"):
        blip.check_lengths(model, 64, 4, 61)


# --- Generate -------------------------------------------------------------------------------------------------


def test_decode_settings_are_written_beside_the_model(model, tmp_path):
    settings = {"num_beams": 4, "max_new_tokens": 9, "length_penalty": 1.3, "do_sample": False}
    blip.set_decoding(model, settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: saved[key] for key in ("num_beams", "max_new_tokens", "length_penalty")} == {
        key: settings[key] for key in ("num_beams", "max_new_tokens", "length_penalty")
    }
    assert saved["eos_token_id"] == model.config.text_config.sep_token_id


@pytest.mark.parametrize("seed", range(3))
def test_generation_equals_stock(model, seed):
    pixel_values = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    bos_token_id = model.config.text_config.bos_token_id
    with torch.no_grad():
        image_embeds = blip.encode_images(model, pixel_values)
        ours = blip.generate_captions(model, image_embeds, [bos_token_id], num_beams=3, max_new_tokens=15)
    stock = model.generate(pixel_values=pixel_values, num_beams=3, max_new_tokens=15)
    assert torch.equal(ours, stock[:, 1:])
    assert len({tuple(row) for row in ours.tolist()}) > 1, "all captions are the same: the test sees nothing"


def test_attention_maps_are_those_of_the_position_that_wrote_the_token(model):
    """Computed anew from queries and keys that hooks catch while stock BLIP decodes, one growing prefix at a time."""
    torch.manual_seed(0)
    pixel_values = torch.randn(1, 3, 32, 32)
    image_embeds = blip.encode_images(model.eval(), pixel_values)
    start_ids = [model.config.text_config.bos_token_id, 7, 9]
    tokens = blip.generate_captions(model, image_embeds, start_ids, num_beams=2, max_new_tokens=5)[0]
    maps = blip.attention_maps(model, image_embeds, start_ids, tokens)
    assert maps.shape == (len(tokens), 4, 4)
    caught = {}
    layers = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
    for i, layer in enumerate(layers):
        for name in ("query", "key"):
            getattr(layer, name).register_forward_hook(lambda _, __, out, at=(i, name): caught.__setitem__(at, out))
    for t in range(len(tokens)):
        prefix = torch.tensor([[*start_ids, *tokens[:t].tolist()]])
        model.text_decoder(input_ids=prefix, encoder_hidden_states=image_embeds, use_cache=False)
        weights = []
        for i, layer in enumerate(layers):
            heads = (1, -1, layer.num_attention_heads, layer.attention_head_size)
            query, key = (caught[i, name].view(heads).transpose(1, 2) for name in ("query", "key"))
            scores = query[:, :, -1:] @ key.transpose(2, 3) / layer.attention_head_size**0.5
            weights.append(scores.softmax(dim=-1)[0, :, 0].mean(dim=0))
        expected = torch.stack(weights).mean(dim=0)
        assert maps[t].flatten().tolist() == pytest.approx(expected[1:].tolist(), abs=1e-6)
        assert float((maps[t].sum() + expected[0]).detach()) == pytest.approx(1, abs=1e-5)


def test_an_attention_map_lies_as_the_image_does(model):
    """The grid is filled row by row, as the patches are: a change in one patch changes its embedding alone."""
    embed = model.vision_model.embeddings.patch_embedding
    blank, lit = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    lit[:, :, 8:16, 24:32] = 1.0  # the second row of patches, the last column
    changed = (embed(lit) - embed(blank)).flatten(2).abs().sum(dim=1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 3]
    assert torch.arange(16).unflatten(-1, (4, 4))[1, 3] == 1 * 4 + 3
