"""The images of the report page: small, within their budget, and nothing but pixels."""

import io

import numpy as np
import pytest
from helpers import make_noise
from PIL import Image as PIL

from captioning.reporting.page_images import IMAGES_PER_BLOCK, LEAST_SHARE, encode_image, image_blocks, to_base64


# Each mode by the conversions that lead to it from gray
MODES = ("1", "L", "LA", "P", "P PA", "RGB", "RGBA", "RGBA RGBa", "CMYK", "YCbCr", "RGB HSV", "I", "F")


@pytest.mark.parametrize("max_bytes", [LEAST_SHARE * 3 // 4, 3750, 30_000])
@pytest.mark.parametrize("size", [(700, 500), (1, 3000), (5, 5)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_keeps_to_its_share_of_the_page(mode, size, max_bytes):
    image = make_noise(0, size, mode)
    jpeg = encode_image(image, max_bytes)
    assert 0 < len(jpeg) <= max_bytes
    assert image.size == size, "the image of the caller is changed"
    assert PIL.open(io.BytesIO(jpeg)).mode == mode


@pytest.mark.parametrize("modes", MODES)
def test_images_of_every_mode_are_shown(modes):
    gray = PIL.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1)))
    image = gray
    for mode in modes.split():
        image = image.convert(mode)
    jpeg = PIL.open(io.BytesIO(encode_image(image, 20_000)))
    assert jpeg.mode == "L", "a gray image is stored gray"
    if modes != "1":
        assert np.abs(np.asarray(jpeg, dtype=int) - np.asarray(gray, dtype=int)).mean() < 4


def test_a_gray_image_that_was_stored_as_a_color_jpeg_is_stored_gray():
    buffer = io.BytesIO()
    make_noise(0, (300, 200), "L").convert("RGB").save(buffer, "JPEG", quality=75)
    image = PIL.open(buffer)
    assert (image.mode, PIL.open(io.BytesIO(encode_image(image, 20_000))).mode) == ("RGB", "L")


def test_nothing_but_the_pixels_of_an_image_is_kept():
    buffer = io.BytesIO()
    make_noise().save(buffer, "JPEG", comment=b"PATIENT JOHN DOE " * 500, exif=b"Exif\0\0PATIENT")
    jpeg = encode_image(PIL.open(io.BytesIO(buffer.getvalue())), 6000)
    assert jpeg is not None, "a long comment takes the share of the image"
    assert b"PATIENT" not in jpeg


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_as_for_the_model(mode):
    image = PIL.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    image = image.quantize() if mode == "P" else image.convert(mode)
    shown = PIL.open(io.BytesIO(encode_image(image, 20_000))).convert("L")
    assert shown.getpixel((5, 20)) < 20
    assert shown.getpixel((35, 20)) > 235


def test_blocks_hold_all_images_in_their_order_within_the_budget():
    number = 2 * IMAGES_PER_BLOCK + 1
    images = [make_noise(i, (90, 60)) if i % 7 else None for i in range(number)]
    blocks = list(image_blocks(images, number, 2500 * number))
    assert [len(block) for block in blocks] == [IMAGES_PER_BLOCK, IMAGES_PER_BLOCK, 1]
    flat = [jpeg for block in blocks for jpeg in block]
    assert flat == [image and to_base64(encode_image(image, 1875)) for image in images]
    assert max(len(image) for image in flat if image) <= 2500
    for wrong in (images[1:], [*images, None]):
        with pytest.raises(ValueError, match="zip"):
            list(image_blocks(wrong, number, 10**6))
