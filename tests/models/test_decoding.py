"""The fast path decodes the tokens of stock `generate`, and each image only until its own caption is finished."""

import copy
import itertools
import random

import pytest
import torch
from helpers import make_batch, stock_copy
from torch.nn import functional as F
from transformers import GenerationConfig

from captioning.data.images import open_image
from captioning.models.fast_blip.decoding import (
    CaptionDecoder,
    can_decode,
    caption_hidden_states,
    decode_captions,
    project_images,
)
from captioning.models.fast_blip.packed_weights import caption_layers, packed_weights


TIE = 1e-5  # two captions whose float64 scores, sums of natural logarithms, are closer than this are equally good


@pytest.fixture(scope="module")
def build(build_model):
    """Return a function from a seed to a tiny stock BLIP, whose captions end the sooner the larger `end_bias`."""

    def build_biased(seed, end_bias=0.0):
        model = build_model(seed)
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[model.config.text_config.sep_token_id] += end_bias
        return model

    return build_biased


@pytest.fixture(scope="module")
def trained(tiny_captioner, checked):
    """A stock model that has learned 16 images by heart and its batch: captions differ and end by themselves."""
    captioner = copy.deepcopy(tiny_captioner)
    captioner.adapt(fast=True)
    model, rows = captioner.model, checked["train"].select(range(16))
    tokens, _ = captioner.tokenize(rows["caption"], 64)
    batch = captioner.collate([open_image(image) for image in rows["image"]], tokens)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return stock_copy(model).eval(), batch


def decode(model, pixel_values, prompt=None, **settings):
    """Decode on the fast path, each image with its own prompt `[B, T]`, which ends in `[SEP]` as in stock."""
    text, decoder = model.config.text_config, model.text_decoder
    with torch.no_grad():
        cross_attention = project_images(decoder, model.vision_model(pixel_values).last_hidden_state)
    start = torch.full((len(pixel_values), 1), text.bos_token_id, device=pixel_values.device)
    input_ids = start if prompt is None else torch.cat([start, prompt[:, 1:-1]], dim=1)
    settings = {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id} | settings
    return decoder.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        custom_generate=decode_captions,
        cross_attention=cross_attention,
        **settings,
    )


@pytest.fixture
def decoded(monkeypatch):
    """The shapes `[images, rows]` of the tokens that each call of a `CaptionDecoder` gets."""
    shapes, call = [], CaptionDecoder.__call__

    def record(self, tokens, first_position, visible):
        shapes.append(tuple(tokens.shape))
        return call(self, tokens, first_position, visible)

    monkeypatch.setattr(CaptionDecoder, "__call__", record)
    return shapes


def images(model, number, seed=0):
    side = model.config.vision_config.image_size
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(seed))


def caption_lengths(tokens, model):
    is_end = tokens == model.config.text_config.sep_token_id
    return [row.index(True) if any(row) else len(row) for row in is_end.tolist()]


def draw_settings(draw: random.Random) -> dict:
    """Decode settings as a user might combine them; half of the time each is left alone."""
    beams = draw.choice([1, 2, 3, 5])
    choices = {
        "no_repeat_ngram_size": [1, 2, 3],
        "min_new_tokens": [1, 4, 9],
        "repetition_penalty": [0.8, 1.3],
    }
    if beams > 1:
        choices |= {
            "length_penalty": [-1.0, 0.0, 0.5, 2.0],
            "early_stopping": [True, False, "never"],
            "num_return_sequences": list(range(1, beams + 1)),
        }
    settings = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.5}
    return {"num_beams": beams, "max_new_tokens": draw.choice([1, 9, 20, 20])} | settings


# --- The same tokens ------------------------------------------------------------------------------------------


def caption_scores(model, pixel_values, input_ids, captions, **settings) -> torch.Tensor:
    """Return how good `captions` `[B, L]` of B images are in float64 by `settings`: what the search maximizes.

    For a beam search the sum of log-probabilities, processed and with its length penalty; for a greedy one, which
    sees no further than the next token, all log-probabilities `[B, L - T]`.
    """
    model = copy.deepcopy(model).double()
    settings = {name: value for name, value in settings.items() if name != "num_return_sequences"}
    end = model.config.text_config.sep_token_id

    def score(decoder, prompt, logits_processor, stopping_criteria, generation_config, **kwargs):
        start, beams = prompt.shape[1], generation_config.num_beams
        logits = decoder(
            input_ids=captions, encoder_hidden_states=kwargs["encoder_hidden_states"][::beams], use_cache=False
        ).logits
        steps = []
        for length in range(start, captions.shape[1]):
            log_probs = logits_processor(captions[:, :length], F.log_softmax(logits[:, length - 1], dim=-1))
            steps.append(log_probs.gather(1, captions[:, length, None])[:, 0])
        steps = torch.stack(steps, dim=1)
        ended = F.pad((captions[:, start:-1] == end).cumsum(dim=1) > 0, (1, 0))
        steps = steps.masked_fill(ended, 0.0)
        if beams == 1:
            return steps
        return steps.sum(dim=1) / (~ended).sum(dim=1) ** generation_config.length_penalty

    return model.generate(pixel_values.double(), input_ids, custom_generate=score, **settings)


def first_differing(values, one, other):
    return values.gather(1, (one != other).int().argmax(dim=1, keepdim=True))[:, 0]


def same_but_for_ties(model, expected, found, pixel_values, input_ids=None, **settings) -> int:
    """Return how many captions of `found` differ from `expected`, all of them ties; fail on any that is not a tie."""
    assert len(expected) == len(found)
    pad = model.config.text_config.pad_token_id
    width = max(expected.shape[1], found.shape[1])
    expected, found = (F.pad(tokens, (0, width - tokens.shape[1]), value=pad) for tokens in (expected, found))
    rows = (expected != found).any(dim=1).nonzero()[:, 0]
    if not len(rows):
        return 0
    image = rows // settings.get("num_return_sequences", 1)
    prompt = None if input_ids is None else input_ids[image]
    scores = [
        caption_scores(model, pixel_values[image], copy.copy(prompt), tokens[rows], **settings)
        for tokens in (expected, found)
    ]
    if settings.get("num_beams", 1) == 1:
        start = width - scores[0].shape[1]
        scores = [first_differing(steps, expected[rows, start:], found[rows, start:]) for steps in scores]
    for row, one, other in zip(rows.tolist(), *scores, strict=True):
        assert abs(one - other) < TIE, (
            f"{settings}: caption {row} of stock scores {float(one):.7f}, ours {float(other):.7f}\n"
            f"stock {expected[row].tolist()}\nours  {found[row].tolist()}"
        )
    return len(rows)


def test_tokens_are_those_of_stock_for_any_settings(build, decoded):
    """Random models, images, prompts and settings; the sample holds the cases in which the two could part."""
    ties = captions = various = left_early = 0
    for seed in range(64):
        draw = random.Random(seed)
        model = build(seed % 16, end_bias=draw.choice([0, 3, 4, 5, 6]))
        batch, settings = draw.choice([1, 2, 5, 9, 9]), draw_settings(draw)
        assert can_decode(GenerationConfig(**settings)), "usual settings go to stock"
        pixel_values = images(model, batch, seed)
        prompt = None
        if draw.random() < 0.4:
            torch.manual_seed(seed)
            prompt = torch.randint(5, 100, (batch, draw.choice([2, 3, 6])))
        expected = model.generate(pixel_values, copy.copy(prompt), **settings)
        decoded.clear()
        found = decode(model, pixel_values, prompt, **settings)
        ties += same_but_for_ties(model, expected, found, pixel_values, prompt, **settings)
        captions += len(expected)
        various += len(set(caption_lengths(expected, model))) > 1
        left_early += decoded[-1][0] < batch
    assert ties <= captions / 100
    assert various > 15, "hardly a batch has captions of different lengths"
    assert left_early > 15, "hardly a batch has images that finish before others"


@pytest.mark.parametrize("prompted", [False, True])
def test_tokens_of_a_trained_model_are_those_of_stock(trained, prompted):
    model, batch = trained
    pixel_values = batch["pixel_values"]
    prompt = batch["input_ids"][:, :5] if prompted else None  # each image has its own
    plain = model.generate(pixel_values, max_new_tokens=40)
    assert len(set(map(tuple, plain.tolist()))) > 8, "captions are not distinct"
    assert (plain == model.config.text_config.sep_token_id).any(dim=1).all(), "captions do not end by themselves"
    ties = captions = 0
    for seed, beams in itertools.product(range(3), (1, 2, 3, 5)):
        settings = draw_settings(random.Random(seed)) | {"num_beams": beams, "max_new_tokens": 40}
        settings.pop("num_return_sequences", None)
        if beams == 1:
            settings = {name: settings[name] for name in settings.keys() - {"length_penalty", "early_stopping"}}
        expected = model.generate(pixel_values, copy.copy(prompt), **settings)
        found = decode(model, pixel_values, prompt, **settings)
        ties += same_but_for_ties(model, expected, found, pixel_values, prompt, **settings)
        captions += len(expected)
    assert ties <= captions / 100


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": [3, 9, 11]},
        {"eos_token_id": [3, 9, 11], "pad_token_id": 7},
        {"eos_token_id": None},
        {"pad_token_id": None},
        {"max_length": 11, "max_new_tokens": None, "min_length": 8},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_less_usual_settings_mean_what_they_mean_in_stock(build, settings, num_beams):
    model, pixel_values = build(1, end_bias=4), images(build(1), 6)
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 3, "num_beams": num_beams} | settings
    torch.manual_seed(0)
    prompt = torch.randint(5, 100, (6, 3))
    prompt[:, 0] = model.config.text_config.bos_token_id
    embeds = model.vision_model(pixel_values).last_hidden_state.detach()
    expected = model.text_decoder.generate(prompt[:, :-1].clone(), encoder_hidden_states=embeds, **settings)
    assert torch.equal(decode(model, pixel_values, prompt, **settings), expected)


def test_beams_go_on_where_all_of_the_likeliest_tokens_are_ends(build):
    model, ends = build(1, end_bias=8), [3, 9, 11]
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[ends[1:]] += 8
    settings = {"eos_token_id": ends, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
    settings |= {"early_stopping": "never", "length_penalty": 4.0, "pad_token_id": 0}
    pixel_values = images(model, 6)
    prompt = torch.full((6, 1), model.config.text_config.bos_token_id)
    embeds = model.vision_model(pixel_values).last_hidden_state.detach()
    expected = model.text_decoder.generate(prompt, encoder_hidden_states=embeds, **settings)
    assert torch.equal(decode(model, pixel_values, **settings), expected)


@pytest.mark.parametrize(
    "setting", [{"do_sample": True}, {"encoder_repetition_penalty": 1.5}, {"bad_words_ids": [[9]]}]
)
def test_settings_that_are_not_tested_here_are_left_to_stock(setting):
    assert not can_decode(GenerationConfig(max_new_tokens=9, **setting))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_tie_is_told_from_a_worse_caption(build, num_beams):
    """The judge of the tests above: words that look alike to the model are ties, any other word is none."""
    model = build(0, end_bias=4)
    settings = {"num_beams": num_beams, "max_new_tokens": 8}
    pixel_values = images(model, 3)
    word = int(model.generate(pixel_values, **settings)[0, 1])
    twin = word + 1 if word != 100 else word - 1
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, model.text_decoder.cls.predictions.bias):
            parameter[twin] = parameter[word]
    expected = model.generate(pixel_values, **settings)
    tied, worse = expected.clone(), expected.clone()
    assert expected[0, 1] in (word, twin)
    tied[0, 1] = word + twin - expected[0, 1]
    worse[0, 1] = 42
    assert same_but_for_ties(model, expected, tied, pixel_values, **settings) == 1
    with pytest.raises(AssertionError, match=r"caption 0 of stock scores .*\s+stock \[.*\s+ours  \["):
        same_but_for_ties(model, expected, worse, pixel_values, **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_tokens_on_a_gpu_are_those_of_stock(build, num_beams):
    model = build(1, end_bias=4).cuda()
    pixel_values = images(model, 9).cuda()
    settings = {"num_beams": num_beams, "max_new_tokens": 20, "no_repeat_ngram_size": 2}
    expected, found = model.generate(pixel_values, **settings), decode(model, pixel_values, **settings)
    assert same_but_for_ties(model, expected, found, pixel_values, **settings) <= 1


# --- What it costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_an_image_leaves_the_batch_when_it_is_finished(build, decoded, num_beams, early_stopping):
    stock = build(1, end_bias=6)
    model = copy.deepcopy(stock)
    settings = {"num_beams": num_beams, "max_new_tokens": 20}
    settings |= {"early_stopping": early_stopping} if num_beams > 1 else {}
    pixel_values = images(model, 9)
    alone, stock_steps = [], []
    stock.text_decoder.bert.register_forward_hook(lambda *_: stock_steps.append(1))
    for image in pixel_values:
        decoded.clear()
        stock_steps.clear()
        decode(model, image[None], **settings)
        stock.generate(image[None], **settings)
        alone.append(len(decoded))
        assert len(decoded) == len(stock_steps)
    decoded.clear()
    decode(model, pixel_values, **settings)
    assert sum(number for number, _ in decoded) == sum(alone) < 9 * max(alone)
    assert len(decoded) == max(alone)
    assert {rows for _, rows in decoded[1:]} == {num_beams}


@torch.no_grad()
def test_an_image_is_projected_once_for_scoring_and_all_beams(captioner):
    captioner.adapt(fast=True)
    batch, shapes = make_batch(captioner.model, number=3), []
    layers = captioner.model.text_decoder.bert.encoder.layer
    for layer in layers:
        for linear in (layer.crossattention.self.key, layer.crossattention.self.value):
            linear.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    config = GenerationConfig(num_beams=5, max_new_tokens=6)
    encoded = captioner.encode_images(batch)
    captioner.caption_nll(encoded, batch)
    captions = captioner.generate(encoded, config)
    assert shapes == [(3, 17)] * 2 * len(layers)
    assert torch.equal(captioner.generate(encoded, config), captions), "the first call has changed the encoded images"


def test_projected_images_are_used_up_by_one_call(build):
    decoder = build(1).text_decoder
    with pytest.raises(ValueError, match="3 prompts for 0 images; call project_images before each call"):
        decoder.generate(torch.full((3, 1), 2), custom_generate=decode_captions, cross_attention=[], max_new_tokens=6)


# --- Packed weights -------------------------------------------------------------------------------------------


def packed_names(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("num_rows", [1, 6, 48, 600])
def test_packed_weights_multiply_any_number_of_rows_as_the_plain_do(build, num_rows):
    model = build(1).text_decoder
    head, hidden = model.cls, torch.randn(2, num_rows, model.config.hidden_size)
    with torch.no_grad():
        expected = head(hidden)
        with packed_weights(caption_layers(model)):
            found = head(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_layers_take_any_bias_and_have_gradients():
    linear, inputs = torch.nn.Linear(24, 40), torch.randn(7, 24)
    linear.bias = torch.nn.Parameter(torch.randn(80)[::2])
    empty = torch.nn.Linear(24, 0)
    expected = linear(inputs)
    with packed_weights([linear, empty]):
        with torch.no_grad():
            torch.testing.assert_close(linear(inputs), expected, rtol=1e-5, atol=1e-5)
        linear(inputs).sum().backward()
    torch.testing.assert_close(linear.weight.grad, inputs.sum(dim=0).expand(40, -1))


def test_an_evaluation_packs_what_captions_pass_and_leaves_nothing_behind(captioner):
    model = captioner.model
    before, linears = model.state_dict(), {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    with captioner.evaluation():
        assert not packed_names(model), "stock BLIP stays as it is"
    captioner.adapt(fast=True)
    of_images = ("crossattention.self.key", "crossattention.self.value")
    with pytest.raises(ZeroDivisionError), captioner.evaluation():
        packed = packed_names(model)
        1 / 0  # noqa: B018
    assert packed == {name for name in linears if not name.startswith("vision") and not name.endswith(of_images)}
    assert not packed_names(model)
    assert before.keys() == model.state_dict().keys()


@torch.no_grad()
def test_weights_that_change_between_two_evaluations_are_packed_again(captioner):
    captioner.adapt(fast=True)
    batch, config = make_batch(captioner.model), GenerationConfig(max_new_tokens=9)
    captions = []
    for _ in range(2):
        with captioner.evaluation():
            captions.append(captioner.generate(captioner.encode_images(batch), config))
        captioner.model.text_decoder.cls.predictions.decoder.weight.neg_()
    assert not torch.equal(*captions)


def test_a_forward_that_a_user_has_replaced_is_not_packed():
    linear = torch.nn.Linear(24, 40)
    linear.forward = lambda inputs: inputs
    with packed_weights([linear]):
        assert linear(1) == 1
    assert linear(1) == 1


def test_half_precision_is_not_packed_nor_anything_without_onednn(build, monkeypatch):
    model = build(1)
    with packed_weights(model.modules()):
        assert packed_names(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with packed_weights(model.modules()):
            assert not packed_names(model)
    with torch.autocast("cpu", torch.bfloat16), packed_weights(model.modules()):
        assert not packed_names(model)
    with packed_weights(model.bfloat16().modules()):
        assert not packed_names(model)


# --- The decoder ----------------------------------------------------------------------------------------------


def test_hidden_states_of_captions_are_those_of_stock(model, collator, splits):
    """All positions that are not padding, with captions of very different lengths in one batch."""
    batch = collator([splits["train"][i] for i in range(10)])
    stock = stock_copy(model).text_decoder
    image_embeds = model.vision_model(batch["pixel_values"]).last_hidden_state.detach()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = stock.bert(**inputs, encoder_hidden_states=image_embeds, is_decoder=True).last_hidden_state
        found = caption_hidden_states(
            model.text_decoder, project_images(model.text_decoder, image_embeds), batch["input_ids"]
        )
    real = batch["attention_mask"].bool()
    assert 0 < real.sum() < real.numel()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
