"""What the demo shows of a caption is what the model says: the caption, its alternatives, their probabilities."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from families import save_tiny
from helpers import make_noise, make_rows, save_captioner, stock_copy
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from captioning.data.images import open_image
from captioning.errors import UserError
from captioning.inference.model import InferenceModel
from captioning.inference.page_parts import details
from captioning.inference.writer import Writer, Written
from captioning.models.captioner import WatchTokens
from captioning.models.concept_head import ConceptHead
from captioning.models.fast_blip import decoder


BEAMS = {"num_beams": 3, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def folder(tiny_captioner, tmp_path_factory):
    return save_captioner(tiny_captioner, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return InferenceModel(str(folder), settings=BEAMS)


def written(writer, image, **changes):
    *texts, last = writer.write(image, writer.settings(changes))
    assert isinstance(last, Written)
    return texts, last


@pytest.mark.parametrize("family", ["blip", "qwen3_vl", "git", "vit-gpt2", "blip-2-t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_caption_is_that_of_the_model_and_appears_token_by_token(folder, family, num_beams, tmp_path):
    name = folder if family == "blip" else save_tiny(family, tmp_path / "model")
    model = InferenceModel(str(name), settings=BEAMS | {"num_beams": num_beams})
    for seed in range(3):
        image = make_noise(seed)
        texts, last = written(Writer(model), image)
        best = last.alternatives[0]
        assert best.caption == model.describe([image])[0].caption
        assert len(last.alternatives) == num_beams
        assert len(texts) >= best.num_tokens - 1 - (num_beams > 1)
        if num_beams == 1:
            assert best.caption.startswith(texts[-1])


def test_probabilities_are_those_of_a_teacher_forced_pass_of_stock(model):
    captioner, image = model.captioner, make_noise(1)
    _, last = written(Writer(model), image)
    with model.computing():
        config = model.generation_config
        encoded = model.encode([image])
        generated = captioner.generate(encoded, GenerationConfig(**BEAMS, num_return_sequences=3, do_sample=False))
    stock = stock_copy(captioner.model)
    pixels = captioner.pixel_values([image])
    for row, found in zip(generated.numpy(), last.alternatives, strict=True):
        row = captioner.without_padding(row)
        assert found.caption == captioner.decode(row[None])[0]
        tokens = torch.tensor([[*captioner.prompt_row, *row]])
        with torch.no_grad():
            log_probs = stock(pixel_values=pixels, input_ids=tokens).logits.log_softmax(-1)[0]
        nll = -sum(float(log_probs[i, token]) for i, token in enumerate(row))
        assert found.nll == pytest.approx(nll, rel=1e-5)
        assert found.num_tokens == len(row) and found.is_cut == (row[-1] != captioner.end_token_id)
        assert found.token_probability == pytest.approx(np.exp(-nll / len(row)), rel=1e-5)
    shares = np.exp([-one.nll for one in last.alternatives])
    assert last.shares == pytest.approx(list(shares / shares.sum()))
    assert config.num_return_sequences in (None, 1), "the model's own settings are left alone"


@pytest.fixture(params=[set(), {"cpu"}], ids=["as on a CPU", "as on a GPU"])
def fixed_shape_on(request, monkeypatch):
    monkeypatch.setattr(decoder, "FIXED_SHAPE_ON", request.param)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_fast_code_shows_the_steps_of_stock(captioner, num_beams, fixed_shape_on):
    config, steps = GenerationConfig(num_beams=num_beams, max_new_tokens=10, do_sample=False), {True: [], False: []}
    for fast, shown in steps.items():
        captioner.adapt(fast=fast)
        encoded = captioner.encode_images(captioner.collate([make_noise(3)], [captioner.prompt_row]))
        watch = WatchTokens(lambda tokens, shown=shown: shown.append(tokens.tolist()))
        last = captioner.generate(encoded, config, watch)[0].tolist()
    assert steps[True] == steps[False]
    assert [len(tokens) for tokens in steps[True]] == list(range(1, 10))
    greedy = captioner.generate(encoded, GenerationConfig(num_beams=1, max_new_tokens=1, do_sample=False))
    assert steps[True][0] == greedy[0].tolist(), "the most probable beam"
    if num_beams == 1:
        assert steps[True] == [last[:length] for length in range(1, 10)]


def test_nothing_is_shown_after_the_end(captioner, fixed_shape_on, monkeypatch):
    captioner.adapt(fast=True)
    end, shown = captioner.end_token_id, []

    def end_after_three(self, input_ids, scores):
        return scores if input_ids.shape[1] < 4 else scores.index_fill(1, torch.tensor([end]), 99.0)

    monkeypatch.setattr(RepetitionPenaltyLogitsProcessor, "__call__", end_after_three)
    encoded = captioner.encode_images(captioner.collate([make_noise(3)], [captioner.prompt_row]))
    config = GenerationConfig(max_new_tokens=20, do_sample=False, repetition_penalty=1.1)
    tokens = captioner.generate(encoded, config, WatchTokens(lambda tokens: shown.append(len(tokens))))
    assert tokens.shape == (1, 4) and shown == [1, 2, 3]


def test_a_closed_iterator_stops_the_model(model, monkeypatch):
    writer, decode = Writer(model), mock.Mock(side_effect=model.captioner.decode)
    monkeypatch.setattr(model.captioner, "decode", decode)
    steps = writer.write(make_noise(), writer.settings({"num_beams": 1, "max_new_tokens": 60, "min_new_tokens": 60}))
    next(steps)
    steps.close()
    writer._thread.shutdown()  # waits for the model
    assert decode.call_count < 60


def test_the_nearest_training_image_is_the_image_itself(model, raw_dataset, parquet_folder):
    writer = Writer(model, str(parquet_folder), 6)
    for row in raw_dataset["train"].select(range(6)):
        _, last = written(writer, open_image(row["image"]))
        assert last.neighbors[0] == (row["caption"], pytest.approx(1))
        assert len(last.neighbors) == 3
        assert last.neighbors[1][1] <= last.neighbors[0][1]


def test_concepts_are_those_of_the_head(model, monkeypatch):
    writer = Writer(model)
    assert written(writer, make_noise())[1].concepts is None
    size = model.captioner.config.vision_config.hidden_size
    head = ConceptHead(size, ["C0000001", "C0000002"], {"C0000002": "Zyste"})
    with torch.no_grad():
        head.bias[:] = torch.tensor([-1.0, 1.0])
    monkeypatch.setattr(model.captioner, "concept_head", head)
    last = written(writer, make_noise())[1]
    assert last.concepts == ["Zyste"] and "<li>Zyste" in details(last)
    last = dataclasses.replace(last, concepts=[])
    assert "<li>none" in details(last)


def test_training_images_that_cannot_be_read_are_left_out(model, tmp_path):
    rows = make_rows(2, image=[{"bytes": b"no image", "path": None}] * 2)
    rows.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    with pytest.raises(UserError, match="none of the first 2 training images"):
        Writer(model, str(tmp_path), 2)
