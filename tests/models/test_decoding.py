"""Captions of the fast path are those of stock `generate`, token for token, and cost what each image needs alone."""

import copy
import itertools
import random

import pytest
import torch
from helpers import stock_copy
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer

from captioning.models import blip
from captioning.models.fast_blip import decoding, modules
from captioning.models.fast_blip.decoding import CaptionDecoder, caption_hidden_states, project_images
from captioning.models.fast_blip.modules import use_fast_blip
from captioning.models.fast_blip.packed_weights import caption_layers, packed_weights
from collator import CaptioningCollator


TIE = 1e-5  # two captions whose float64 scores, sums of natural logarithms, are closer than this are equally good


@pytest.fixture(scope="module")
def build(tiny_blip, config_file):
    """Return a function from a seed to a tiny stock BLIP, whose captions end the sooner the larger `end_bias`."""

    def build_biased(seed, end_bias=0.0):
        model, _ = blip.build_blip(str(config_file), tiny_blip[1].tokenizer, seed)
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[model.config.text_config.sep_token_id] += end_bias
        return model

    return build_biased


@pytest.fixture(scope="module")
def trained(tiny_blip, checked):
    """A stock model that has learnt 16 images by heart and its batch: captions differ and end by themselves."""
    model, processor = copy.deepcopy(tiny_blip)
    tokens = processor.tokenizer(checked["train"]["caption"][:16], truncation=True, max_length=64)["input_ids"]
    rows = [{"image": checked["train"][i]["image"], "input_ids": ids} for i, ids in enumerate(tokens)]
    batch = CaptioningCollator(processor, model.config.text_config.bos_token_id)(rows)
    use_fast_blip(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return stock_copy(model).eval(), batch


@pytest.fixture
def said(caplog):
    """Return a function to the messages that fast BLIP has logged so far in the test."""
    modules._say_once.cache_clear()
    caplog.set_level("WARNING", logger="captioning.fast_blip")
    return lambda: [record.message for record in caplog.records if record.name == "captioning.fast_blip"]


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
    """Return how good `captions` `[B, L]` of B images are in float64 by `settings`: what the search maximises.

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
    """Return how many captions of `found` differ from `expected`, all of them ties; fail on any that is no tie."""
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


def test_tokens_are_those_of_stock_for_any_settings(build, decoded, said):
    """Random models, images, prompts and settings; the sample holds the cases in which the two could part."""
    ties = captions = various = left_early = 0
    for seed in range(64):
        draw = random.Random(seed)
        model = build(seed % 16, end_bias=draw.choice([0, 3, 4, 5, 6]))
        fast = use_fast_blip(copy.deepcopy(model))
        batch, settings = draw.choice([1, 2, 5, 9, 9]), draw_settings(draw)
        pixel_values = images(model, batch, seed)
        prompt = None
        if draw.random() < 0.4:
            torch.manual_seed(seed)
            prompt = torch.randint(5, 100, (batch, draw.choice([2, 3, 6])))
        expected = model.generate(pixel_values, copy.copy(prompt), **settings)
        decoded.clear()
        found = fast.generate(pixel_values, copy.copy(prompt), **settings)
        ties += same_but_for_ties(model, expected, found, pixel_values, prompt, **settings)
        captions += len(expected)
        various += len(set(caption_lengths(expected, model))) > 1
        left_early += decoded[-1][0] < batch
    assert ties <= captions / 100
    assert various > 15, "hardly a batch has captions of different lengths"
    assert left_early > 15, "hardly a batch has images that finish before others"
    assert not said(), "usual settings go to stock"


@pytest.mark.parametrize("prompted", [False, True])
def test_tokens_of_a_trained_model_are_those_of_stock(trained, prompted):
    model, batch = trained
    fast = use_fast_blip(copy.deepcopy(model))
    pixel_values = batch["pixel_values"]
    prompt = batch["input_ids"][:, :5] if prompted else None  # each image has its own
    plain = model.generate(pixel_values, max_new_tokens=40)
    assert len(set(map(tuple, plain.tolist()))) > 8, "captions are not distinct"
    assert (plain == model.config.text_config.sep_token_id).any(dim=1).all(), "captions do not end by themselves"
    ties = captions = 0
    for seed, beams in itertools.product(range(5), (1, 2, 3, 5)):
        settings = draw_settings(random.Random(seed)) | {"num_beams": beams, "max_new_tokens": 40}
        settings.pop("num_return_sequences", None)
        if beams == 1:
            settings = {name: settings[name] for name in settings.keys() - {"length_penalty", "early_stopping"}}
        expected = model.generate(pixel_values, copy.copy(prompt), **settings)
        found = fast.generate(pixel_values, copy.copy(prompt), **settings)
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
        {"forced_eos_token_id": 3},
        {"suppress_tokens": [9, 12], "begin_suppress_tokens": [20]},
        {"bad_words_ids": [[9], [12, 20]]},
        {"sequence_bias": [[[14], 3.0], [[9, 12], -2.0]]},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"renormalize_logits": True, "repetition_penalty": 1.5},
        {"max_length": 11, "max_new_tokens": None, "min_length": 8},
        {"use_cache": False},
        {"temperature": 0.3},
        {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "encoder_no_repeat_ngram_size": 0},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_less_usual_settings_mean_what_they_mean_in_stock(build, said, settings, num_beams):
    model = build(1, end_bias=4)
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 3, "num_beams": num_beams} | settings
    torch.manual_seed(0)
    prompt = torch.randint(5, 100, (6, 3))
    image_embeds = model.vision_model(images(model, 6)).last_hidden_state.detach()
    expected = model.text_decoder.generate(prompt.clone(), encoder_hidden_states=image_embeds, **settings)
    fast = use_fast_blip(copy.deepcopy(model)).text_decoder
    assert torch.equal(fast.generate(prompt.clone(), encoder_hidden_states=image_embeds, **settings), expected)
    assert not said()


def test_beams_go_on_where_all_of_the_likeliest_tokens_are_ends(build):
    model = build(1, end_bias=8)
    ends = [3, 9, 11]
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[ends[1:]] += 8
    settings = {"eos_token_id": ends, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
    settings |= {"early_stopping": "never", "length_penalty": 4.0, "pad_token_id": 0}
    prompt = torch.full((6, 1), model.config.text_config.bos_token_id)
    image_embeds = model.vision_model(images(model, 6)).last_hidden_state.detach()
    expected = model.text_decoder.generate(prompt.clone(), encoder_hidden_states=image_embeds, **settings)
    fast = use_fast_blip(copy.deepcopy(model)).text_decoder
    assert torch.equal(fast.generate(prompt.clone(), encoder_hidden_states=image_embeds, **settings), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_settings_of_a_generation_config_are_obeyed(build, num_beams):
    model = build(1, end_bias=4)
    config = copy.deepcopy(model.text_decoder.generation_config)
    config.update(num_beams=num_beams, max_new_tokens=12, no_repeat_ngram_size=1, min_new_tokens=5)
    pixel_values = images(model, 6)
    expected = model.generate(pixel_values, generation_config=config)
    fast = use_fast_blip(copy.deepcopy(model))
    assert torch.equal(fast.generate(pixel_values, generation_config=config), expected)
    assert not torch.equal(model.generate(pixel_values, num_beams=num_beams, max_new_tokens=12), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_image_may_have_its_own_prompt(build, num_beams):
    model = build(2, end_bias=4)
    prompt = torch.randint(5, 100, (7, 6), generator=torch.Generator().manual_seed(2))
    settings = {"num_beams": num_beams, "max_new_tokens": 12}
    expected = model.generate(images(model, 7), prompt.clone(), **settings)
    fast = use_fast_blip(copy.deepcopy(model))
    assert torch.equal(fast.generate(images(model, 7), prompt.clone(), **settings), expected)
    assert torch.equal(expected[:, 1:5], prompt[:, 1:5])
    others = fast.generate(images(model, 7), prompt.roll(1, dims=0), **settings)
    assert not torch.equal(others[:, 5:], expected[:, 5:]), "the prompt makes no difference: nothing is tested"


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
    fast = use_fast_blip(copy.deepcopy(model))
    pixel_values = images(model, 9).cuda()
    settings = {"num_beams": num_beams, "max_new_tokens": 20, "no_repeat_ngram_size": 2}
    expected, found = model.generate(pixel_values, **settings), fast.generate(pixel_values, **settings)
    assert same_but_for_ties(model, expected, found, pixel_values, **settings) <= 1


# --- What it costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_an_image_leaves_the_batch_when_it_is_finished(build, decoded, num_beams, early_stopping):
    stock = build(1, end_bias=6)
    model = use_fast_blip(copy.deepcopy(stock))
    settings = {"num_beams": num_beams, "max_new_tokens": 20}
    settings |= {"early_stopping": early_stopping} if num_beams > 1 else {}
    pixel_values = images(model, 9)
    alone, stock_steps = [], []
    stock.text_decoder.bert.register_forward_hook(lambda *_: stock_steps.append(1))
    for image in pixel_values:
        decoded.clear()
        stock_steps.clear()
        model.generate(image[None], **settings)
        stock.generate(image[None], **settings)
        alone.append(len(decoded))
        assert len(decoded) == len(stock_steps)
    decoded.clear()
    model.generate(pixel_values, **settings)
    assert sum(number for number, _ in decoded) == sum(alone) < 9 * max(alone)
    assert len(decoded) == max(alone)
    assert {rows for _, rows in decoded[1:]} == {num_beams}


def test_an_image_is_projected_once_whatever_the_number_of_beams(build):
    model = use_fast_blip(build(1))
    shapes = []
    for layer in model.text_decoder.bert.encoder.layer:
        for linear in (layer.crossattention.self.key, layer.crossattention.self.value):
            linear.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    number = 2 * len(model.text_decoder.bert.encoder.layer)
    model.generate(images(model, 3), num_beams=5, max_new_tokens=6)
    assert shapes == [(3, 17)] * number
    shapes.clear()
    image_embeds = blip.encode_images(model, images(model, 3))
    cross_attention = blip.cross_attention_of(model, image_embeds)
    tokens = torch.full((3, 4), 9)
    labels = torch.ones(3, 4, dtype=torch.bool)
    blip.caption_logits(model, image_embeds, tokens, labels, labels, cross_attention)
    blip.generate_captions(model, image_embeds, [2], cross_attention, num_beams=5, max_new_tokens=6)
    assert shapes == [(3, 17)] * number, "scoring and generation do not share the projection"


def test_projected_images_are_used_up_by_one_call(build):
    model = use_fast_blip(build(1))
    image_embeds = blip.encode_images(model, images(model, 3))
    cross_attention = blip.cross_attention_of(model, image_embeds)
    blip.generate_captions(model, image_embeds, [2], cross_attention, num_beams=2, max_new_tokens=6)
    with pytest.raises(ValueError, match="3 prompts for 0 images; project_images is needed for each call"):
        blip.generate_captions(model, image_embeds, [2], cross_attention, num_beams=2, max_new_tokens=6)


# --- Packed weights -------------------------------------------------------------------------------------------


OF_IMAGES = ("crossattention.self.key", "crossattention.self.value")


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


def test_packed_layers_take_any_bias_and_leave_gradients_to_those_who_ask_for_them():
    linear, inputs = torch.nn.Linear(24, 40), torch.randn(7, 24)
    linear.bias = torch.nn.Parameter(torch.randn(80)[::2])
    empty = torch.nn.Linear(24, 0)
    expected = linear(inputs)
    with packed_weights([linear, empty]):
        with torch.no_grad():
            torch.testing.assert_close(linear(inputs), expected, rtol=1e-5, atol=1e-5)
        linear(inputs).sum().backward()  # as another thread does
    torch.testing.assert_close(linear.weight.grad, inputs.sum(dim=0).expand(40, -1))


def test_packed_layers_count_as_shipped_and_replaced_ones_do_not(build):
    linear = build(1).text_decoder.cls.predictions.decoder
    with packed_weights([linear]):
        assert modules._is_plain(linear)
    linear.forward = lambda inputs: inputs
    assert not modules._is_plain(linear)


def test_weights_that_are_packed_already_stay_so_to_the_end_of_the_outer_context(build):
    model = build(1)
    with packed_weights(caption_layers(model.text_decoder)):
        packed = packed_names(model)
        with packed_weights(model.modules()):
            assert packed < packed_names(model)
        assert packed and packed_names(model) == packed
    assert not packed_names(model)


def test_a_batch_is_decoded_by_packed_weights_that_leave_nothing_behind(build, monkeypatch):
    model = use_fast_blip(build(1, end_bias=-9))
    before, seen = model.state_dict(), []
    model.text_decoder.cls.register_forward_hook(lambda *_: seen.append(packed_names(model)))
    model.generate(images(model, 2), num_beams=3, max_new_tokens=16)
    packed = seen[0]
    linears = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert packed == {name for name in linears if not name.startswith("vision") and not name.endswith(OF_IMAGES)}
    assert not packed_names(model)
    assert before.keys() == model.state_dict().keys()

    with torch.no_grad():  # weights that change between two calls are packed again
        model.text_decoder.cls.predictions.decoder.weight.neg_()
    expected = stock_copy(model).generate(images(model, 2), num_beams=3, max_new_tokens=16)
    assert torch.equal(model.generate(images(model, 2), num_beams=3, max_new_tokens=16), expected)

    monkeypatch.setattr(decoding, "beam_search", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(images(model, 2), num_beams=3, max_new_tokens=16)
    assert not packed_names(model)


@pytest.mark.parametrize("settings", [{"num_beams": 2, "max_new_tokens": 16}, {"num_beams": 3, "max_new_tokens": 15}])
def test_few_rows_or_tokens_are_not_worth_packing(build, settings):
    model, seen = use_fast_blip(build(1, end_bias=-9)), []
    model.text_decoder.cls.register_forward_hook(lambda *_: seen.append(packed_names(model)))
    model.generate(images(model, 2), **settings)
    assert not set().union(*seen)


@pytest.mark.parametrize("is_amd", [False, True])
def test_an_evaluation_is_packed_whole_where_onednn_multiplies_images_faster_too(build, monkeypatch, is_amd):
    monkeypatch.setattr(blip, "_is_amd", lambda: is_amd)
    model = build(1)
    with blip.packed_for_evaluation(model):
        assert not packed_names(model), "stock BLIP stays as it is"
    with blip.packed_for_evaluation(use_fast_blip(model)):
        packed = packed_names(model)
    linears = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    of_captions = {name for name in linears if not name.startswith("vision") and not name.endswith(OF_IMAGES)}
    assert linears > of_captions > set()
    assert packed == (linears if is_amd else of_captions)
    assert not packed_names(model)


def test_half_precision_is_not_packed(build):
    model = build(1)
    with packed_weights(model.modules()):
        assert packed_names(model)
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


def three_steps(model, image_embeds, done):
    """Hidden states of the last of three steps of two beams, before which the images of `done` have left."""
    decoder = CaptionDecoder(model.text_decoder, project_images(model.text_decoder, image_embeds), num_slots=9)
    number, steps, visible = len(image_embeds), [], torch.ones(1, 3, 3, dtype=torch.bool).tril()
    tokens = torch.arange(10, 10 + 9 * number).view(number, 9)
    decoder(tokens[:, :3], 0, visible)
    first = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]], dtype=torch.bool)
    decoder(tokens[:, 3:5], 3, first[None])
    index = decoder.keep(done) if done is not None else torch.arange(number)
    second = torch.tensor([[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)  # the beams have crossed
    steps = decoder(tokens[index, 5:7], 4, second[None])
    assert len(steps) == len(index)
    return steps, index


@torch.no_grad()
def test_images_that_stay_keep_their_own_keys_whichever_leave(build):
    model = build(3)
    image_embeds = model.vision_model(images(model, 5)).last_hidden_state
    expected, _ = three_steps(model, image_embeds, None)
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    for pattern in itertools.product([False, True], repeat=5):
        done = torch.tensor(pattern)
        found, index = three_steps(model, image_embeds, done)
        assert sorted(index.tolist()) == (~done).nonzero()[:, 0].tolist()
        torch.testing.assert_close(found, expected[index], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_beam_sees_its_ancestors_and_no_other_beam(build):
    """The mask over shared slots gives what stock gives for each beam's own caption."""
    model = build(3)
    image_embeds = model.vision_model(images(model, 2)).last_hidden_state
    found, _ = three_steps(model, image_embeds, None)
    tokens = torch.arange(10, 10 + 9 * 2).view(2, 9)
    for beam, caption in enumerate(([0, 1, 2, 4, 5], [0, 1, 2, 3, 6])):
        expected = model.text_decoder.bert(
            tokens[:, caption], encoder_hidden_states=image_embeds, is_decoder=True
        ).last_hidden_state[:, -1]
        torch.testing.assert_close(found[:, beam], expected, atol=1e-5, rtol=1e-5)


# --- What is left to stock ------------------------------------------------------------------------------------


class NoNine(LogitsProcessor):
    """A user's own processor."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 9:60] = -float("inf")
        return scores


class Keep(BaseStreamer):
    """A user's own streamer."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.tokens.append("end")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True}, "the settings ask for sample"),
        ({"do_sample": True, "num_beams": 3}, "the settings ask for beam sample"),
        ({"logits_processor": LogitsProcessorList([NoNine()])}, "'logits_processor' is given"),
        ({"encoder_attention_mask": "half"}, "encoder_attention_mask hides positions"),
        ({"attention_mask": "half"}, "attention_mask hides positions"),
        ({"stopping_criteria": [lambda input_ids, scores: input_ids[:, -1] > 90]}, "'stopping_criteria' is given"),
        ({"prefix_allowed_tokens_fn": lambda image, tokens: [20 + image]}, "'prefix_allowed_tokens_fn' is given"),
        ({"encoder_no_repeat_ngram_size": 1}, "'encoder_no_repeat_ngram_size' is set"),
        ({"encoder_no_repeat_ngram_size": 2}, "'encoder_no_repeat_ngram_size' is set"),
        ({"encoder_repetition_penalty": 1.5}, "'encoder_repetition_penalty' is set"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_the_fast_path_cannot_do_is_left_to_stock_with_a_reason(build, said, decoded, settings, reason):
    model = build(1, end_bias=4)
    image_embeds = model.vision_model(images(model, 4)).last_hidden_state.detach()
    prompt = torch.randint(5, 100, (4, 4), generator=torch.Generator().manual_seed(0))
    masks = {"encoder_attention_mask": torch.ones(4, 17).long(), "attention_mask": torch.ones_like(prompt)}
    for name, mask in masks.items():
        if settings.get(name) == "half":
            mask[::2, : mask.shape[1] // 2] = 0
    settings = {"max_new_tokens": 12, "encoder_hidden_states": image_embeds} | settings | masks
    if "logits_processor" not in settings and "stopping_criteria" not in settings:
        settings.setdefault("num_beams", 3 if reason.endswith("positions") else 1)
    captions = []
    for text_decoder in (model.text_decoder, use_fast_blip(copy.deepcopy(model)).text_decoder):
        for _ in range(2):
            torch.manual_seed(0)
            captions.append(text_decoder.generate(prompt.clone(), **settings))
    assert all(torch.equal(captions[0], others) for others in captions)
    assert said() == [f"Fast BLIP: stock transformers generates: {reason}"], "it is said once"
    assert not decoded


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("setting", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_more_than_tokens_is_left_to_stock(build, said, setting, num_beams):
    model = build(1, end_bias=4)
    settings = {"num_beams": num_beams, "max_new_tokens": 6, "return_dict_in_generate": True, setting: True}
    pixel_values = images(model, 4)
    expected = model.generate(pixel_values, **settings)
    found = use_fast_blip(copy.deepcopy(model)).generate(pixel_values, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys() and len(found.keys()) > 2
    values = {"output_scores": "scores", "output_logits": "logits"}.get(setting, setting.removeprefix("output_"))
    torch.testing.assert_close(found[values], expected[values], atol=1e-4, rtol=1e-4)
    assert said()[0] == "Fast BLIP: stock transformers generates: 'return_dict_in_generate' is set"


def test_a_model_in_training_mode_is_left_to_stock_and_its_dropout(build, said):
    model = build(1)
    for module in model.text_decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    quiet = model.generate(images(model, 4), max_new_tokens=12)
    captions = []
    for trained in (model.train(), use_fast_blip(copy.deepcopy(model))):
        torch.manual_seed(0)
        captions.append(trained.generate(images(model, 4), max_new_tokens=12))
    assert torch.equal(*captions)
    assert not torch.equal(captions[0], quiet)
    assert said() == ["Fast BLIP: stock transformers generates: the model is in training mode"]


def test_a_streamer_is_left_to_stock(build, said):
    model = build(1, end_bias=4)
    streams = []
    for captioner in (model, use_fast_blip(copy.deepcopy(model))):
        streams.append(Keep())
        captioner.generate(images(model, 1), max_new_tokens=12, streamer=streams[-1])
    assert streams[0].tokens == streams[1].tokens
    assert streams[1].tokens[-1] == "end"
    assert said() == ["Fast BLIP: stock transformers generates: 'streamer' is given"]


def test_a_decoder_without_image_is_left_to_stock(build, said):
    model = build(1)
    prompt = torch.tensor([[2, 9, 14]])
    expected = model.text_decoder.generate(prompt, max_new_tokens=6)
    assert torch.equal(use_fast_blip(copy.deepcopy(model)).text_decoder.generate(prompt, max_new_tokens=6), expected)
    assert said() == ["Fast BLIP: stock transformers generates: there is no image"]


def test_captions_without_a_prompt_start_as_in_stock(build):
    """Called on the text decoder, without `input_ids`, which stock makes from its config."""
    model = build(1)
    image_embeds = model.vision_model(images(model, 3)).last_hidden_state.detach()
    captions = [
        text_decoder.generate(encoder_hidden_states=image_embeds, max_new_tokens=6)
        for text_decoder in (model.text_decoder, use_fast_blip(copy.deepcopy(model)).text_decoder)
    ]
    assert torch.equal(*captions)


def test_generation_asks_stock_for_its_rules_of_one_step():
    """What fast BLIP takes from transformers' private methods is still there, by the names that it calls."""
    names = (
        "_get_top_k_continuations",
        "_get_running_beams_for_next_iteration",
        "_update_finished_beams",
        "_check_early_stop_heuristic",
    )
    assert all(hasattr(decoding.BlipTextLMHeadModel, name) for name in names)
