"""A vision model whose features say which images look alike, in place of those of the captioner."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
import xxhash
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from captioning.hub.faults import reading_from_hub
from captioning.models.weights import refuse_missing_weights, refuse_nan_weights


BATCH_SIZE = 32  # images encoded at a time
CHUNK = 2048  # images whose nearest ones are found at a time


class Retriever:
    """A vision model of the Hub or a folder, such as a ViT, DINOv2 or CLIP, with its image processor."""

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device | str = "cpu", revision: str | None = None) -> Self:
        """Load a model; of one of images and text, such as CLIP, the part for images is used.

        Raises:
            UserError: there is no such model, it is not one of images, or weights are missing or NaN.
        """
        with reading_from_hub(f"retriever '{name}' cannot be loaded", "give the Hub id or folder of a vision model"):
            # By PIL: the same pixels everywhere (T11)
            processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
            model, loading = AutoModel.from_pretrained(
                name, revision=revision, dtype=torch.float32, output_loading_info=True
            )
            of_pooler = {key for key in loading["missing_keys"] if key.startswith("pooler.")}
            if of_pooler:  # a classifier, such as google/vit-base-patch16-224; stock draws a pooler at random
                model.pooler = None
            refuse_missing_weights(loading["missing_keys"] - of_pooler, f"retriever '{name}'")
            found = cls(model.to(device), processor)
            found._encode([Image.new("RGB", (64, 64))])  # a model that is not one of images fails here
        refuse_nan_weights(model, name)
        return found

    def digest(self) -> str:
        """Return a digest of the weights and of how images are prepared."""
        return weights_digest(self.model.state_dict(), self.processor.to_json_string())

    def features(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Return the pooled features of N images, float32 `[N, D]`, the same within a context of `torch.autocast`."""
        images, found = iter(images), []
        while batch := [image.convert("RGB") for image in islice(images, BATCH_SIZE)]:
            found.append(self._encode(batch))
        return np.concatenate(found)

    @torch.no_grad()
    def _encode(self, images: list[Image.Image]) -> np.ndarray:
        inputs = self.processor(images, return_tensors="pt").to(self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):
            outputs = getattr(self.model, "get_image_features", self.model)(pixel_values=inputs["pixel_values"])
        pooled = outputs.last_hidden_state.mean(dim=1) if outputs.pooler_output is None else outputs.pooler_output
        return pooled.flatten(1).float().cpu().numpy()  # a ResNet keeps the axes of the pixels


def weights_digest(weights: Mapping[str, torch.Tensor], *more: Any) -> str:
    """Return a digest of named weights, and of more values by their `repr`."""
    found = xxhash.xxh3_128(repr(more).encode())
    for name, weight in weights.items():
        found.update(name.encode())
        found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def similarities(
    features: np.ndarray, train_features: np.ndarray, chunk: int = CHUNK
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield cosines `[n, M]` of up to `chunk` images at a time with M training images, with the number of the first.

    Features are float `[N, H]` and `[M, H]`; the mean of the latter is subtracted from all.
    """
    common = train_features.mean(axis=0)
    train, own = train_features - common, features - common
    for centered in (train, own):
        centered /= np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)
    for start in range(0, len(own), chunk):
        yield start, own[start : start + chunk] @ train.T
