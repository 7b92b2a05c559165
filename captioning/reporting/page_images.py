"""The images of a page: small JPEGs of nothing but pixels, all of them together within a budget; attention maps."""

import base64
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageChops


IMAGES_PER_BLOCK = 50  # the page parses the images in such portions, as they come into view
LEAST_SHARE = 1500  # characters: a smaller image shows nothing, so beyond 30,000 images the page exceeds its budget
SIDES = (512, 384, 320, 256, 224, 192, 160, 128, 96, 64, 48, 32)  # longer side of a stored image, pixels
QUALITIES = (80, 65, 50, 35)  # JPEG; below 35 blocks show, and a smaller side looks better
BYTES_PER_PIXEL = 0.1  # what a radiograph takes at quality 80, so that most images fit at once
GRAY_TOLERANCE = 6  # levels: channels of a gray image that was stored as a color JPEG differ by a few
WORD = re.compile(r"\w")

Words = Sequence[tuple[str, np.ndarray]]  # of a caption, each with its attention map


def image_blocks(images: Iterable[Image.Image | None], number: int, budget: int) -> Iterator[list[str | None]]:
    """Yield the images as base64 JPEG in portions of `IMAGES_PER_BLOCK`, all of them in `budget` characters.

    Raises:
        ValueError: there are not `number` images.
    """
    share = max(LEAST_SHARE, budget // max(number, 1))
    block: list[str | None] = []
    for index, image in zip(range(number), images, strict=True):
        jpeg = encode_image(image, share * 3 // 4)  # four characters for three bytes
        block.append(jpeg and to_base64(jpeg))
        if len(block) == IMAGES_PER_BLOCK or index == number - 1:
            yield block
            block = []


def encode_image(image: Image.Image | None, max_bytes: int) -> bytes | None:
    """Return an image as a JPEG of at most `max_bytes`, gray where the image is; None for None.

    Quality is lowered before the side is. What is transparent becomes white, as for the model, and nothing but pixels
    is kept: a comment in the file may name a patient.
    """
    if image is None:
        return None
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    small = image.convert("L" if image.mode in ("1", "L") else "RGB")
    small.info.clear()
    for side in [side for side in SIDES if side * side * BYTES_PER_PIXEL <= max_bytes] or SIDES[-1:]:
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        gray = small.convert("L")
        color = ImageChops.difference(small, gray.convert(small.mode))
        small = gray if np.max(color.getextrema()) <= GRAY_TOLERANCE else small
        for quality in QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= max_bytes:
                return buffer.getvalue()
    return None


def map_levels(words: Words) -> list[dict[str, Any]]:
    """Return the maps of the words of a caption, each in 256 levels of its own maximum; punctuation has none."""
    found = []
    for word, values in words:
        grid = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=0.0, neginf=0.0).clip(min=0)
        levels = np.round(grid * (255 / max(grid.max(), 1e-12))).astype(np.uint8)
        if WORD.search(word):
            found.append({"word": word, "columns": levels.shape[1], "levels": to_base64(levels.tobytes())})
    return found


def to_base64(data: bytes) -> str:
    """Return bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")
