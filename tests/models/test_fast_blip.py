"""The fast path computes what stock BLIP does, also of a model that a user has changed, wrapped or compiled."""

import copy
import json
import pickle

import pytest
import torch
from helpers import TINY_CONFIG, assert_same, loss_and_gradients, make_batch, stock_copy
from torch.profiler import ProfilerActivity, profile
from transformers import BlipForConditionalGeneration, GenerationConfig
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from captioning.models.blip import BlipCaptioner
from captioning.models.fast_blip import modules
from captioning.models.fast_blip.modules import use_fast_blip, use_stock_blip


ATTENTIONS = (BlipAttention, BlipTextSelfAttention)


def is_fast(model):
    return type(model.text_decoder) is modules.FastTextDecoder


# --- Loss and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("label_smoothing", "batch"),
    [
        (0.0, {}),
        (0.1, {}),
        (0.0, {"prompt_length": 4}),
        (0.0, {"number": 1}),
        (0.1, {"prompt_length": 2, "number": 2}),
    ],
    ids=["padding", "smoothing", "prompt", "one", "all"],
)
def test_loss_and_gradients_are_those_of_stock(build_model, seed, label_smoothing, batch):
    model = build_model(seed)
    model.text_decoder.label_smoothing = label_smoothing
    batch = make_batch(model, seed, **batch)
    fast = use_fast_blip(copy.deepcopy(model)).train()
    expected = loss_and_gradients(model.train(), batch)
    assert_same(loss_and_gradients(fast, batch), expected)
    assert expected[1].keys() == dict(model.named_parameters()).keys()


def test_logits_are_those_of_the_labels_in_their_order(model, fast):
    batch = make_batch(model, prompt_length=3)
    expected = model(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]
    logits = fast(**batch).logits
    assert len(logits) < batch["input_ids"].numel() / 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    without = {name: batch[name] for name in batch.keys() - {"labels"}}
    torch.testing.assert_close(fast(**without).logits, model(**without).logits, rtol=1e-4, atol=1e-4)


def left_padded(batch):
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name][row] = batch[name][row].roll(len(batch[name][row]) - length)
    # All that is not padding is a target, the first token too, as with the data collators of transformers
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def hidden_start(batch):
    """The first token is a target that attends to nothing: in stock its attention weights are then all equal."""
    mask = batch["attention_mask"].clone()
    mask[:, 0] = 0
    return batch | {"attention_mask": mask}


def all_hidden(batch):
    return batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}


def bidirectional(batch):
    number, length = batch["attention_mask"].shape
    return batch | {"attention_mask": torch.zeros(number, 1, length, length)}  # of four dimensions: added as it is


@pytest.mark.parametrize("change", [left_padded, hidden_start, all_hidden, bidirectional])
def test_a_mask_hides_what_it_hides_in_stock(model, fast, change):
    batch = make_batch(model)
    changed = change(batch)
    expected = loss_and_gradients(model.train(), changed)
    assert abs(model(**batch).loss - expected[0]) > 1e-5 * expected[0], "the mask changes nothing"
    assert_same(loss_and_gradients(fast.train(), changed), expected)


def test_a_mask_over_the_image_is_obeyed_by_the_cross_attention(model, fast):
    """The module alone: stock's layers (transformers 5.23) lose such a mask on the way to it."""
    inputs = {"hidden_states": torch.randn(2, 6, 32), "encoder_hidden_states": torch.randn(2, 9, 32)}
    mask = torch.zeros(2, 1, 1, 9)
    mask[0, ..., 3:] = mask[1, ..., :2] = torch.finfo(mask.dtype).min
    attentions = [each.text_decoder.bert.encoder.layer[0].crossattention.self for each in (model, fast)]
    expected, found = (attention(**inputs, encoder_attention_mask=mask)[0] for attention in attentions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attentions[0](**inputs)[0], expected, atol=0.1)


def test_a_batch_without_a_target_has_no_loss_as_in_stock(model, fast):
    batch = make_batch(model)
    batch["labels"][:] = -100
    assert model(**batch).loss.isnan() and fast(**batch).loss.isnan()


def by_position(decoder, batch, images):
    return decoder(batch["input_ids"], batch["attention_mask"], None, None, images, None, batch["labels"]).loss


@pytest.mark.parametrize(
    "call",
    [
        by_position,
        lambda decoder, batch, images: decoder(**batch, encoder_hidden_states=images, is_decoder=False).loss,
        lambda decoder, batch, images: (
            decoder(**batch, encoder_hidden_states=images, logits_to_keep=torch.arange(14).roll(5)).loss
        ),
        lambda decoder, batch, images: (
            decoder(input_ids=batch["input_ids"][:1], encoder_hidden_states=images, labels=batch["labels"]).loss
        ),
        lambda decoder, batch, images: decoder(**batch).loss,
        lambda decoder, batch, images: decoder(**batch, encoder_hidden_states=images, reduction="none").loss,
        lambda decoder, batch, images: decoder(**batch, encoder_hidden_states=images, return_logits=True),
        lambda decoder, batch, images: decoder(**batch, encoder_hidden_states=images, return_dict=False)[0],
    ],
    ids=["positional", "bidirectional", "turned", "one caption", "imageless", "sums", "logits", "tuple"],
)
def test_other_calls_of_the_text_decoder_are_those_of_stock(model, fast, call):
    batch = make_batch(model)
    image_embeds = model.vision_model(batch.pop("pixel_values")).last_hidden_state.detach()
    expected, found = (call(each.text_decoder, batch, image_embeds) for each in (model, fast))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_image_sizes_are_interpolated_as_in_stock(model, fast):
    batch = make_batch(model, side=48)
    expected = loss_and_gradients(model, batch, interpolate_pos_encoding=True)
    assert_same(loss_and_gradients(fast, batch, interpolate_pos_encoding=True), expected)
    settings = {"interpolate_pos_encoding": True, "max_new_tokens": 12, "num_beams": 3}
    captions = model.generate(batch["pixel_values"], **settings)
    assert torch.equal(fast.generate(batch["pixel_values"], **settings), captions)


def test_bfloat16_is_as_far_from_float32_as_it_is_in_stock(build_model):
    """By autocast: logits and gradients stray by the rounding, and by about as much as stock's stray."""
    strays = {"logits": [[], []], "gradients": [[], []]}
    for seed in range(6):
        model = build_model(seed)
        batch = make_batch(model, seed)
        kept = batch["labels"][:, 1:] != -100
        exact = model(**batch).logits[:, :-1][kept]
        exact_gradients = loss_and_gradients(model, batch)[1]
        for path, tried in enumerate((model, use_fast_blip(copy.deepcopy(model)))):
            with torch.autocast("cpu", torch.bfloat16):
                logits = tried(**batch).logits
                _, gradients = loss_and_gradients(tried, batch)
            logits = logits if path else logits[:, :-1][kept]
            strays["logits"][path].append((logits.float() - exact).norm() / exact.norm())
            difference = [(gradients[name] - gradient).norm() for name, gradient in exact_gradients.items()]
            whole = torch.stack([gradient.norm() for gradient in exact_gradients.values()]).norm()
            strays["gradients"][path].append(torch.stack(difference).norm() / whole)
    for name, (stock, ours) in strays.items():
        stock, ours = torch.stack(stock).mean(), torch.stack(ours).mean()
        assert 1e-3 < ours < 1.2 * stock, f"{name}: stock {stock:.4f}, ours {ours:.4f}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loss_and_gradients_on_a_gpu_are_those_of_stock(model, fast):
    batch = {name: tensor.cuda() for name, tensor in make_batch(model).items()}
    assert_same(loss_and_gradients(fast.cuda().train(), batch), loss_and_gradients(model.cuda().train(), batch))


# --- What is kept for the backward pass -----------------------------------------------------------------------


def kept_bytes(model, batch) -> int:
    """Memory in bytes that a forward pass has allocated and not given back: what the backward pass needs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = model(**batch)  # noqa: F841
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def kept_shapes(model, batch) -> set[tuple[int, ...]]:
    shapes = set()

    def keep(tensor):
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return shapes


def test_attention_maps_are_not_kept_and_two_thirds_of_the_memory_suffice(processor, tmp_path):
    config = copy.deepcopy(TINY_CONFIG)
    size = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config["vision_config"] |= size | {"image_size": 96, "num_hidden_layers": 4}
    config["text_config"] |= size
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = BlipCaptioner.from_tokenizer(str(tmp_path / "config.json"), 0, processor.tokenizer).model
    batch, tokens = make_batch(model, number=4), 1 + (96 // 8) ** 2
    fast = use_fast_blip(copy.deepcopy(model))
    for path, has_maps in ((model, True), (fast, False)):
        assert any(shape[-2:] == (tokens, tokens) for shape in kept_shapes(path.train(), batch)) == has_maps
    model(**batch), fast(**batch)  # what is allocated once is not counted
    stock_bytes, fast_bytes = kept_bytes(model, batch), kept_bytes(fast, batch)
    assert stock_bytes > 4 * 4 * 4 * 2 * tokens**2 * 4, "the measure misses the attention maps of stock"
    assert 0 < fast_bytes < 0.65 * stock_bytes


# --- What users do to a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, fast, use_reentrant):
    batch = make_batch(model)
    expected = loss_and_gradients(model.train(), batch)
    fast.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    fast.vision_model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    assert_same(loss_and_gradients(fast, batch), expected)
    assert len(runs) == 2, "the layer is not run again"


@pytest.mark.parametrize(("frozen", "trained"), [("vision_model", "text_decoder"), ("text_decoder", "vision_model")])
def test_a_frozen_half_gets_no_gradient_and_the_other_that_of_stock(model, fast, frozen, trained):
    batch = make_batch(model)
    for each in (model, fast):
        getattr(each.train(), frozen).requires_grad_(False)
    found, expected = loss_and_gradients(fast, batch), loss_and_gradients(model, batch)
    assert_same(found, expected)
    assert {name.split(".")[0] for name in found[1]} == {trained}


def test_a_compiled_model_has_the_same_loss_and_gradients(model, fast):
    batch = make_batch(model)
    expected = loss_and_gradients(model.train(), batch)
    torch._dynamo.reset()
    fast.train()
    compiled = torch.compile(fast, backend="eager")
    loss = compiled(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in fast.named_parameters()}
    torch._dynamo.reset()
    assert_same((loss.detach(), gradients), expected)


def test_a_stock_model_reads_what_a_fast_one_saved(model, fast, tmp_path):
    fast.save_pretrained(tmp_path / "fast")
    model.save_pretrained(tmp_path / "stock")
    config, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("fast", "stock"))
    assert config == expected
    assert config["architectures"] == ["BlipForConditionalGeneration"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fast", "stock")]
    assert weights[0] == weights[1]
    loaded = BlipForConditionalGeneration.from_pretrained(tmp_path / "fast")
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    batch = make_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_copies_and_pickles_of_a_fast_model_are_fast(fast):
    batch = make_batch(fast)
    expected = fast(**batch).loss
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert is_fast(again)
        assert [type(module) for module in again.modules()] == [type(module) for module in fast.modules()]
        assert torch.equal(again(**batch).loss, expected)
        assert again.generate(batch["pixel_values"], max_new_tokens=4).shape == (5, 5)


def test_a_fast_model_is_all_fast_and_can_go_back_to_stock(model):
    stock = [type(module) for module in model.modules()]
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert not is_fast(model)
    assert use_fast_blip(model) is model
    assert is_fast(model)
    assert not {type(module) for module in model.modules()} & set(modules.STOCK_CLASSES.values())
    assert {type(module) for module in model.modules()} > set(modules.STOCK_CLASSES)
    assert use_stock_blip(model) is model
    assert not is_fast(model)
    assert [type(module) for module in model.modules()] == stock
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


def test_classes_that_others_gave_a_module_are_left_alone(model):
    class Adapted(BlipAttention):
        def forward(self, hidden_states, **kwargs):
            output, weights = super().forward(hidden_states, **kwargs)
            return output + 1.0, weights

    model.vision_model.encoder.layers[1].self_attn.__class__ = Adapted
    expected = stock_copy(model)(**make_batch(model)).loss
    for swap in (use_fast_blip, use_stock_blip):
        attention = swap(model).vision_model.encoder.layers[1].self_attn
        assert type(attention) is Adapted
        torch.testing.assert_close(model(**make_batch(model)).loss, expected, rtol=1e-5, atol=0)


# --- Attention dropout ----------------------------------------------------------------------------------------


def set_attention_dropout(model, p):
    for module in model.modules():
        if isinstance(module, ATTENTIONS):
            module.dropout.p = p
    return model


def test_attention_dropout_is_active_in_training_alone(model, fast):
    batch = make_batch(model)
    for each in (model, fast):
        set_attention_dropout(each, 0.3)
    assert_same(loss_and_gradients(fast.eval(), batch), loss_and_gradients(model.eval(), batch))
    for part in (fast.vision_model, fast.text_decoder):
        fast.eval()
        part.train()
        losses = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            losses.append(float(fast(**batch).loss.detach()))
        assert losses[0] == losses[2]
        assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("kind", ["vision", "cross"])
@torch.no_grad()
def test_attention_dropout_keeps_the_mean_and_has_the_spread_of_stock(model, fast, kind):
    """Over many masks the mean of an attention's outputs is what it is without dropout, their spread stock's."""
    number, random = 4000, torch.Generator().manual_seed(0)
    hidden, image = torch.randn(1, 6, 32, generator=random), torch.randn(1, 9, 32, generator=random)
    inputs = {"hidden_states": hidden.expand(number, -1, -1)}
    if kind == "cross":
        inputs["encoder_hidden_states"] = image.expand(number, -1, -1)
    outputs = []
    for each in (model, fast):
        attention = each.vision_model.encoder.layers[0].self_attn
        if kind == "cross":
            attention = each.text_decoder.bert.encoder.layer[0].crossattention.self
        attention.dropout.p = 0.4
        expected = attention.eval()(**inputs)[0][0]
        torch.manual_seed(3)
        outputs.append(attention.train()(**inputs)[0])
    stock, ours = outputs
    error = ours.std(dim=0) / number**0.5
    assert error.mean() < 0.03 * expected.abs().mean(), "too few masks to tell"
    assert ((ours.mean(dim=0) - expected).abs() < 5 * error + 1e-5).all()
    torch.testing.assert_close(ours.std(dim=0), stock.std(dim=0), rtol=0.15, atol=1e-3)


# --- Attention weights ----------------------------------------------------------------------------------------


def returns_no_weights(model, batch) -> bool:
    """Tell whether no attention to patches computes its weights for `batch`."""
    weights = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, outputs: weights.append(outputs[1]))
        for module in model.modules()
        if isinstance(module, ATTENTIONS)
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    assert len(weights) == 2 + 2 * 2
    return all(each is None for each in weights[:2] + weights[3::2])  # attention to text is stock's


@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
def test_attention_weights_can_be_had_and_the_next_call_is_fast_again(model, fast, by_config):
    batch = make_batch(model)
    text_inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    image_embeds = model.vision_model(batch["pixel_values"]).last_hidden_state.detach()
    assert returns_no_weights(fast, batch)
    assert not returns_no_weights(model, batch)

    asked = {} if by_config else {"output_attentions": True}
    results = []
    for each in (model, fast):
        for part in (each.vision_model, each.text_decoder.bert):
            part.config.output_attentions = by_config
        vision = each.vision_model(batch["pixel_values"], **asked)
        text = each.text_decoder(**text_inputs, encoder_hidden_states=image_embeds, **asked)
        whole = each(**batch, **asked)
        results.append((vision.attentions, text.attentions, text.cross_attentions, whole.attentions, whole.loss))
        for part in (each.vision_model, each.text_decoder.bert):
            part.config.output_attentions = False
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    vision, text, cross, whole, _ = results[1]
    assert [len(weights) for weights in (vision, text, cross, whole)] == [2] * 4
    assert [weights[0].shape[2:] for weights in (vision, text, cross)] == [(17, 17), (14, 14), (14, 17)]
    assert returns_no_weights(fast, batch)


class Lora(torch.nn.Module):
    """A low-rank adapter with dropout in the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.dropout = base, torch.nn.Dropout(0.5)
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, inputs):
        return self.base(inputs) + self.up(self.down(self.dropout(inputs)))


def test_dropout_of_an_adapter_in_the_mlp_is_one_in_both_passes(model, fast):
    batch = make_batch(model)
    torch.manual_seed(0)
    for layer in model.vision_model.encoder.layers:
        layer.mlp.fc2 = Lora(layer.mlp.fc2)
    fast = use_fast_blip(copy.deepcopy(model))
    found = []
    for each in (model.train(), fast.train()):
        torch.manual_seed(1)
        found.append(loss_and_gradients(each, batch))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("part", ["fc1", "activation_fn", "fc2"])
def test_hooks_inside_the_mlp_see_what_they_see_in_stock(model, fast, learns, part):
    batch, kept = make_batch(model), []
    for each in (model, fast):
        module, seen = getattr(each.vision_model.encoder.layers[0].mlp, part), []
        module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        with torch.set_grad_enabled(learns):
            loss = each(**batch).loss
        if learns:
            loss.backward()
        kept.append(seen)
    assert len(kept[0]) == 1
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
def test_hidden_states_can_be_had(model, fast, by_config):
    batch = make_batch(model)
    text_inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    image_embeds = model.vision_model(batch["pixel_values"]).last_hidden_state.detach()
    found = []
    for each in (model, fast):
        each.text_decoder.config.output_hidden_states = by_config
        asked = {} if by_config else {"output_hidden_states": True}
        text = each.text_decoder(**text_inputs, encoder_hidden_states=image_embeds, **asked).hidden_states
        found.append((text, each(**batch, output_hidden_states=True).hidden_states))
    assert len(found[1][0]) == 3
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


# --- Text models that others have changed ---------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """A layer as others wrap it: none of its parts can be reached by name."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return -self.layer(*args, **kwargs)


class Negative(BlipTextSelfAttention):
    def forward(self, *args, **kwargs):
        context, weights = super().forward(*args, **kwargs)
        return -context, weights


def wrap_layer(bert):
    bert.encoder.layer[1] = Wrapped(bert.encoder.layer[1])


def subclass_attention(bert):
    attention = bert.encoder.layer[1].attention
    stock = attention.self
    attention.self = Negative(stock.config, is_cross_attention=False, layer_idx=stock.layer_idx)
    attention.self.load_state_dict(stock.state_dict())


def replace_forward(bert):
    forward = bert.encoder.layer[1].forward
    bert.encoder.layer[1].forward = lambda *args, **kwargs: -forward(*args, **kwargs)


def hook_layer(bert):
    """A hook that looks along a caption."""
    bert.encoder.layer[0].register_forward_hook(lambda module, inputs, output: output - output[:, :1])


def hook_before_attention(bert):
    bert.encoder.layer[0].crossattention.self.register_forward_pre_hook(
        lambda module, inputs: (-inputs[0], *inputs[1:])
    )


CHANGES = [wrap_layer, subclass_attention, replace_forward, hook_layer, hook_before_attention]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_text_model_is_trained_as_in_stock(model, fast, change):
    batch = make_batch(model)
    before = model(**batch).loss
    for each in (model, fast):
        change(each.text_decoder.bert)
    expected = loss_and_gradients(model, batch)
    assert abs(expected[0] - before) > 1e-4, "the change changes nothing"
    assert_same(loss_and_gradients(fast, batch), expected)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_changed_text_model_captions_and_scores_as_in_stock(captioner, change, num_beams):
    """An evaluation goes around the layers only where they are those of transformers."""
    config = GenerationConfig(max_new_tokens=12, num_beams=num_beams)
    batch = make_batch(captioner.model)

    def evaluate(captioner, fast):
        captioner = copy.deepcopy(captioner)
        captioner.adapt(fast=fast)
        with torch.no_grad(), captioner.evaluation():
            encoded = captioner.encode_images(batch)
            return captioner.caption_nll(encoded, batch), captioner.generate(encoded, config)

    _, before = evaluate(captioner, fast=False)
    change(captioner.model.text_decoder.bert)
    (expected_nll, expected), (nll, tokens) = (evaluate(captioner, fast) for fast in (False, True))
    assert not torch.equal(before, expected), "the change changes nothing"
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-4)


def test_generation_in_training_mode_has_the_dropout_of_stock(captioner):
    captions = []
    for module in captioner.model.text_decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    captioner.model.train()
    for fast in (False, True):
        captioner.adapt(fast=fast)
        torch.manual_seed(0)
        encoded = captioner.encode_images(make_batch(captioner.model))
        captions.append(captioner.generate(encoded, GenerationConfig(max_new_tokens=12)))
    assert torch.equal(*captions)
    captioner.model.eval()
    assert not torch.equal(captioner.generate(encoded, GenerationConfig(max_new_tokens=12)), captions[0])
