"""A vision model in place of the captioner's features: its own pooled ones, of images in any mode and number."""

import numpy as np
import pytest
import torch
from families import save_vision_model
from helpers import make_noise
from transformers import AutoModel

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


def test_what_is_no_vision_model_is_a_mistake_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"retriever '.*' cannot be loaded"):
        Retriever.from_pretrained(str(tmp_path))
