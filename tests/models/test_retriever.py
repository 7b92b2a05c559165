"""A vision model in place of the captioner's features: its own pooled ones, of images in any mode and number."""

import numpy as np
import pytest
import torch
from helpers import make_noise
from transformers import AutoModel, CLIPConfig, CLIPImageProcessorPil, ResNetConfig, ViTConfig, ViTImageProcessorPil

from captioning.errors import UserError
from captioning.models import retriever as module
from captioning.models.retriever import Retriever


SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
PIXELS = dict(image_size=32, patch_size=8)
CONFIGS = {
    "vit": ViTConfig(**SHAPE, **PIXELS),
    "clip": CLIPConfig(vision_config=SHAPE | PIXELS, text_config=SHAPE, projection_dim=16),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1]),
}


def save_vision_model(folder, kind="vit"):
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS[kind]).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    processor = ViTImageProcessorPil(size=side)
    if kind == "clip":
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    processor.save_pretrained(folder)
    return str(folder)


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


def test_what_is_no_vision_model_is_a_mistake_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"retriever '.*' cannot be loaded"):
        Retriever.from_pretrained(str(tmp_path))
