"""The concept head learns from the forward pass of the caption, and stock loads the captioner as if it had none."""

import copy

import pytest
import torch
from families import save_tiny
from helpers import make_batch, make_noise, save_captioner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from captioning.errors import UserError
from captioning.hub.repository import MODEL_FILES
from captioning.models.concept_head import CONFIG_FILE, WEIGHTS_FILE, ConceptHead
from captioning.models.load import load_captioner
from captioning.models.lora import add_lora


CONCEPTS = ["C0000001", "C0000002", "C0000003"]


def add_head(captioner, num_features):
    head = ConceptHead(num_features, CONCEPTS, {"C0000002": "Zyste, größer"}, [0.25, 0.5, 0.75])
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    captioner.concept_head = head
    return captioner.concept_head


@pytest.fixture
def head(captioner):
    return add_head(captioner, 32)


@pytest.mark.parametrize(("fast", "checkpointing"), [(True, False), (False, False), (True, True), (False, True)])
def test_gradients_are_those_of_a_plain_computation(captioner, head, fast, checkpointing):
    captioner.adapt(fast=fast)
    if checkpointing:
        captioner.model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    batch, labels = make_batch(captioner.model), torch.eye(3)[[0, 1, 2, 0, 1]]
    plain = copy.deepcopy(captioner.model).eval()
    outputs, logits = captioner.forward_with_concepts(captioner.model, batch)
    (outputs.loss + torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)).backward()
    patches = plain.vision_model(batch["pixel_values"]).last_hidden_state[:, 1:].mean(dim=1)
    patches = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = patches @ plain.concept_head.weight.T + plain.concept_head.bias
    log_likelihood = labels * expected.sigmoid().log() + (1 - labels) * (-expected).sigmoid().log()
    (plain(**batch).loss - log_likelihood.mean()).backward()
    torch.testing.assert_close(logits, expected)
    for (name, found), value in zip(captioner.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, value.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "blip-2-t5", "git", "vit-gpt2"])
def test_features_come_from_the_forward_pass_of_the_caption(family, tmp_path):
    captioner = load_captioner(str(save_tiny(family, tmp_path)))
    images, rows = [make_noise(1), make_noise(2)], captioner.tokenize(["a cyst", "no mass"], 20)[0]
    batch = captioner.collate(images, rows)
    with torch.no_grad():
        features = captioner.image_features(captioner.encode_images(batch))
    head, calls = add_head(captioner, features.shape[1]), []
    captioner.vision_model.register_forward_hook(lambda *args: calls.append(1))
    alone = captioner.forward(captioner.model, batch).loss
    num_calls = len(calls)
    outputs, logits = captioner.forward_with_concepts(captioner.model, batch)
    assert len(calls) == 2 * num_calls > 0, "an image is encoded twice"
    torch.testing.assert_close(outputs.loss, alone)
    expected = torch.from_numpy(head.probabilities(features.numpy())).logit()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits[0].sum().backward()
    assert any(value.grad is not None and value.grad.any() for value in captioner.vision_model.parameters())
    assert head.weight.grad.any()
    assert not captioner.model._forward_hooks, "a hook is left behind"


def test_an_adapter_leaves_the_head_of_its_model_to_learn(captioner, head, tmp_path):
    add_lora(captioner, str(tmp_path), None, target_modules=["query"])
    assert captioner.concept_head is head and head.weight.requires_grad and head.bias.requires_grad


@pytest.mark.parametrize("family", ["blip", "llava"])
def test_stock_loads_the_captioner_alone(family, captioner, tmp_path):
    """As the Trainer saves it, and though a head is a part of the model."""
    if family != "blip":
        captioner = load_captioner(str(save_tiny(family, tmp_path / "start")))
    before, config, saved = captioner.model.state_dict(), captioner.config.to_json_string(), tmp_path / "saved"
    head = add_head(captioner, 32)
    assert captioner.model.state_dict().keys() == before.keys()
    assert captioner.config.to_json_string() == config
    save_captioner(captioner, saved)
    head.save(saved)
    assert not any("concept" in name for name in load_file(saved / "model.safetensors"))
    stock, loading = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not any(loading.values()), loading
    weights = stock.state_dict()
    assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in before)
    loaded = load_captioner(str(saved)).concept_head
    assert (loaded.concepts, loaded.names, loaded.thresholds) == (head.concepts, head.names, head.thresholds)
    assert torch.equal(loaded.weight, head.weight) and torch.equal(loaded.bias, head.bias)
    assert '"Zyste, größer"' in (saved / CONFIG_FILE).read_text(encoding="utf-8")
    assert {CONFIG_FILE, WEIGHTS_FILE} <= set(MODEL_FILES), "not pushed"


def test_a_model_without_a_head_has_none(captioner, head, tmp_path):
    captioner.concept_head = None
    assert load_captioner(str(save_captioner(captioner, tmp_path))).concept_head is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CONFIG_FILE, b'{"concepts": [{"cui": 1}]}', "its concept head cannot be read"),
        (CONFIG_FILE, b'{"concepts": []}', "its weight is NaN or of another head"),
        (WEIGHTS_FILE, b"half", "its concept head cannot be read"),
        (WEIGHTS_FILE, {"weight": torch.full((3, 32), torch.nan)}, "NaN or"),
        (WEIGHTS_FILE, {"weight": torch.ones(2, 32)}, "of another head"),
    ],
)
def test_a_damaged_head_is_a_mistake_of_one_line(captioner, head, tmp_path, file, content, message):
    head.save(save_captioner(captioner, tmp_path))
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        save_file(load_file(tmp_path / file) | content, tmp_path / file)
    with pytest.raises(UserError, match=message) as error:
        load_captioner(str(tmp_path))
    assert "\n" not in str(error.value)
