"""The fast path computes what stock BLIP does, also of a model that a user has changed, wrapped or compiled."""

import copy
import json
import pickle

import pytest
import torch
from helpers import TINY_CONFIG, assert_same, loss_and_gradients, make_batch, stock_copy
from transformers import BlipForConditionalGeneration, GenerationConfig
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from captioning.models.fast_blip import modules
from captioning.models.fast_blip.modules import use_fast_blip


# --- Loss and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch", [{}, {"prompt_length": 4}, {"number": 1}], ids=["padding", "prompt", "one"])
def test_loss_and_gradients_are_those_of_stock(model, label_smoothing, batch):
    model.text_decoder.label_smoothing = label_smoothing
    batch = make_batch(model, **batch)
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
    """All that is not padding is a target, the first token too, as with the data collators of transformers."""
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for name in ("input_ids", "attention_mask"):
            batch[name][row] = batch[name][row].roll(len(batch[name][row]) - length)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def hidden_start(batch):
    """The first token is a target that attends to nothing: in stock its attention weights are then all equal."""
    return batch | {"attention_mask": batch["attention_mask"].index_fill(1, torch.tensor(0), 0)}


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


def test_a_batch_without_a_target_has_no_loss_as_in_stock(model, fast):
    batch = make_batch(model)
    batch["labels"][:] = -100
    assert model(**batch).loss.isnan() and fast(**batch).loss.isnan()


def by_position(decoder, batch, images):
    return decoder(batch["input_ids"], batch["attention_mask"], None, None, images, None, batch["labels"]).loss


def with_settings(**settings):
    return lambda decoder, batch, images: decoder(**batch, encoder_hidden_states=images, **settings)[0]


@pytest.mark.parametrize(
    "call",
    [
        by_position,
        with_settings(is_decoder=False),
        with_settings(logits_to_keep=torch.arange(14).roll(5)),
        lambda decoder, batch, images: decoder(**batch).loss,
        with_settings(reduction="none"),
        with_settings(return_logits=True),
        with_settings(return_dict=False),
    ],
    ids=["positional", "bidirectional", "turned", "imageless", "sums", "logits", "tuple"],
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
    """By autocast: gradients stray by the rounding, and by about as much as stock's stray."""
    strays = [[], []]
    for seed in range(6):
        model = build_model(seed)
        batch = make_batch(model, seed)
        exact = flat_gradients(model, batch)
        for path, tried in enumerate((model, use_fast_blip(copy.deepcopy(model)))):
            with torch.autocast("cpu", torch.bfloat16):
                strays[path].append(((flat_gradients(tried, batch) - exact).norm() / exact.norm()).item())
    stock, ours = map(sum, strays)
    assert 6e-3 < ours < 1.2 * stock


def flat_gradients(model, batch):
    return torch.cat([gradient.flatten() for gradient in loss_and_gradients(model, batch)[1].values()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loss_and_gradients_on_a_gpu_are_those_of_stock(model, fast):
    batch = {name: tensor.cuda() for name, tensor in make_batch(model).items()}
    assert_same(loss_and_gradients(fast.cuda().train(), batch), loss_and_gradients(model.cuda().train(), batch))


# --- What is kept for the backward pass -----------------------------------------------------------------------


def kept_tensors(model, batch) -> tuple[set[tuple[int, ...]], int]:
    """Return the shapes of what the backward pass needs and its bytes, each storage once, parameters left out."""
    shapes, sizes = set(), {}

    def keep(tensor):
        shapes.add(tuple(tensor.shape))
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(**batch)  # noqa: F841 its graph keeps them
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return shapes, sum(size for pointer, size in sizes.items() if pointer not in parameters)


def test_attention_maps_are_not_kept_and_two_thirds_of_the_memory_suffice(build_model, tmp_path):
    config = copy.deepcopy(TINY_CONFIG)
    size = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config["vision_config"] |= size | {"image_size": 96, "num_hidden_layers": 4}
    config["text_config"] |= size
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_model(config=tmp_path / "config.json").train()
    batch, tokens = make_batch(model, number=4), 1 + (96 // 8) ** 2
    (stock_shapes, stock_bytes), (shapes, size) = (
        kept_tensors(each, batch) for each in (model, use_fast_blip(copy.deepcopy(model)))
    )
    assert any(shape[-2:] == (tokens, tokens) for shape in stock_shapes)
    assert not any(shape[-2:] == (tokens, tokens) for shape in shapes)
    assert size < 0.65 * stock_bytes


# --- What users do to a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, fast, use_reentrant):
    batch = make_batch(model)
    expected = loss_and_gradients(model.train(), batch)
    fast.train().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    fast.vision_model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    assert_same(loss_and_gradients(fast, batch), expected)
    assert len(runs) == 2, "the layer is not run again"


@pytest.mark.parametrize(("frozen", "trained"), [("vision_model", "text_decoder"), ("text_decoder", "vision_model")])
def test_a_frozen_half_gets_no_gradient_and_the_other_that_of_stock(model, fast, frozen, trained):
    for each in (model, fast):
        getattr(each.train(), frozen).requires_grad_(False)
    found, expected = (loss_and_gradients(each, make_batch(model)) for each in (fast, model))
    assert_same(found, expected)
    assert {name.split(".")[0] for name in found[1]} == {trained}


@pytest.mark.slow
def test_a_compiled_model_has_the_same_loss_and_gradients(model, fast):
    batch = make_batch(model)
    expected = loss_and_gradients(model.train(), batch)
    torch._dynamo.reset()
    loss = torch.compile(fast.train(), backend="eager")(**batch).loss
    loss.backward()
    torch._dynamo.reset()
    assert_same((loss.detach(), {name: p.grad for name, p in fast.named_parameters()}), expected)


def test_a_stock_model_reads_what_a_fast_one_saved(model, fast, tmp_path):
    fast.save_pretrained(tmp_path / "fast")
    model.save_pretrained(tmp_path / "stock")
    config, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("fast", "stock"))
    assert config == expected
    assert config["architectures"] == ["BlipForConditionalGeneration"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fast", "stock")]
    assert weights[0] == weights[1]
    loaded = BlipForConditionalGeneration.from_pretrained(tmp_path / "fast")
    assert torch.equal(loaded(**make_batch(model)).logits, model(**make_batch(model)).logits)


def module_types(model):
    return [type(module) for module in model.modules()]


def test_copies_and_pickles_of_a_fast_model_are_fast(fast):
    batch = make_batch(fast)
    expected = fast(**batch).loss
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert module_types(again) == module_types(fast)
        assert torch.equal(again(**batch).loss, expected)
        assert again.generate(batch["pixel_values"], max_new_tokens=4).shape == (5, 5)


def test_a_fast_model_is_all_fast_and_can_go_back_to_stock(model):
    stock = module_types(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert use_fast_blip(model) is model
    assert not {*module_types(model)} & {*modules.STOCK_CLASSES.values()}
    assert {*module_types(model)} > {*modules.STOCK_CLASSES}
    assert use_fast_blip(model, fast=False) is model
    assert module_types(model) == stock
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


def test_classes_that_others_gave_a_module_are_left_alone(model):
    class Shifted(BlipAttention):
        def forward(self, hidden_states, **kwargs):
            output, weights = super().forward(hidden_states, **kwargs)
            return output + 1.0, weights

    model.vision_model.encoder.layers[1].self_attn.__class__ = Shifted
    expected = stock_copy(model)(**make_batch(model)).loss
    for fast in (True, False):
        assert type(use_fast_blip(model, fast).vision_model.encoder.layers[1].self_attn) is Shifted
        torch.testing.assert_close(model(**make_batch(model)).loss, expected, rtol=1e-5, atol=0)


# --- Attention dropout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vision", "cross"])
@torch.no_grad()
def test_attention_dropout_keeps_the_mean_and_has_the_spread_of_stock(model, fast, kind):
    """Over many masks the mean of an attention's outputs is what it is in evaluation mode, their spread stock's."""
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
    """Tell whether no attention to patches computes its weights for `batch`; attention to text is stock's."""
    to_patches = [layer.self_attn for layer in model.vision_model.encoder.layers]
    to_patches += [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
    weights = []
    for module in to_patches:
        module.register_forward_hook(lambda module, inputs, outputs: weights.append(outputs[1]))
    model(**batch)
    assert len(weights) == 4
    return all(each is None for each in weights)


@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
@pytest.mark.parametrize("what", ["hidden_states", "attentions"])
def test_hidden_states_and_attention_weights_can_be_had(model, fast, what, by_config):
    batch = make_batch(model)
    text_inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    image_embeds = model.vision_model(batch["pixel_values"]).last_hidden_state.detach()
    asked = {} if by_config else {f"output_{what}": True}
    results = []
    for each in (model, fast):
        for part in (each.vision_model, each.text_decoder.bert):
            setattr(part.config, f"output_{what}", by_config)
        text = each.text_decoder(**text_inputs, encoder_hidden_states=image_embeds, **asked)
        vision, whole = each.vision_model(batch["pixel_values"], **asked), each(**batch, **asked)
        results.append((vision[what], text[what], text.cross_attentions, whole[what], whole.loss))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    vision, text, cross, whole, _ = results[1]
    if what == "hidden_states":
        assert [len(states) for states in (vision, text, whole)] == [3] * 3
    else:
        assert [len(weights) for weights in (vision, text, cross, whole)] == [2] * 4
        assert [weights[0].shape[2:] for weights in (vision, text, cross)] == [(17, 17), (14, 14), (14, 17)]


def test_attention_weights_are_computed_only_when_they_are_asked_for(model, fast):
    batch = make_batch(model)
    fast(**batch, output_attentions=True)
    assert returns_no_weights(fast, batch) and not returns_no_weights(model, batch)


class Adapted(torch.nn.Module):
    """A linear layer in the place of another, with dropout before it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.dropout = base, torch.nn.Dropout(0.5)

    def forward(self, inputs):
        return self.base(self.dropout(inputs))


def test_dropout_of_an_adapter_in_the_mlp_is_one_in_both_passes(model):
    for layer in model.vision_model.encoder.layers:
        layer.mlp.fc2 = Adapted(layer.mlp.fc2)
    found = []
    for each in (use_fast_blip(copy.deepcopy(model)).train(), model.train()):
        torch.manual_seed(1)
        found.append(loss_and_gradients(each, make_batch(model)))
    assert_same(*found)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("part", ["fc1", "activation_fn", "fc2"])
def test_hooks_inside_the_mlp_see_what_they_see_in_stock(model, fast, learns, part):
    kept = [], []
    for each, seen in zip((model, fast), kept, strict=True):
        module = getattr(each.vision_model.encoder.layers[0].mlp, part)
        module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        with torch.set_grad_enabled(learns):
            loss = each(**make_batch(model)).loss
        if learns:
            loss.backward()
    assert len(kept[0]) == 1
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-4, atol=1e-4)


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
    captions, config = [], GenerationConfig(max_new_tokens=12)
    for module in captioner.model.text_decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    captioner.model.train()
    for fast in (False, True):
        captioner.adapt(fast=fast)
        torch.manual_seed(0)
        encoded = captioner.encode_images(make_batch(captioner.model))
        captions.append(captioner.generate(encoded, config))
    assert torch.equal(*captions)
    captioner.model.eval()
    assert not torch.equal(captioner.generate(encoded, config), captions[0])
