"""Rows to batch: images decoded, captions padded, -100 where a token is not a target.

Images are never flipped (T14): in radiology left and right matter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from captioning.data.images import open_image
from captioning.models.captioner import IGNORE_INDEX, Captioner


@dataclass
class CaptioningCollator:
    """Collate rows of a tokenized split into the batch of a captioner.

    Args:
        captioner: makes the batch of images and tokens.
        with_ids: add the list `image_id`, for messages about the batch; it is not an input of the model.
        unreadable: called with `image_id` and the reason if an image cannot be read. A black one takes its place, and
            its caption is masked from the loss. None makes it an error.
    """

    captioner: Captioner
    with_ids: bool = False
    unreadable: Callable[[str, str], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the weights out: workers that are not forked get the collator as a pickle."""
        return self.__dict__ | {"captioner": self.captioner.without_weights()}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of `examples`: see `Captioner.collate`.

        Raises:
            ValueError: an image cannot be read, and there is no `unreadable`; the message names its `image_id`.
        """
        images = [self._image(example) for example in examples]
        rows = [example["input_ids"] for example in examples]
        batch = self.captioner.collate([image or Image.new("L", (64, 64)) for image in images], rows)
        batch["labels"][torch.tensor([image is None for image in images])] = IGNORE_INDEX
        return batch | {"image_id": [example["image_id"] for example in examples]} if self.with_ids else batch

    def _image(self, example: dict[str, Any]) -> Image.Image | None:
        try:
            return open_image(example["image"])
        except ValueError as error:
            image_id = example.get("image_id")
            if self.unreadable is None:
                raise ValueError(f"image '{image_id}': {error}") from error
            self.unreadable(str(image_id), str(error))
            return None
