"""Examples to batch: decode and preprocess images, pad captions, `[DEC]` first, `-100` where nothing is learnt.

Images are never flipped (T14): in radiology left and right matter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipProcessor

from captioning.data.images import open_image
from captioning.models.fast_blip.pixel_values import fast_pixel_values


IGNORE_INDEX = -100  # the target that `torch.nn.functional.cross_entropy` leaves out


@dataclass
class CaptioningCollator:
    """Collate rows of a tokenized ROCOv2 split into a BLIP batch.

    Args:
        processor: supplies the image processor and the padding token.
        bos_token_id: `text_config.bos_token_id`, `[DEC]` (T3). The tokenizer writes `[CLS]` at position 0, but
            `generate` starts from `[DEC]`, and so did BLIP's own training (github.com/salesforce/BLIP,
            models/blip.py, `text.input_ids[:, 0] = self.tokenizer.bos_token_id`).
        prompt_length: number of prompt tokens that follow `[DEC]` in every row; they are given, not learnt.
        fast: make `pixel_values` by `fast_pixel_values`, which gives the values of the image processor in less time.
        with_ids: add the list `image_id`, for a message about the batch; the model must not get it.
        unreadable: called with `image_id` and reason of an image that cannot be read, which becomes a black one whose
            caption is not learnt; None: it is an error.
    """

    processor: BlipProcessor
    bos_token_id: int
    prompt_length: int = 0
    fast: bool = True
    with_ids: bool = False
    unreadable: Callable[[str, str], None] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` float32 `[B, 3, H, W]` and `input_ids`, `attention_mask`, `labels` int64 `[B, L]`.

        `L` is the longest caption of the batch. `labels` stand where their tokens stand: BLIP shifts them itself.

        Raises:
            ValueError: an image cannot be read, and there is no `unreadable`; the message names its `image_id`.
        """
        images = [self._image(example) for example in examples]
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, tokens in enumerate(rows):
            attention_mask[row, : len(tokens)] = 1
        input_ids[:, 0] = self.bos_token_id
        labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        labels[:, : 1 + self.prompt_length] = IGNORE_INDEX
        labels[[image is None for image in images]] = IGNORE_INDEX
        batch = {
            "pixel_values": self._pixel_values([image or Image.new("L", (64, 64)) for image in images]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
        }
        return batch | {"image_id": [example["image_id"] for example in examples]} if self.with_ids else batch

    def pixel_values(self, examples: list[dict[str, Any]]) -> torch.Tensor:
        """Decode, resize and normalize the images of `examples` into float32 `[B, 3, H, W]`."""
        return self._pixel_values([self._image(example) for example in examples])

    def _image(self, example: dict[str, Any]) -> Image.Image | None:
        try:
            return open_image(example["image"])
        except ValueError as error:
            image_id = example.get("image_id")
            if self.unreadable is None:
                raise ValueError(f"image '{image_id}': {error}") from error
            self.unreadable(str(image_id), str(error))
            return None

    def _pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        if self.fast:
            return fast_pixel_values(images, self.processor.image_processor)
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
