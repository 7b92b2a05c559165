"""Rows to batch: images decoded, captions padded, -100 where a token is not a target.

Images are never flipped (T14): in radiology left and right matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from captioning.data.images import open_image
from captioning.models.captioner import IGNORE_INDEX, Captioner
from captioning.scoring.concepts import known_concepts


@dataclass
class CaptioningCollator:
    """Collate rows of a tokenized split into the batch of a captioner."""

    captioner: Captioner
    with_ids: bool = False  # add the list `image_id`, for messages about the batch
    # Called with `image_id` and reason of an image that cannot be read: a black one takes its place, and its caption
    # is masked from the loss. None makes it an error
    unreadable: Callable[[str, str], None] | None = None
    concepts: Sequence[str] = ()  # C CUIs to learn
    unlabeled_are_negative: bool = False  # an image without concepts has none of them; else it is masked from the loss

    def __getstate__(self) -> dict[str, Any]:
        """Leave the weights out: workers that are not forked get a pickle."""
        return self.__dict__ | {"captioner": self.captioner.without_weights()}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of `examples`, which may have `retrieved` captions for the prompt: see `Captioner.collate`.

        With `concepts` it has `concept_labels` float32 `[B, C]`, 0 or 1, -100 in the rows of masked images.

        Raises:
            ValueError: an image cannot be read, and there is no `unreadable`; the message names its `image_id`.
        """
        images = [self._image(example) for example in examples]
        rows = [example["input_ids"] for example in examples]
        retrieved = [example.get("retrieved") or [] for example in examples]
        more = [retrieved] if any(retrieved) else []
        batch = self.captioner.collate([image or Image.new("L", (64, 64)) for image in images], rows, *more)
        batch["labels"][torch.tensor([image is None for image in images])] = IGNORE_INDEX
        if self.concepts:
            pairs = zip(examples, images, strict=True)
            rows = [self._concept_row(None if image is None else example.get("cui")) for example, image in pairs]
            batch["concept_labels"] = torch.tensor(rows, dtype=torch.float32)
        return batch | {"image_id": [example["image_id"] for example in examples]} if self.with_ids else batch

    def _concept_row(self, cuis: Sequence[str] | None) -> list[float]:
        """Return the labels of an image; None: of one that is not there."""
        known = known_concepts(cuis or ())
        if cuis is None or not (known or self.unlabeled_are_negative):
            return [float(IGNORE_INDEX)] * len(self.concepts)
        return [float(cui in known) for cui in self.concepts]

    def _image(self, example: dict[str, Any]) -> Image.Image | None:
        try:
            return open_image(example["image"])
        except ValueError as error:
            image_id = example.get("image_id")
            if self.unreadable is None:
                raise ValueError(f"image '{image_id}': {error}") from error
            self.unreadable(str(image_id), str(error))
            return None
