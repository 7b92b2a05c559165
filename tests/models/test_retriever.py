"""A vision model in place of the captioner's features: its own pooled ones, of images in any mode and number."""

import numpy as np
import pytest
import torch
from families import RETRIEVERS, save_tiny, save_vision_model
from helpers import make_noise
from transformers import AutoModel, ViTForImageClassification, ViTMAEConfig, ViTMAEModel

from captioning.errors import UserError
from captioning.models import retriever as module
from captioning.models.retriever import Retriever


@pytest.mark.parametrize(("kind", "width"), [("vit", 32), ("clip", 16), ("resnet", 24)])
def test_features_are_the_pooled_ones_of_each_image_alone(kind, width, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    found = Retriever.from_pretrained(save_vision_model(tmp_path, kind))
    images = [make_noise(0), make_noise(1, mode="L"), make_noise(2, size=(31, 80))]
    features = found.features(iter(images))
    assert features.shape == (3, width) and features.dtype == np.float32
    stock = AutoModel.from_pretrained(tmp_path).eval()
    for image, own in zip(images, features, strict=True):
        pixels = found.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if kind == "clip":
                expected = stock.visual_projection(stock.vision_model(pixels).pooler_output)
            else:
                expected = stock(pixels).pooler_output
        assert own == pytest.approx(expected.flatten().numpy(), abs=1e-5)


def test_a_classifier_without_a_pooler_has_the_same_features_each_time_it_is_loaded(tmp_path):
    save_vision_model(tmp_path)
    ViTForImageClassification(RETRIEVERS["vit"]).save_pretrained(tmp_path)
    found, again = (Retriever.from_pretrained(str(tmp_path)) for _ in range(2))
    assert found.digest() == again.digest()
    pixels = found.processor(make_noise(0), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(tmp_path).eval().vit(pixels).last_hidden_state.mean(dim=1)
    assert found.features([make_noise(0)]) == pytest.approx(expected.numpy(), abs=1e-5)


def test_features_do_not_depend_on_the_precision_of_the_captioner_or_of_the_stored_weights(tmp_path):
    found = Retriever.from_pretrained(save_vision_model(tmp_path))
    expected = found.features([make_noise(0)])
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(found.features([make_noise(0)]), expected)
    AutoModel.from_pretrained(tmp_path).half().save_pretrained(tmp_path)
    half = Retriever.from_pretrained(str(tmp_path))
    assert half.model.dtype == torch.float32
    assert half.features([make_noise(0)]) == pytest.approx(expected, abs=1e-2)


def test_a_vision_model_with_weights_that_are_missing_or_nan_is_a_mistake_of_one_line(tmp_path):
    save_vision_model(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    weights = model.state_dict()
    some = {key: value for key, value in weights.items() if "layernorm" not in key}
    model.save_pretrained(tmp_path, state_dict=some)
    with pytest.raises(UserError, match=r"retriever '.*' lacks \d+ weights \('.*layernorm.*', ...\); give another"):
        Retriever.from_pretrained(str(tmp_path))
    weights["layernorm.bias"].fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'layernorm.bias' holds NaN or infinity"):
        Retriever.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "git", "masked", "nothing"])
def test_what_has_no_pooled_features_of_images_is_a_mistake_of_one_line(kind, tmp_path):
    if kind == "masked":
        save_vision_model(tmp_path)
        ViTMAEModel(ViTMAEConfig(**RETRIEVERS["vit"].to_dict())).save_pretrained(tmp_path)
    elif kind != "nothing":
        save_tiny(kind, tmp_path)
    with pytest.raises(UserError, match=r"retriever '.*' cannot be loaded: .*; give the Hub id or folder of a vision"):
        Retriever.from_pretrained(str(tmp_path))
