"""PIL images to BLIP's `pixel_values`: the values of `BlipImageProcessorPil` without its float copies of each image.

Two facts make it fast. A channel of 8 bits has 256 values, so rescaling and normalizing are one look-up in a table.
And Pillow resizes each channel by itself, so of a gray image, the usual one in radiology, one channel is resized
instead of three equal ones.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageChops
from transformers.image_transforms import convert_to_rgb, normalize, rescale
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil


SAMPLE = (16, 16)  # pixels that are compared first; enough to tell most color images from gray ones
DONE_HERE = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
NOT_DONE_HERE = ("do_center_crop", "do_pad")
FIRST = {"data_format": ChannelDimension.FIRST, "input_data_format": ChannelDimension.FIRST}


def fast_pixel_values(images: list[Image.Image], image_processor: BlipImageProcessorPil) -> torch.Tensor:
    """Return `image_processor(images, return_tensors="pt")["pixel_values"]`, equal in every value.

    Args:
        images: PIL images of any mode and size; they are not changed.
        image_processor: its settings are read at each call. Where it asks for more or less than to convert to RGB,
            resize to a height and a width, rescale and normalize three channels, it processes the batch itself.

    Returns:
        float32 `[B, 3, H, W]`.

    Raises:
        ValueError, OSError: what the image processor and Pillow raise for images that they cannot use.
    """
    if (
        not images
        or not _does_the_same(image_processor)
        or not all(isinstance(image, Image.Image) for image in images)
    ):
        return image_processor(images, return_tensors="pt")["pixel_values"]
    settings = image_processor
    table = _table(settings.rescale_factor, tuple(settings.image_mean), tuple(settings.image_std))
    height, width = settings.size["height"], settings.size["width"]
    # numpy asks the system for huge pages, torch.empty does not: 6 % of the whole time on Linux
    pixel_values = np.empty((len(images), 3, height, width), np.float32)
    for image, values in zip(images, pixel_values, strict=True):
        resized = np.asarray(_gray_or_rgb(image).resize((width, height), settings.resample))
        # No index is out of range; with `clip` numpy does not copy the output in case one is
        if resized.ndim == 2:
            np.take(table, resized, axis=1, out=values, mode="clip")
        else:
            for channel in range(3):
                np.take(table[channel], resized[..., channel], out=values[channel], mode="clip")
    return torch.from_numpy(pixel_values)


def _does_the_same(image_processor: BlipImageProcessorPil) -> bool:
    """Tell whether an image processor does what `fast_pixel_values` does, no more and no less."""
    get = vars(image_processor).get
    size, mean, std = get("size"), get("image_mean"), get("image_std")
    return (
        type(image_processor) is BlipImageProcessorPil  # a subclass may do anything
        and all(get(name) for name in DONE_HERE)
        and not any(get(name) for name in NOT_DONE_HERE)
        and isinstance(size, dict | SizeDict)
        and set(dict(size)) == {"height", "width"}
        and isinstance(get("resample"), int)
        and isinstance(get("rescale_factor"), float)
        and all(isinstance(values, Sequence) and len(values) == 3 for values in (mean, std))
    )


@lru_cache(maxsize=8)
def _table(rescale_factor: float, image_mean: tuple[float, ...], image_std: tuple[float, ...]) -> np.ndarray:
    """Return what the stock functions make of each of the 256 values of a channel: float32 `[3, 256]`."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    table = np.ascontiguousarray(
        normalize(rescale(levels, rescale_factor, **FIRST), image_mean, image_std, **FIRST)[:, 0]
    )
    table.setflags(write=False)  # it is cached
    return table


def _gray_or_rgb(image: Image.Image) -> Image.Image:
    """Return the image in mode L if its three channels are equal, else in mode RGB."""
    transparent = image.info.get("transparency") is not None
    if image.mode == "L" and not transparent:
        return image
    if image.mode != "RGB" or transparent:
        image = Image.fromarray(convert_to_rgb(image, return_numpy=True))
    if _equal_channel(image.resize(SAMPLE, Image.Resampling.NEAREST)) is None:
        return image
    return _equal_channel(image) or image


def _equal_channel(image: Image.Image) -> Image.Image | None:
    red, green, blue = image.split()
    equal = all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
    return red if equal else None
