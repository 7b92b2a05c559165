"""The fast way to `pixel_values` gives the values of `BlipImageProcessorPil`, whatever the image."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioning.models.fast_blip import pixel_values
from captioning.models.fast_blip.pixel_values import fast_pixel_values


SMALL = {"height": 48, "width": 32}
RGB_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
MODES = ("1", "L", "LA", "La", "P", "PA", *RGB_MODES, "I", "I;16", "F")
SIZES = ((8, 8), (9, 200), (31, 47), (32, 48), (48, 32), (640, 519), (3000, 20), (16, 16), (1, 1))


def random_image(seed: int, mode: str, size: tuple[int, int]) -> Image.Image:
    """Noise, or in two cases of three flat or few-colored, in which rounding and clipping differ."""
    rng = np.random.default_rng(seed)
    levels = (256, 2, 9)[seed % 3]
    pixels = (rng.integers(0, levels, (*size[::-1], 4)) * (255 // (levels - 1))).astype(np.uint8)
    if mode in ("RGBA", "LA"):
        return Image.fromarray(pixels).convert(mode)
    if mode in ("RGBa", "La"):
        return Image.fromarray(pixels).convert(mode.replace("a", "A")).convert(mode)
    if mode == "PA":
        return Image.fromarray(pixels[..., 0]).convert("PA")
    if mode == "P":
        return Image.fromarray(pixels[..., :3]).quantize(16)
    if mode == "LAB":
        return Image.frombytes("LAB", size, pixels[..., :3].tobytes())
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    return Image.fromarray(pixels[..., :3]).convert(mode)


def stock(images: list[Image.Image], processor: BlipImageProcessorPil) -> torch.Tensor:
    return processor(images, return_tensors="pt")["pixel_values"]


def assert_same(images: list[Image.Image], processor: BlipImageProcessorPil) -> None:
    """The same values, or where stock raises the same class of error."""
    try:
        expected = stock(images, processor)
    except Exception as error:
        with pytest.raises(type(error)):
            fast_pixel_values(images, processor)
        return
    torch.testing.assert_close(fast_pixel_values(images, processor), expected, rtol=0, atol=0)


@pytest.fixture
def resized_modes(monkeypatch) -> list[str]:
    """The mode in which each image is resized to the size of the model."""
    modes = []
    resize = Image.Image.resize

    def spy(image, size, *arguments, **options):
        if tuple(size) != pixel_values.SAMPLE:
            modes.append(image.mode)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    return modes


# --- Equality -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_stock_in_every_mode_and_size(mode):
    processor = BlipImageProcessorPil(size=SMALL)
    assert_same([random_image(seed, mode, size) for seed, size in enumerate(SIZES)], processor)


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 40))])
def test_values_are_those_of_stock_for_any_size_and_setting(seed):
    rng = np.random.default_rng(seed)
    width, height, out_width, out_height = (int(side) for side in np.exp(rng.uniform(0, 6, 4)).astype(int) + 1)
    processor = BlipImageProcessorPil(
        size={"height": out_height, "width": out_width},
        resample=int(rng.integers(0, 6)),
        rescale_factor=float(rng.choice([1 / 255, 1 / 127.5, 0.01])),
        image_mean=rng.uniform(0, 1, 3).tolist(),
        image_std=rng.uniform(0.05, 1, 3).tolist(),
    )
    gray = random_image(seed, "L", (width, height))
    assert_same([gray, gray.convert("RGB"), random_image(seed + 1, "RGB", (height, width))], processor)


def test_values_are_those_of_stock_at_the_size_of_the_model():
    images = [random_image(seed, mode, (640, 520)) for seed, mode in enumerate(("L", "RGB", "RGBA", "L"))]
    assert_same([*images, images[0].convert("RGB"), random_image(3, "L", (3000, 2500))], BlipImageProcessorPil())


@pytest.mark.parametrize(("mode", "transparency"), [("L", 0), ("RGB", (0, 0, 0)), ("P", 1), ("P", b"\x80\x00")])
def test_transparent_colors_are_laid_on_white_as_stock_does(mode, transparency):
    image = random_image(1, mode, (40, 30))  # of two levels, so that many pixels are transparent
    image.info["transparency"] = transparency
    processor = BlipImageProcessorPil(size=SMALL)
    assert_same([image], processor)
    opaque = image.copy()
    del opaque.info["transparency"]
    assert not torch.equal(fast_pixel_values([image], processor), fast_pixel_values([opaque], processor))


@pytest.mark.parametrize(("channel", "place"), [(0, (0, 0)), (1, (320, 259)), (2, (639, 518)), (0, (17, 500))])
def test_one_colored_pixel_makes_a_color_image(channel, place, resized_modes):
    image = random_image(0, "L", (640, 519)).convert("RGB")
    pixel = list(image.getpixel(place))
    pixel[channel] ^= 1
    image.putpixel(place, tuple(pixel))
    processor = BlipImageProcessorPil(size={"height": 600, "width": 700})  # upscaled: one level is seen
    found = fast_pixel_values([image], processor)
    assert resized_modes == ["RGB"]
    assert torch.equal(found, stock([image], processor))


def test_the_channels_of_gray_images_are_resized_once(resized_modes):
    gray = random_image(0, "L", (64, 50))
    images = [gray, gray.convert("RGB"), gray.convert("RGBA"), random_image(0, "RGB", (64, 50))]
    fast_pixel_values(images, BlipImageProcessorPil(size=SMALL))
    assert resized_modes == ["L", "L", "L", "RGB"]


# --- Settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_convert_rgb": False},
        {"do_center_crop": True, "crop_size": {"height": 20, "width": 20}},
        {"do_pad": True, "pad_size": {"height": 64, "width": 64}},
        {"size": {"shortest_edge": 32}},
        {"size": {"shortest_edge": 32, "longest_edge": 40}},
        {"size": {"max_height": 30, "max_width": 30}},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.5], "image_std": [0.5]},
    ],
    ids=str,
)
def test_other_settings_are_left_to_stock(settings):
    processor = BlipImageProcessorPil(**{"size": SMALL} | settings)
    assert_same([random_image(seed, "RGB", (40, 30)) for seed in range(2)], processor)


def test_a_subclass_is_left_to_itself():
    class Inverting(BlipImageProcessorPil):
        def rescale(self, image, scale, **kwargs):
            return 1 - super().rescale(image, scale, **kwargs)

    assert_same([random_image(0, "L", (40, 30))], Inverting(size=SMALL))


def test_settings_are_read_at_each_call():
    processor, image = BlipImageProcessorPil(size=SMALL), random_image(0, "L", (40, 30))
    for name, value in (
        ("size", {"height": 20, "width": 30}),
        ("image_mean", [0.1, 0.2, 0.3]),
        ("image_std", (0.3, 0.2, 0.1)),
        ("rescale_factor", 1 / 128),
        ("resample", Image.Resampling.NEAREST),
        ("do_normalize", False),
    ):
        before = fast_pixel_values([image], processor)
        setattr(processor, name, value)
        assert_same([image], processor)
        after = fast_pixel_values([image], processor)
        assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_images_are_not_changed(mode):
    image = random_image(0, mode, (40, 30))
    before = (image.tobytes(), image.mode, image.size, dict(image.info))
    fast_pixel_values([image], BlipImageProcessorPil(size=SMALL))
    assert (image.tobytes(), image.mode, image.size, dict(image.info)) == before
