"""One place that opens an image: bounded in memory and time whatever the file, upright, and 16 bits as 8.

Files may be hostile or damaged: what cannot be used is a ValueError that says why. `dicom.py` reads DICOM.
"""

import io
import math
import os
import stat
import warnings
from typing import Any

import numpy as np
import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

from captioning.data.dicom import ENDINGS, MAX_JPEG_SCANS, MAX_PIXELS, MAX_PIXELS_16_BIT, is_dicom, open_dicom


MISSING = "missing image file"
MIN_IMAGE_SIDE = 8  # pixels; a smaller one is a tracking pixel or a stripe
MAX_ASPECT = 200  # of the longer side to the shorter; Qwen's image processors fail beyond, and nobody sees anything
# Pillow's own readers of raster images, and none that starts another program (EPS) or opens what a file names
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA", "AVIF")
IMAGE_ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS} | {*ENDINGS}
TIFF_TILE_SIDES = (322, 323)  # tags TileWidth and TileLength; a tile is decoded whole, however little of it is shown


def open_image(image: dict[str, Any] | Image.Image | None, frame: int | str = "middle") -> Image.Image:
    """Decode an image completely and turn it upright by its EXIF orientation.

    Args:
        image: what `datasets.Image(decode=False)` yields, `{"bytes": ..., "path": ...}`, or a PIL image.
        frame: of a DICOM, see `open_dicom`.

    Returns:
        An image in a mode that `convert("RGB")` and image processors handle: 16-bit and float modes are rescaled to
        8 bits here (T12).

    Raises:
        ValueError: the image cannot be used; the message says why.
    """
    from_file = not isinstance(image, Image.Image)
    if from_file:
        image = _open_lazily(image, frame)
    most = MAX_PIXELS_16_BIT if image.mode.startswith(("I", "F")) else MAX_PIXELS
    if image.width * image.height > most:  # known before any pixel is decoded
        raise ValueError(f"is {image.width}x{image.height} pixels; at most {most:,} are decoded")
    if from_file:
        _check_work(image)
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged EXIF, a line for each image
            image.load()
            # Returns None in place; the caller's own image is not changed
            image = ImageOps.exif_transpose(image, in_place=from_file) or image
    except Exception as error:  # PIL's decoders raise whatever their format's parser raises
        raise ValueError(f"cannot be decoded: {error}") from error
    if min(image.size) < MIN_IMAGE_SIDE:
        raise ValueError(f"is {image.width}x{image.height} pixels; the shorter side needs at least {MIN_IMAGE_SIDE}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"is {image.width}x{image.height} pixels; one side may be {MAX_ASPECT} times the other")
    return _to_8_bit(image) if image.mode.startswith(("I", "F")) else image


def pixel_hash(image: Image.Image) -> int:
    """Return 64 bits that differ for images of other size or pixels; a gray image has the same in modes L and RGB."""
    channels = [channel.tobytes() for channel in (image if image.mode == "L" else image.convert("RGB")).split()]
    digest = xxhash.xxh3_64(repr(image.size).encode())
    for channel in channels[:1] if channels.count(channels[0]) == len(channels) else channels:
        digest.update(channel)
    return digest.intdigest() - 2**63  # signed, for Arrow's int64


def png_of_dicom(image: dict[str, Any]) -> dict[str, Any]:
    """Return a DICOM as PNG, which has its pixels as `open_image` shows them and no header; another image as it is."""
    content, path = image.get("bytes"), image.get("path")
    if not is_dicom(path if content is None else content):
        return image
    buffer = io.BytesIO()
    open_image(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path and f"{path}.png"}


def _open_lazily(image: dict[str, Any] | None, frame: int | str) -> Image.Image:
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if content is None and not path:
        raise ValueError("no image")
    source = path if content is None else content
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("is not a regular file")  # reading a pipe or a device might never end
        if is_dicom(source):
            return open_dicom(source, frame)
        with warnings.catch_warnings(action="ignore"):  # of damaged EXIF, and of sizes above Pillow's own limit
            return Image.open(source if content is None else io.BytesIO(content), formats=FORMATS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(MISSING) from error
    except UnidentifiedImageError as error:
        with io.BytesIO(content) if content is not None else open(path, "rb") as file:
            start = file.read(8)  # of a DICOM that begins with the name of the patient, no letter of it
        raise ValueError(f"not an image: {f'starts with {start!r}' if start else 'is empty'}") from error
    except Image.DecompressionBombError as error:
        least = 2 * Image.MAX_IMAGE_PIXELS
        raise ValueError(f"has more than {least:,} pixels; at most {MAX_PIXELS:,} are decoded") from error
    except ValueError:
        raise
    except Exception as error:  # see `open_image`
        raise ValueError(f"cannot be opened: {error}") from error


def _check_work(image: Image.Image) -> None:
    """Raise ValueError if decoding takes much more memory or time than the number of pixels suggests."""
    if image.format == "TIFF":
        sides = [image.tag_v2.get(tag, 0) for tag in TIFF_TILE_SIDES]
        if not all(isinstance(side, int) for side in sides) or math.prod(sides) > MAX_PIXELS:
            raise ValueError(f"has tiles of {sides} pixels; at most {MAX_PIXELS:,} are decoded")
    if image.format in ("JPEG", "MPO"):
        place = image.fp.tell()
        image.fp.seek(0)
        # Within data a byte 255 is followed by 0: this pair starts a scan, of the image or of a thumbnail
        scans = image.fp.read().count(b"\xff\xda")
        image.fp.seek(place)
        if scans > MAX_JPEG_SCANS:
            raise ValueError(f"has {scans:,} JPEG scans; at most {MAX_JPEG_SCANS} are decoded")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Rescale a one-channel image of more than 8 bits to mode L (T12: `convert` would clip it to white).

    The divisor is the full range of the bits in use, since scanners write 10, 12 or 14 bits into 16-bit files; an
    8-bit image in a 16-bit file keeps its values. Float and negative values are scaled from minimum to maximum.
    """
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("has only NaN and infinite values")
    low, high = float(finite.min()), float(finite.max())
    if image.mode.startswith("I") and low >= 0:
        low, high = 0.0, 2.0 ** max(8, math.ceil(math.log2(high + 1))) - 1
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(scaled.round().astype(np.uint8))
