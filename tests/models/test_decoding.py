"""The fast path decodes the tokens of stock `generate`, and each image only until its own caption is finished."""

import contextlib
import copy
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import make_batch, stock_copy
from processes import server
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig

from captioning.data.images import open_image
from captioning.models.captioner import DrawTokens, WatchTokens
from captioning.models.fast_blip import decoder as decoders
from captioning.models.fast_blip.decoder import CaptionDecoder, FixedShapeDecoder, project_images
from captioning.models.fast_blip.decoding import can_decode, decode_captions
from captioning.models.fast_blip.packed_weights import packed_weights


@pytest.fixture(scope="module")
def build(build_model):
    """Return a function from a seed to a tiny stock BLIP, whose captions end the sooner the larger `end_bias`.

    In float64, where rounding does not decide between two captions that score alike in float32.
    """

    def build_biased(seed, end_bias=0.0):
        model = build_model(seed).double()
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
    return stock_copy(model).eval().double(), batch | {"pixel_values": batch["pixel_values"].double()}


def decode(model, pixel_values, prompt=None, **settings):
    """Decode on the fast path, each image with its own prompt `[B, T]`, which ends in `[SEP]` as in stock."""
    text, decoder = model.config.text_config, model.text_decoder
    with torch.no_grad():
        cross_attention = project_images(decoder, model.vision_model(pixel_values).last_hidden_state)
    settings = {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id} | settings
    settings |= {"custom_generate": decode_captions, "cross_attention": cross_attention}
    return decoder.generate(start_of(model, pixel_values, prompt), **settings)


def start_of(model, pixel_values, prompt=None):
    shape = (len(pixel_values), 1)
    start = torch.full(shape, model.config.text_config.bos_token_id, device=pixel_values.device)
    return start if prompt is None else torch.cat([start, prompt[:, 1:-1]], dim=1)


def text_decoded(model, pixel_values, prompt=None, **settings):
    """Decode as stock does, by settings that `generate` of the whole model would replace."""
    embeds = model.vision_model(pixel_values).last_hidden_state.detach()
    start = start_of(model, pixel_values, prompt)
    return model.text_decoder.generate(start, encoder_hidden_states=embeds, **settings)


@pytest.fixture(params=[CaptionDecoder, FixedShapeDecoder])
def both(request, monkeypatch):
    """Run a test with the decoder of CPUs and with that of GPUs, on the CPU."""
    monkeypatch.setattr(decoders, "FIXED_SHAPE_ON", {"cpu"} if request.param is FixedShapeDecoder else set())
    return request.param


@pytest.fixture
def decoded(monkeypatch):
    """The shapes `[images, rows]` of the tokens that each call of a `CaptionDecoder` gets."""
    shapes, call = [], CaptionDecoder.__call__

    def record(self, tokens, positions, visible):
        shapes.append(tuple(tokens.shape))
        return call(self, tokens, positions, visible)

    monkeypatch.setattr(CaptionDecoder, "__call__", record)
    return shapes


def images(model, number, seed=0):
    side = model.config.vision_config.image_size
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=model.dtype)


def caption_lengths(tokens, model):
    is_end = tokens == model.config.text_config.sep_token_id
    return [row.index(True) if any(row) else len(row) for row in is_end.tolist()]


def draw_settings(draw: random.Random, beams: int | None = None) -> dict:
    """Decode settings as a user might combine them; half of the time each is left alone."""
    beams = beams or draw.choice([1, 2, 3, 5])
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


@pytest.mark.parametrize(
    "seeds", [range(24), pytest.param(range(24, 96), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_tokens_are_those_of_stock_for_any_settings(build, decoded, seeds, both):
    """Random models, images, prompts and settings; the sample holds the cases in which the two could part."""
    various = left_early = ran_on = 0
    for seed in seeds:
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
        assert torch.equal(decode(model, pixel_values, prompt, **settings), expected), (seed, settings)
        various += len(set(caption_lengths(expected, model))) > 1
        left_early += decoded[-1][0] < batch
        ran_on += len(decoded) > expected.shape[1] - (1 if prompt is None else prompt.shape[1] - 1)
    assert various > len(seeds) / 4, "hardly a batch has captions of different lengths"
    if both is FixedShapeDecoder:
        assert not left_early and ran_on > len(seeds) / 8, "hardly a batch is finished between two looks"
    else:
        assert left_early > len(seeds) / 4, "hardly a batch has images that finish before others"


@pytest.mark.parametrize("prompted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tokens_of_a_trained_model_are_those_of_stock(trained, prompted, both):
    model, batch = trained
    pixel_values = batch["pixel_values"]
    prompt = batch["input_ids"][:, :5] if prompted else None  # each image has its own
    plain = model.generate(pixel_values, max_new_tokens=40)
    assert len(set(map(tuple, plain.tolist()))) > 8, "captions are not distinct"
    assert (plain == model.config.text_config.sep_token_id).any(dim=1).all(), "captions do not end by themselves"
    for seed, beams in enumerate((1, 2, 3, 5)):
        settings = draw_settings(random.Random(seed), beams) | {"max_new_tokens": 40}
        expected = model.generate(pixel_values, copy.copy(prompt), **settings)
        assert torch.equal(decode(model, pixel_values, prompt, **settings), expected), settings


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
def test_less_usual_settings_mean_what_they_mean_in_stock(build, settings, num_beams, both):
    model, pixel_values = build(1, end_bias=4), images(build(1), 6)
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 3, "num_beams": num_beams} | settings
    torch.manual_seed(0)
    prompt = torch.randint(5, 100, (6, 3))
    expected = text_decoded(model, pixel_values, prompt, **settings)
    assert torch.equal(decode(model, pixel_values, prompt, **settings), expected)


@pytest.mark.parametrize("stopping", [False, True, "never"])
def test_one_search_serves_all_length_penalties(build, decoded, stopping, both):
    model, penalties = build(1, end_bias=4), [-2.0, 0.0, 1.0, 4.0]
    settings = {"num_beams": 3, "max_new_tokens": 20, "early_stopping": stopping}
    pixel_values = images(model, 9)
    shared = decode(model, pixel_values, length_penalties=penalties, **settings).split(9)
    num_steps, texts = len(decoded), set()
    for penalty, tokens in zip(penalties, shared, strict=True):
        own = decode(model, pixel_values, length_penalty=penalty, **settings)
        assert torch.equal(tokens[:, : own.shape[1]], own) and (tokens[:, own.shape[1] :] == 3).all()  # [SEP]
        texts.add(str(own.tolist()))
    assert len(texts) > 1 and num_steps < (len(decoded) - num_steps) / 2


def test_beams_go_on_where_all_of_the_likeliest_tokens_are_ends(build, both):
    model, ends = build(1, end_bias=8), [3, 9, 11]
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[ends[1:]] += 8
    settings = {"eos_token_id": ends, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
    settings |= {"early_stopping": "never", "length_penalty": 4.0, "pad_token_id": 0}
    pixel_values = images(model, 6)
    assert torch.equal(decode(model, pixel_values, **settings), text_decoded(model, pixel_values, **settings))


@pytest.mark.parametrize(
    "setting", [{"do_sample": True}, {"encoder_repetition_penalty": 1.5}, {"bad_words_ids": [[9]]}]
)
def test_settings_that_are_not_tested_here_are_left_to_stock(setting):
    assert not can_decode(GenerationConfig(max_new_tokens=9, **setting))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_tokens_on_a_gpu_are_those_of_stock(build, num_beams):
    model = build(1, end_bias=4).cuda()
    pixel_values = images(model, 9).cuda()
    settings = {"num_beams": num_beams, "max_new_tokens": 20, "no_repeat_ngram_size": 2}
    assert torch.equal(decode(model, pixel_values, **settings), model.generate(pixel_values, **settings))


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
def test_an_image_is_projected_once_for_scoring_and_all_beams(captioner, both):
    captioner.adapt(fast=True)
    batch, shapes = make_batch(captioner.model, number=3), []
    layers = captioner.model.text_decoder.bert.encoder.layer
    for layer in layers:
        for linear in (layer.crossattention.self.key, layer.crossattention.self.value):
            linear.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    config = GenerationConfig(num_beams=5, max_new_tokens=6)
    encoded = captioner.encode_images(batch)
    nll = captioner.caption_nll(encoded, batch)
    captions = captioner.generate(encoded, config)
    assert shapes == [(3, 17)] * 2 * len(layers)
    assert torch.equal(captioner.caption_nll(encoded, batch), nll)
    assert torch.equal(captioner.generate(encoded, config), captions), "the first call has changed the encoded images"


class Waits(TorchDispatchMode):
    """Counts the operations for which the CPU would wait for a GPU: a value, or a shape, depends on its results.

    A bool index is one: it calls `nonzero`. So is a tensor of Python's numbers, which is copied to the GPU.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []
        self.reads = _Reads(self.found)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.NAMES or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.append(name)
        return func(*args, **kwargs or {})


class _Reads(TorchFunctionMode):
    """Finds what a CPU's tensors are read by without an operation."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.found.append(func.__name__)
        return func(*args, **kwargs or {})


def num_waits(model, pixel_values, **settings):
    waits = Waits()
    with waits, waits.reads:
        decode(model, pixel_values, eos_token_id=None, **settings)
    return waits.found


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "suppress_tokens": [7, 9]},
        {"num_beams": 2, "length_penalties": [-1.0, 1.0, 2.0]},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_gpu_is_waited_for_once_in_eight_tokens(build, settings, monkeypatch):
    """Captions that never end: 24 tokens more are three looks more, and nothing else is waited for."""
    monkeypatch.setattr(decoders, "FIXED_SHAPE_ON", {"cpu"})
    model, found = build(1), []
    for length in (10, 34):
        if "do_sample" in settings:
            draw = DrawTokens(GenerationConfig(temperature=0.9, top_k=40, top_p=0.85), torch.rand(9, length))
            settings = settings | {"logits_processor": [draw]}
        found.append(num_waits(model, images(model, 3), max_new_tokens=length, **settings))
    assert FixedShapeDecoder.look_every == 8
    assert len(found[1]) - len(found[0]) == 3, [sorted(names) for names in found]


def test_waits_are_counted(build, monkeypatch):
    """The decoder of CPUs looks at each token; a processor that reads its tokens is seen."""
    model, pixel_values = build(1), images(build(1), 3)
    grown = [len(num_waits(model, pixel_values, max_new_tokens=length)) for length in (10, 34)]
    assert grown[1] - grown[0] >= 24
    monkeypatch.setattr(decoders, "FIXED_SHAPE_ON", {"cpu"})
    shown = num_waits(model, pixel_values, max_new_tokens=10, logits_processor=[WatchTokens(torch.Tensor.tolist)])
    assert shown.count("tolist") == 9


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_step_of_fixed_shape_reads_and_writes_the_same_tensors_each_time(build, num_beams, monkeypatch):
    """What a CUDA graph repeats: no shape and no address changes from step to step but those of the logits."""
    monkeypatch.setattr(decoders, "FIXED_SHAPE_ON", {"cpu"})
    step, seen = FixedShapeDecoder._step, []

    def record(self):
        state = [self.tokens, self.parents, self.visible, self.position, self.slots]
        state += [tensor for tensors in (*self.cache, *self.cross_attention) for tensor in tensors]
        seen.append([(tensor.data_ptr(), tensor.shape) for tensor in state])
        return step(self)

    monkeypatch.setattr(FixedShapeDecoder, "_step", record)
    model = build(1, end_bias=6)
    decode(model, images(model, 9), num_beams=num_beams, max_new_tokens=20)
    assert len(seen) > 4 and all(found == seen[0] for found in seen)


class Graph:
    """Plays a `torch.cuda.CUDAGraph`: what is captured is not done until it is replayed, on the same memory."""

    def __init__(self):
        self.calls, self.before, self.replays = [], [], 0

    def pool(self):
        return 1

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        self.mode = Recorder(self)
        self.mode.__enter__()

    def capture_end(self):
        self.mode.__exit__(None, None, None)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, made in self.calls:
            found = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(made), tree_leaves(found), strict=True):
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func.overloadpacket.__name__ not in Waits.NAMES, "a recording must not wait"
        written = [arg for arg, of in zip(args, func._schema.arguments, strict=False) if of.alias_info and of.is_write]
        self.graph.before += [(tensor, tensor.clone()) for tensor in written]
        made = func(*args, **kwargs)
        is_view = any(output.alias_info for output in func._schema.returns) and not func._schema.is_mutable
        if not is_view:  # a view stays one when its base changes
            self.graph.calls.append((func, args, kwargs, made))
        return made


@pytest.fixture
def graphs(monkeypatch):
    """Let the decoder of GPUs record its steps on the CPU; the graphs that it records."""
    made = []

    def make():
        made.append(Graph())
        return made[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = {"Stream": lambda _: stream, "current_stream": lambda _: stream, "CUDAGraph": make}
    cuda["stream"] = lambda stream: contextlib.nullcontext()
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(decoders, "FIXED_SHAPE_ON", {"cpu"})
    monkeypatch.setattr(decoders, "GRAPHS_ON", {"cpu"})
    monkeypatch.setattr(FixedShapeDecoder, "_last", {})
    return made


@pytest.mark.parametrize("settings", [{"num_beams": 1}, {"num_beams": 3, "no_repeat_ngram_size": 2}])
def test_recorded_steps_write_the_tokens_of_stock(build, decoded, graphs, settings):
    model = build(1, end_bias=5)
    for seed, number in ((0, 9), (1, 9), (2, 4)):
        pixel_values = images(model, number, seed)
        expected = model.generate(pixel_values, max_new_tokens=20, **settings)
        decoded.clear()
        assert torch.equal(decode(model, pixel_values, max_new_tokens=20, **settings), expected)
        assert len(decoded) == 3, "the prompt, the first step, and the recording of the second"
    assert len(graphs) == 3 and all(graph.replays > 3 for graph in graphs)


@pytest.mark.parametrize(("value", "devices"), [("0", "set()"), ("1", "{'cuda'}")])
def test_recordings_can_be_switched_off(value, devices):
    code = "import importlib; from captioning.models.fast_blip import decoder; importlib.reload(decoder)"
    done = server().run(["-c", f"{code}; print(decoder.GRAPHS_ON)"], environment={"CUDA_GRAPHS": value})
    assert done.stdout.strip() == devices


def test_a_recording_that_runs_out_of_memory_is_made_again_when_pytorch_has_freed_its_own(build, graphs, monkeypatch):
    freed, step, calls = [], FixedShapeDecoder._step, []

    def fail_once(self):
        calls.append(self)
        if len(calls) == 2:  # the first is not recorded
            raise torch.OutOfMemoryError
        return step(self)

    monkeypatch.setattr(FixedShapeDecoder, "_step", fail_once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(calls)))
    model, settings = build(1), {"num_beams": 3, "max_new_tokens": 12}
    pixel_values = images(model, 3)
    assert torch.equal(decode(model, pixel_values, **settings), model.generate(pixel_values, **settings))
    assert freed == [2] and len(graphs) == 2


def test_slots_that_are_not_written_yet_may_hold_anything(build, monkeypatch):
    monkeypatch.setattr(decoders, "FIXED_SHAPE_ON", {"cpu"})
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan")))
    model, settings = build(1), {"num_beams": 3, "max_new_tokens": 12}
    pixel_values = images(model, 3)
    assert torch.equal(decode(model, pixel_values, **settings), model.generate(pixel_values, **settings))


@torch.no_grad()
def test_samples_are_those_of_stock(captioner, both):
    batch = make_batch(captioner.model, number=4)
    config = GenerationConfig(do_sample=True, temperature=0.9, top_k=40, top_p=0.85)
    uniforms, found = torch.rand(4, 3, 20, generator=torch.Generator().manual_seed(0)), []
    for fast in (True, False):
        captioner.adapt(fast=fast)
        found.append(captioner.sample(captioner.encode_images(batch), config, uniforms))
    assert torch.equal(*found) and len(set(map(str, found[0].tolist()))) == 4


# --- Packed weights -------------------------------------------------------------------------------------------


def packed_names(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("num_rows", [1, 6, 48, 600])
def test_packed_weights_multiply_any_number_of_rows_as_the_plain_do(model, num_rows):
    head, hidden = model.text_decoder.cls, torch.randn(2, num_rows, 32)
    expected = head(hidden)
    with torch.no_grad(), packed_weights(model.text_decoder):
        found = head(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_layers_have_gradients(model):
    linear, inputs = model.text_decoder.cls.predictions.decoder, torch.randn(7, 32)
    with packed_weights(model.text_decoder):
        linear(inputs).sum().backward()
    torch.testing.assert_close(linear.weight.grad, inputs.sum(dim=0).expand(linear.weight.shape))


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


def test_half_precision_and_replaced_forwards_are_not_packed_nor_anything_without_onednn(model, monkeypatch):
    decoder = model.text_decoder
    replaced = decoder.cls.predictions.decoder
    replaced.forward = lambda inputs: inputs
    with packed_weights(decoder):
        assert len(packed_names(decoder)) > 1 and replaced(1) == 1
    assert replaced(1) == 1
    del replaced.forward
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with packed_weights(decoder):
            assert not packed_names(decoder)
    with torch.autocast("cpu", torch.bfloat16), packed_weights(decoder):
        assert not packed_names(decoder)
    with packed_weights(decoder.bfloat16()):
        assert not packed_names(decoder)


# --- The decoder ----------------------------------------------------------------------------------------------


def test_hidden_states_of_captions_are_those_of_stock(model, collator, splits, both):
    """All positions that are not padding, with captions of very different lengths in one batch."""
    batch = collator([splits["train"][i] for i in range(10)])
    stock = stock_copy(model).text_decoder
    image_embeds = model.vision_model(batch["pixel_values"]).last_hidden_state.detach()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = stock.bert(**inputs, encoder_hidden_states=image_embeds, is_decoder=True).last_hidden_state
        projected = project_images(model.text_decoder, image_embeds)
        found = both(model.text_decoder, projected, batch["input_ids"].shape[1]).read(batch["input_ids"])
    real = batch["attention_mask"].bool()
    assert 0 < real.sum() < real.numel()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
