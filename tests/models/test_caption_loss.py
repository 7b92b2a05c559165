"""Captions are packed without their padding where that is the same, and left in rows where it is not."""

import copy

import pytest
import torch
from helpers import assert_same, loss_and_gradients, make_batch
from transformers.models.blip.modeling_blip_text import BlipTextOutput, BlipTextSelfAttention

from captioning.models import blip
from captioning.models.fast_blip.caption_loss import Packing
from captioning.models.fast_blip.modules import use_fast_blip


@pytest.fixture
def fast(model):
    return use_fast_blip(copy.deepcopy(model))


def decoded_shapes(model, batch, **kwargs) -> list[tuple[int, ...]]:
    """Return the shape `[B, L]` or `[1, N]` of the positions that the decoder's layers compute for a batch."""
    shapes = []
    forward = BlipTextOutput.forward

    def seen(self, hidden_states, input_tensor):
        shapes.append(tuple(hidden_states.shape[:2]))
        return forward(self, hidden_states, input_tensor)

    with pytest.MonkeyPatch.context() as patch:  # of the class: a hook would have the captions left in rows
        patch.setattr(BlipTextOutput, "forward", seen)
        model(**batch, **kwargs).loss.backward()
    return shapes[:1]


def test_only_what_a_label_depends_on_is_computed_and_the_logits_of_labels_alone(model, fast):
    batch = make_batch(model, number=8, length=20, prompt_length=3)
    labels = batch["labels"] != -100
    # Of a caption of T tokens the last predicts nothing
    assert decoded_shapes(fast, batch) == [(1, int(batch["attention_mask"].sum()) - 8)]
    assert decoded_shapes(model, batch) == [(8, 20)]
    assert fast(**batch).logits.shape == (int(labels.sum()), model.config.text_config.vocab_size)


def test_a_packing_takes_each_row_up_to_its_last_label_and_brings_it_back():
    labels = torch.full((4, 7), -100)
    labels[0, 2:4] = 5
    labels[1, 6] = 5  # and none before
    labels[3, 0] = 5  # which nothing predicts
    packing = Packing.of(labels, None)
    assert (packing.batch_size, packing.width) == (4, 6)
    assert packing.index.tolist() == [0, 1, 2, *range(6, 12)]
    assert packing.has_label.tolist() == [False, True, True, *[False] * 5, True]
    rows = torch.arange(1.0, 4 * 6 * 2 + 1).view(4, 6, 2)
    packed = packing.pack(rows)
    assert packed.shape == (1, 9, 2)
    expected = torch.zeros_like(rows)
    expected[0, :3], expected[1] = rows[0, :3], rows[1]
    assert torch.equal(packing.unpack(packed), expected)


@pytest.mark.parametrize("seed", range(6))
def test_any_labels_have_the_loss_and_gradients_of_stock(model, fast, seed):
    """Labels with holes, rows without any, padding inside a caption and captions that go on behind their labels."""
    batch = make_batch(model, seed, number=6, length=12)
    random = torch.Generator().manual_seed(seed)
    batch["labels"][torch.rand(6, 12, generator=random) < 0.4] = -100
    batch["labels"][seed % 6] = -100
    batch["input_ids"][(seed + 1) % 6, 2] = model.config.text_config.pad_token_id
    expected = loss_and_gradients(model.train(), batch)
    assert_same(loss_and_gradients(fast.train(), batch), expected)
    assert len(decoded_shapes(fast, batch)[0]) == 2 and decoded_shapes(fast, batch)[0][0] == 1, "it is not packed"


def test_two_losses_before_one_backward_pass_and_a_pass_twice(model, fast):
    batches = [make_batch(model, seed) for seed in (1, 2)]
    gradients = []
    for each in (model.train(), fast.train()):
        each.zero_grad()
        first, second = (each(**batch).loss for batch in batches)
        (first + second).backward(retain_graph=True)
        second.backward()
        gradients.append((second.detach(), {name: p.grad for name, p in each.named_parameters()}))
    assert_same(gradients[1], gradients[0])


def test_dropout_of_attention_is_that_of_stock_in_the_mean(tiny_blip, config_file):
    """The mean loss over many draws: which weights fall out is another in each."""
    model, _ = blip.build_blip(str(config_file), tiny_blip[1].tokenizer, seed=3)
    for name, module in model.text_decoder.named_modules():
        if name.endswith("self"):
            module.dropout.p = 0.5
    batch = make_batch(model, number=8)
    means, errors = [], []
    with torch.no_grad():
        without = model.eval()(**batch).loss
        for each in (model.train(), use_fast_blip(copy.deepcopy(model)).train()):
            torch.manual_seed(0)
            losses = torch.stack([each(**batch).loss for _ in range(200)])
            assert losses.std() > 0, "nothing falls out"
            means.append(losses.mean())
            errors.append(losses.std() / len(losses) ** 0.5)
    distance = (means[1] - means[0]).abs()
    assert distance < 4 * torch.stack(errors).norm(), (means, errors)
    assert (means[0] - without).abs() > 3 * distance, "the measure does not see dropout"


# --- Left in rows ---------------------------------------------------------------------------------------------


def left_padded(batch):
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name][row] = batch[name][row].roll(len(batch[name][row]) - length)
    # All that is not padding learns, the first token too, as with the data collators of transformers
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def hidden_start(batch):
    """The first token learns, and sees nothing: its weights are equal in stock, whatever its scores."""
    mask = batch["attention_mask"].clone()
    mask[:, 0] = 0
    return batch | {"attention_mask": mask}


def all_hidden(batch):
    return batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}


def with_hole(batch):
    mask = batch["attention_mask"].clone()
    mask[:, 1] = 0
    return batch | {"attention_mask": mask}


def bidirectional(batch):
    number, length = batch["attention_mask"].shape
    return batch | {"attention_mask": torch.zeros(number, 1, length, length)}  # of four dimensions: added as it is


def by_type(dtype):
    """A mask of four dimensions is added to the scores, of whatever type it is."""

    def change(batch):
        number, length = batch["attention_mask"].shape
        return batch | {"attention_mask": torch.ones(number, 1, length, length).tril().to(dtype)}

    change.__name__ = str(dtype)
    return change


@pytest.mark.parametrize(
    "change",
    [left_padded, hidden_start, all_hidden, with_hole, bidirectional, by_type(torch.bool), by_type(torch.int64)],
)
def test_masks_that_hide_or_show_other_tokens_do_so_as_in_stock(model, fast, change):
    batch = make_batch(model)
    changed = change(batch)
    expected = loss_and_gradients(model.train(), changed)
    assert abs(model(**batch).loss - expected[0]) > 1e-5 * expected[0], "the mask changes nothing"
    assert_same(loss_and_gradients(fast.train(), changed), expected)
    assert decoded_shapes(fast, changed) == [tuple(batch["labels"].shape)]
    with torch.no_grad():
        torch.testing.assert_close(fast(**changed).loss, expected[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["hidden_states", "attentions", "cross_attentions"])
def test_states_and_attentions_are_in_rows_where_they_are_asked_for(model, fast, name):
    batch = make_batch(model)
    image_embeds = model.vision_model(batch.pop("pixel_values")).last_hidden_state.detach()
    asked = {"output_hidden_states" if name == "hidden_states" else "output_attentions": True}
    expected, found = (
        each.text_decoder(**batch, encoder_hidden_states=image_embeds, **asked) for each in (model, fast)
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_states_asked_for_by_the_configuration_are_in_rows_too(model, fast):
    batch = make_batch(model)
    image_embeds = model.vision_model(batch.pop("pixel_values")).last_hidden_state.detach()
    for each in (model, fast):
        each.text_decoder.config.output_hidden_states = True
    expected, found = (
        each.text_decoder(**batch, encoder_hidden_states=image_embeds).hidden_states for each in (model, fast)
    )
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def replaced_forward(bert, calls):
    forward = bert.forward
    bert.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)


@pytest.mark.parametrize(
    "hook",
    [
        lambda bert, calls: bert.register_forward_hook(lambda *_: calls.append(1)),
        lambda bert, calls: bert.register_forward_pre_hook(lambda *_: calls.append(1)),
        replaced_forward,
    ],
    ids=["behind", "before", "replaced"],
)
def test_hooks_of_the_text_model_are_called(model, fast, hook):
    batch, calls = make_batch(model), []
    hook(fast.text_decoder.bert, calls)
    expected = loss_and_gradients(model.train(), batch)
    assert_same(loss_and_gradients(fast.train(), batch), expected)
    assert calls == [1]


def test_embeddings_in_place_of_words_are_taken_as_in_stock(model, fast):
    batch = make_batch(model)
    image_embeds = model.vision_model(batch.pop("pixel_values")).last_hidden_state.detach()
    words = model.text_decoder.get_input_embeddings()(batch.pop("input_ids")).detach() + 0.1
    expected, found = (
        # A clone: stock adds the positions to what it is given
        each.text_decoder(**batch, inputs_embeds=words.clone(), encoder_hidden_states=image_embeds).loss
        for each in (model, fast)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def by_position(decoder, batch, images):
    return decoder(batch["input_ids"], batch["attention_mask"], None, None, images, None, batch["labels"])


@pytest.mark.parametrize(
    "call",
    [
        by_position,
        lambda decoder, batch, images: decoder(**batch, encoder_hidden_states=images, is_decoder=False),
        lambda decoder, batch, images: decoder(**batch, encoder_hidden_states=images, is_decoder=None),
        lambda decoder, batch, images: decoder(
            **batch, encoder_hidden_states=images, logits_to_keep=torch.arange(14).roll(5)
        ),
        lambda decoder, batch, images: decoder(
            input_ids=batch["input_ids"][:1], encoder_hidden_states=images, labels=batch["labels"]
        ),
        lambda decoder, batch, images: decoder(**batch),
    ],
    ids=["positional", "bidirectional", "none", "turned", "one caption", "imageless"],
)
def test_other_calls_of_the_text_decoder_are_those_of_stock(model, fast, call):
    batch = make_batch(model)
    image_embeds = model.vision_model(batch.pop("pixel_values")).last_hidden_state.detach()
    expected, found = (call(each.text_decoder, batch, image_embeds).loss for each in (model, fast))
    plain = model.text_decoder(**batch, encoder_hidden_states=image_embeds).loss
    assert (call is by_position) == torch.isclose(expected, plain, rtol=1e-5, atol=0), "it asks for nothing else"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_batch_without_a_label_has_no_loss_as_in_stock(model, fast):
    batch = make_batch(model)
    batch["labels"][:] = -100
    assert model(**batch).loss.isnan() and fast(**batch).loss.isnan()


class Doubled(torch.nn.Module):
    """An attention as an adapter wraps it: it knows masks only."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        assert attention_mask is None or isinstance(attention_mask, torch.Tensor)
        context, weights = self.attention(hidden_states, attention_mask, **kwargs)
        return 2 * context, weights


class Wrapped(torch.nn.Module):
    """A layer as others wrap it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return -self.layer(*args, **kwargs)


class Negative(BlipTextSelfAttention):
    def forward(self, *args, **kwargs):
        context, weights = super().forward(*args, **kwargs)
        return -context, weights


def double_attention(bert):
    bert.encoder.layer[1].attention.self = Doubled(bert.encoder.layer[1].attention.self)


def wrap_layer(bert):
    bert.encoder.layer[1] = Wrapped(bert.encoder.layer[1])


def subclass_attention(bert):
    attention = bert.encoder.layer[1].attention
    stock = attention.self
    attention.self = Negative(stock.config, is_cross_attention=False, layer_idx=stock.layer_idx)
    attention.self.load_state_dict(stock.state_dict())


def hook_layer(bert):
    """A hook that looks along a caption."""
    bert.encoder.layer[0].register_forward_hook(lambda module, inputs, output: output - output[:, :1])


def hook_attention(bert):
    bert.encoder.layer[0].crossattention.self.register_forward_hook(
        lambda module, inputs, output: (-output[0], output[1])
    )


def hook_embeddings(bert):
    """As NEFTune's, whose noise goes by the length of the caption."""
    bert.embeddings.word_embeddings.register_forward_hook(
        lambda module, inputs, output: output + torch.sin(output) / output.shape[1]
    )


def turn_positions(bert):
    bert.embeddings.position_ids = bert.embeddings.position_ids.flip(1)


def chunk(bert):
    bert.config.chunk_size_feed_forward = 7
    for layer in bert.encoder.layer:
        layer.chunk_size_feed_forward = 7


CHANGES = [
    double_attention, wrap_layer, subclass_attention, hook_layer, hook_attention, hook_embeddings, turn_positions,
    chunk,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_model_with_other_modules_or_hooks_learns_as_in_stock(model, fast, change):
    batch = make_batch(model)
    before = model(**batch).loss
    for each in (model, fast):
        change(each.text_decoder.bert)
    expected = loss_and_gradients(model, batch)
    assert change is chunk or abs(expected[0] - before) > 1e-4, "the change changes nothing"
    assert_same(loss_and_gradients(fast, batch), expected)


@pytest.mark.parametrize("change", CHANGES[:5])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_text_model_with_other_modules_or_hooks_captions_and_scores_as_in_stock(model, fast, change, num_beams):
    batch = make_batch(model)
    before = model.generate(batch["pixel_values"], max_new_tokens=12, num_beams=num_beams)
    for each in (model.eval(), fast.eval()):
        change(each.text_decoder.bert)
    expected = model.generate(batch["pixel_values"], max_new_tokens=12, num_beams=num_beams)
    assert not torch.equal(before, expected), "the change changes nothing"
    assert torch.equal(fast.generate(batch["pixel_values"], max_new_tokens=12, num_beams=num_beams), expected)
    is_label = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (1, 0))
    logits = []
    for each in (model, fast):
        with torch.no_grad(), blip.packed_for_evaluation(each):
            images = blip.encode_images(each, batch["pixel_values"])
            cross_attention = blip.cross_attention_of(each, images)
            texts = (batch["input_ids"], batch["attention_mask"])
            logits.append(blip.caption_logits(each, images, *texts, is_label, cross_attention))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_a_compiled_model_is_compiled_in_few_pieces_for_batches_of_any_padding(model, fast):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(fast.train(), backend="aot_eager")
    pieces = []
    for seed in range(4):
        compiled(**make_batch(model, seed)).loss.backward()
        pieces.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert 0 < pieces[-1] < 8, "the layers are not one piece"
    assert pieces[1:] == [pieces[1]] * 3, "each batch is compiled again"


def test_the_trainer_trains_on_packed_captions(make_trainer):
    trainer, shapes = make_trainer(num_train_epochs=1, per_device_train_batch_size=4), []
    use_fast_blip(trainer.model)
    forward = BlipTextOutput.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlipTextOutput, "forward", lambda *inputs: shapes.append(inputs[1].shape[0]) or forward(*inputs))
        trainer.train()
    in_training = shapes[: 6 * trainer.model.config.text_config.num_hidden_layers]
    assert set(in_training) == {1}, "captions are in rows"
