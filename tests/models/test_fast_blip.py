"""The fast path computes what stock BLIP does, and gets on with whatever a user does to a model."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY_CONFIG, assert_same, loss_and_gradients, make_batch, stock_copy
from torch.profiler import ProfilerActivity, profile
from transformers import BlipForConditionalGeneration
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from captioning.models import blip
from captioning.models.fast_blip import modules
from captioning.models.fast_blip.modules import is_fast, use_fast_blip, use_stock_blip


ATTENTIONS = (BlipAttention, BlipTextSelfAttention)


@pytest.fixture
def fast(model):
    return use_fast_blip(copy.deepcopy(model))


@pytest.fixture
def said(caplog):
    """Return a function to the messages that fast BLIP has logged so far in the test."""
    modules._say_once.cache_clear()
    caplog.set_level("WARNING", logger="captioning.fast_blip")
    return lambda: [record.message for record in caplog.records if record.name == "captioning.fast_blip"]


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
def test_loss_and_gradients_are_those_of_stock(tiny_blip, config_file, seed, label_smoothing, batch):
    model, _ = blip.build_blip(str(config_file), tiny_blip[1].tokenizer, seed)
    blip.set_label_smoothing(model, label_smoothing)
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


@pytest.mark.parametrize("crosses", [False, True], ids=["text", "cross"])
def test_a_mask_hides_from_the_text_attention_what_it_hides_in_stock(model, fast, crosses):
    """The module by itself: stock's layers (transformers 5.23) lose a mask over the image on the way to it."""
    torch.manual_seed(0)
    inputs = {"hidden_states": torch.randn(2, 6, 32)}
    inputs |= {"encoder_hidden_states": torch.randn(2, 9, 32)} if crosses else {}
    mask = torch.zeros(2, 1, 1, 9 if crosses else 6)
    mask[0, ..., 3:] = mask[1, ..., :2] = torch.finfo(mask.dtype).min
    masked = {"encoder_attention_mask" if crosses else "attention_mask": mask}
    attentions = [
        getattr(each.text_decoder.bert.encoder.layer[0], "crossattention" if crosses else "attention").self
        for each in (model, fast)
    ]
    expected, found = (attention(**inputs, **masked)[0] for attention in attentions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attentions[0](**inputs)[0], expected, atol=0.1)


@pytest.mark.parametrize("other", [{"reduction": "none"}, {"return_logits": True}, {"return_dict": False}])
def test_other_losses_of_the_text_decoder_are_those_of_stock(model, fast, other):
    batch = make_batch(model)
    image_embeds = model.vision_model(batch.pop("pixel_values")).last_hidden_state.detach()
    expected, found = (m.text_decoder(**batch, encoder_hidden_states=image_embeds, **other) for m in (model, fast))
    assert type(found) is type(expected)
    if other == {"reduction": "none"}:
        expected, found = expected.loss, found.loss
    elif other == {"return_dict": False}:
        expected, found = expected[0], found[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_image_sizes_are_interpolated_as_in_stock(model, fast):
    batch = make_batch(model, side=48)
    expected = loss_and_gradients(model, batch, interpolate_pos_encoding=True)
    assert_same(loss_and_gradients(fast, batch, interpolate_pos_encoding=True), expected)
    settings = {"interpolate_pos_encoding": True, "max_new_tokens": 12, "num_beams": 3}
    captions = model.generate(batch["pixel_values"], **settings)
    assert torch.equal(fast.generate(batch["pixel_values"], **settings), captions)


def test_bfloat16_is_as_far_from_float32_as_it_is_in_stock(tiny_blip, config_file):
    """By autocast: logits and gradients stray by the rounding, and by about as much as stock's stray."""
    strays = {"logits": [[], []], "gradients": [[], []]}
    for seed in range(6):
        model, _ = blip.build_blip(str(config_file), tiny_blip[1].tokenizer, seed)
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


@torch.no_grad()
def rotate_heads(model, seed):
    """Turn queries and keys of each attention alike: the products stay what they are, their rounding does not."""
    torch.manual_seed(seed)
    for attention in [module for module in model.modules() if isinstance(module, ATTENTIONS)]:
        size = attention.head_dim if isinstance(attention, BlipAttention) else attention.attention_head_size
        turn = torch.linalg.qr(torch.randn(size, size))[0]
        if isinstance(attention, BlipAttention):
            width = 2 * attention.embed_dim
            parts = [attention.qkv.weight[:width], attention.qkv.bias[:width]]
        else:
            parts = [p for linear in (attention.query, attention.key) for p in (linear.weight, linear.bias)]
        for part in parts:
            heads = part.view(-1, size, *part.shape[1:])
            part.copy_(torch.einsum("ij,hj...->hi...", turn, heads).reshape(part.shape))
    return model


def test_the_loss_in_bfloat16_differs_from_stock_as_two_stock_runs_do(tiny_blip, config_file):
    """The second run of stock is of the same function with other roundings; on a CPU other batches have the same."""
    between_stock, ours = [], []
    for seed in range(12):
        model, _ = blip.build_blip(str(config_file), tiny_blip[1].tokenizer, seed)
        batch = make_batch(model, seed, number=8)
        rotated = rotate_heads(copy.deepcopy(model), seed)
        with torch.no_grad():
            torch.testing.assert_close(rotated(**batch).loss, model(**batch).loss, rtol=1e-5, atol=0)
            with torch.autocast("cpu", torch.bfloat16):
                stock, other = model(**batch).loss, rotated(**batch).loss
                loss = use_fast_blip(copy.deepcopy(model))(**batch).loss
        between_stock.append(abs(float(other - stock)))
        ours.append(abs(float(loss - stock)))
    assert 0 < sum(ours) < 2 * sum(between_stock), (ours, between_stock)


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


def test_attention_maps_are_not_kept_and_two_thirds_of_the_memory_suffice(tiny_blip, tmp_path):
    config = copy.deepcopy(TINY_CONFIG)
    size = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config["vision_config"] |= size | {"image_size": 96, "num_hidden_layers": 4}
    config["text_config"] |= size
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = blip.build_blip(str(tmp_path / "config.json"), tiny_blip[1].tokenizer, seed=0)
    batch, tokens = make_batch(model, number=4), 1 + (96 // 8) ** 2
    fast = use_fast_blip(copy.deepcopy(model))
    for path, has_maps in ((model, True), (fast, False)):
        assert any(shape[-2:] == (tokens, tokens) for shape in kept_shapes(path.train(), batch)) == has_maps
    model(**batch), fast(**batch)  # what is made once and kept is not counted
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


def test_a_frozen_vision_model_gets_no_gradient_and_the_decoder_those_of_stock(model, fast):
    batch = make_batch(model)
    for each in (model, fast):
        each.train().vision_model.requires_grad_(False)
    found, expected = loss_and_gradients(fast, batch), loss_and_gradients(model, batch)
    assert_same(found, expected)
    assert found[1] and not any(name.startswith("vision_model") for name in found[1])


def test_a_frozen_decoder_passes_gradients_on_to_the_vision_model(model, fast):
    batch = make_batch(model)
    for each in (model, fast):
        each.train().text_decoder.requires_grad_(False)
    found, expected = loss_and_gradients(fast, batch), loss_and_gradients(model, batch)
    assert_same(found, expected)
    assert found[1] and all(name.startswith("vision_model") for name in found[1])


def test_a_compiled_model_has_the_same_loss_and_gradients(model, fast):
    batch = make_batch(model)
    expected = loss_and_gradients(model.train(), batch)
    torch._dynamo.reset()
    fast.train()
    compiled = torch.compile(fast, backend="aot_eager")
    loss = compiled(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in fast.named_parameters()}
    torch._dynamo.reset()
    assert_same((loss.detach(), gradients), expected)


DDP = """
import sys
import torch
from torch.multiprocessing import start_processes
from transformers import BlipForConditionalGeneration
from captioning.models.fast_blip.modules import use_fast_blip


def run(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = use_fast_blip(BlipForConditionalGeneration.from_pretrained(folder)).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    batch = {name: tensor[3 * rank : 3 * rank + 3] for name, tensor in torch.load(f"{folder}/batch.pt").items()}
    parallel(**batch).loss.backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradients_{rank}.pt")
    torch.distributed.destroy_process_group()


start_processes(run, args=(sys.argv[1],), nprocs=2, start_method="fork")  # the imports are what takes time
"""


def test_two_processes_average_the_gradients_of_their_halves(model, tmp_path):
    batch = make_batch(model, number=6)
    halves = [{name: tensor[start : start + 3] for name, tensor in batch.items()} for start in (0, 3)]
    (_, one), (_, other) = (loss_and_gradients(model.train(), half) for half in halves)
    expected = {name: (one[name] + other[name]) / 2 for name in one}
    model.save_pretrained(tmp_path)
    torch.save(batch, tmp_path / "batch.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", DDP, str(tmp_path)], env=environment, check=True, timeout=120)
    for rank in range(2):
        gradients = torch.load(tmp_path / f"gradients_{rank}.pt")
        assert_same((torch.tensor(0.0), gradients), (torch.tensor(0.0), expected))


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


@pytest.mark.parametrize("kind", ["vision", "text", "cross"])
@torch.no_grad()
def test_attention_dropout_keeps_the_mean_and_strays_as_in_stock(model, fast, kind):
    """Over many masks the mean of an attention's outputs is what it is without dropout, their spread stock's."""
    number, random = 4000, torch.Generator().manual_seed(0)
    hidden, image = torch.randn(1, 6, 32, generator=random), torch.randn(1, 9, 32, generator=random)
    inputs = {"hidden_states": hidden.expand(number, -1, -1)}
    if kind == "text":
        inputs["attention_mask"] = torch.full((1, 1, 6, 6), -1e9).triu(1).expand(number, -1, -1, -1)
    if kind == "cross":
        inputs["encoder_hidden_states"] = image.expand(number, -1, -1)
    outputs = []
    for each in (model, fast):
        layer = each.text_decoder.bert.encoder.layer[0]
        attention = {
            "vision": each.vision_model.encoder.layers[0].self_attn,
            "text": layer.attention.self,
            "cross": layer.crossattention.self,
        }[kind]
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
    """Tell whether no attention of the model computes its weights for `batch`."""
    weights = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, outputs: weights.append(outputs[1]))
        for module in model.modules()
        if isinstance(module, ATTENTIONS)
    ]
    with torch.no_grad():  # hooks have the text in rows, and gradients through a mask are stock's
        model(**batch)
    for hook in hooks:
        hook.remove()
    assert len(weights) == 2 + 2 * 2
    return all(each is None for each in weights)


@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
def test_attention_weights_can_be_had_and_the_next_call_is_fast_again(model, fast, said, by_config):
    batch = make_batch(model)
    text_inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    image_embeds = model.vision_model(batch["pixel_values"]).last_hidden_state.detach()
    assert returns_no_weights(fast, batch)
    assert not returns_no_weights(model, batch)
    assert not said()

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
    assert said() == ["Fast BLIP: attention weights are asked for: stock eager attention computes them"]
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


def test_hidden_states_can_be_had_without_giving_up_speed(model, fast, said):
    batch = make_batch(model)
    text_inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    image_embeds = model.vision_model(batch["pixel_values"]).last_hidden_state.detach()
    expected, found = (
        each.text_decoder(**text_inputs, encoder_hidden_states=image_embeds, output_hidden_states=True).hidden_states
        for each in (model, fast)
    )
    assert len(found) == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected, found = (each(**batch, output_hidden_states=True).hidden_states for each in (model, fast))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not said()
