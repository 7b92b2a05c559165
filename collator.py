"""Examples to batch: decode and preprocess images, pad captions, `[DEC]` first, `-100` where nothing is learnt.

Images are never flipped (T14): in radiology left and right matter.
"""

import io
import math
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipProcessor

from image_processing import fast_pixel_values


IGNORE_INDEX = -100  # the target that `torch.nn.functional.cross_entropy` leaves out
MIN_IMAGE_SIDE = 8  # pixels; a tracking pixel or a stripe is no radiology image
# Of one image; mammograms, the largest in radiology, have 20 million. To rescale 16 bits an image is held as floats,
# some 32 bytes a pixel in all: 22 million of them stay below 1 GB
MAX_PIXELS = 2**26
MAX_PIXELS_16_BIT = 22 * 2**20
# Pillow's own readers of raster images, and none that starts another program (EPS) or fetches what a file names
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA", "AVIF")
MAX_JPEG_SCANS = 100  # encoders write about 10; each, a few bytes long, makes the decoder pass over all pixels
TIFF_TILE_SIDES = (322, 323)  # tags TileWidth and TileLength; a tile is decoded whole, however little of it is used


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


def open_image(image: dict[str, Any] | Image.Image | None) -> Image.Image:
    """Decode an image completely and turn it upright by its EXIF orientation.

    Args:
        image: what `datasets.Image(decode=False)` yields, `{"bytes": ..., "path": ...}`, or a PIL image.

    Returns:
        An image that `BlipImageProcessorPil` converts to RGB without loss of meaning: 16-bit and float modes
        are rescaled to 8 bits here (T12), the other modes are left to it (it lays transparency on white).

    Raises:
        ValueError: the image cannot be used; the message says why.
    """
    from_file = not isinstance(image, Image.Image)
    if from_file:
        image = _open(image)
    most = MAX_PIXELS_16_BIT if image.mode.startswith(("I", "F")) else MAX_PIXELS
    if image.width * image.height > most:  # known before any pixel is decoded
        raise ValueError(f"is {image.width}x{image.height} pixels; at most {most:,} are decoded")
    if from_file:
        _check_work(image)
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of damaged EXIF, a line for each image
            image.load()
            # In place returns None; the caller's own image is left as it is
            image = ImageOps.exif_transpose(image, in_place=from_file) or image
    except Exception as error:  # PIL's decoders raise whatever their format's parser raises
        raise ValueError(f"cannot be decoded: {error}") from error
    if min(image.size) < MIN_IMAGE_SIDE:
        raise ValueError(f"is {image.width}x{image.height} pixels; the shorter side needs at least {MIN_IMAGE_SIDE}")
    return _to_8_bit(image) if image.mode.startswith(("I", "F")) else image


def _open(image: dict[str, Any] | None) -> Image.Image:
    if not image or (image.get("bytes") is None and not image.get("path")):
        raise ValueError("no image")
    content = image.get("bytes")
    try:
        if content is None and not stat.S_ISREG(os.stat(image["path"]).st_mode):
            raise ValueError("is no regular file")  # a pipe or a device would be read for ever
        with warnings.catch_warnings(action="ignore"):  # of damaged EXIF, and of sizes: the caller's limit is lower
            return Image.open(image["path"] if content is None else io.BytesIO(content), formats=FORMATS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError("image file is missing") from error
    except UnidentifiedImageError as error:
        if content is None:
            with open(image["path"], "rb") as file:
                content = file.read(16)
        what = f"starts with {bytes(content[:16])!r}" if content else "is empty"
        raise ValueError(f"not an image: {what}") from error
    except ValueError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"cannot be opened: {error}") from error


def _check_work(image: Image.Image) -> None:
    """Raise ValueError if a file of few pixels, of which only the header is read, takes much memory or time."""
    if image.format == "TIFF":
        sides = [image.tag_v2.get(tag, 0) for tag in TIFF_TILE_SIDES]
        if not all(isinstance(side, int) for side in sides) or math.prod(sides) > MAX_PIXELS:
            raise ValueError(f"has tiles of {sides} pixels; at most {MAX_PIXELS:,} are decoded")
    if image.format in ("JPEG", "MPO"):
        place = image.fp.tell()
        image.fp.seek(0)
        # In the data a byte 255 is followed by 0: this pair begins a scan, of the image or of a header's thumbnail
        scans = image.fp.read().count(b"\xff\xda")
        image.fp.seek(place)
        if scans > MAX_JPEG_SCANS:
            raise ValueError(f"has {scans:,} JPEG scans; at most {MAX_JPEG_SCANS} are decoded")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Rescale a one-channel image of 16 bits or more to mode L (T12: `convert` would clip it to white).

    The divisor is the full range of the bits in use, since scanners write 10, 12 or 14 bits into 16-bit files;
    an 8-bit image in a 16-bit file keeps its values. Float or negative values are stretched from their extremes.
    """
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("holds no finite value")
    low, high = float(finite.min()), float(finite.max())
    if image.mode.startswith("I") and low >= 0:
        low, high = 0.0, 2.0 ** max(8, math.ceil(math.log2(high + 1))) - 1
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(scaled.round().astype(np.uint8))
