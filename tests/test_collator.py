"""From image files of any kind to the batch that a captioner is trained on."""

import io
import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
from helpers import make_noise, make_png
from PIL import Image, ImageOps
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioning.data.images import open_image


def encode(image: Image.Image, format: str, **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def gradient(levels: int, dtype) -> np.ndarray:
    """A 32 x 32 image from 0 to `levels`, left to right."""
    return np.tile(np.linspace(0, levels, 32), (32, 1)).round().astype(dtype)


def test_batch_has_the_shapes_and_types_of_the_contract(collator, splits):
    rows = [splits["train"][i] for i in range(5)]
    batch = collator(rows)
    text = ((5, max(len(row["input_ids"]) for row in rows)), torch.int64)
    expected = {"pixel_values": ((5, 3, 32, 32), torch.float32)}
    expected |= dict.fromkeys(("input_ids", "attention_mask", "labels"), text)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == expected


def test_captions_start_with_dec_and_neither_start_nor_prompt_nor_padding_are_targets(collator, captioner, splits):
    """T3: the tokenizer would start with `[CLS]`. T4: `labels = input_ids` would train on padding."""
    captioner.set_prompt("an effusion")
    start, tokenizer = [captioner.config.text_config.bos_token_id, *captioner.prompt_ids], captioner.tokenizer
    assert len(start) > 2
    texts = splits["train"]["caption"][:5]
    rows, _ = captioner.tokenize(texts, 64)
    batch = collator([splits["train"][i] | {"input_ids": row} for i, row in enumerate(rows)])
    columns = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    for text, tokens, labels, mask in zip(texts, *columns, strict=True):
        caption = tokenizer(text)["input_ids"][1:]  # without `[CLS]`
        padding = len(tokens) - len(start) - len(caption)
        assert tokens.tolist() == start + caption + [tokenizer.pad_token_id] * padding
        assert labels.tolist() == [-100] * len(start) + caption + [-100] * padding
        assert mask.tolist() == [1] * (len(start) + len(caption)) + [0] * padding


@pytest.mark.parametrize("fast", [True, False])
def test_pixel_values_are_those_of_the_pil_image_processor(collator, captioner, splits, fast, monkeypatch):
    """T11: torchvision's resize gives other pixels."""
    captioner.adapt(fast=fast)
    rows = [splits["train"][i] for i in range(4)]
    images = [open_image(row["image"]) for row in rows]
    expected = BlipImageProcessorPil(size={"height": 32, "width": 32})(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(collator(rows)["pixel_values"], expected)
    monkeypatch.setattr(BlipImageProcessorPil, "__call__", lambda *_, **__: {"pixel_values": None})
    assert (collator(rows)["pixel_values"] is None) != fast, "the fast path calls the stock image processor"


@pytest.mark.parametrize("fast", [True, False])
def test_a_worker_gets_a_collator_without_weights_that_makes_the_same_batch(collator, captioner, splits, fast):
    captioner.adapt(fast=fast)
    captioner.set_prompt("an effusion")
    rows = [splits["train"][i] for i in range(4)]
    expected, content = collator(rows), pickle.dumps(collator)
    sent = pickle.loads(content)  # as worker processes get it that are not forked
    assert sent.captioner.model is None and captioner.model is not None
    assert len(content) < sum(p.nbytes for p in captioner.model.parameters()) / 2
    (loaded,) = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=1, collate_fn=collator)
    for batch in (sent(rows), loaded):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_images_are_never_flipped(collator, splits):
    """T14: the COCO recipe flips; here left and right matter. Forty draws of a left-bright image stay left-bright."""
    image = encode(Image.fromarray(gradient(255, np.uint8)[:, ::-1].copy()), "PNG")
    columns = collator([splits["train"][0] | {"image": image}] * 40)["pixel_values"].mean(dim=(1, 2))
    assert (columns[:, :12].mean(1) > columns[:, 12:].mean(1) + 1).all()


def test_an_image_that_breaks_after_the_check_is_named(collator, splits):
    row = dict(splits["train"][3]) | {"image": {"bytes": b"", "path": None}}
    with pytest.raises(ValueError, match="image_0003"):
        collator([row])


@pytest.mark.parametrize(("levels", "brightest"), [(255, 255), (1023, 255), (65535, 255), (33000, 128)])
def test_sixteen_bit_images_keep_their_gray_values(levels, brightest):
    """T12: `convert("RGB")` clips mode I;16 to white. Scanners use 10 to 16 of the 16 bits."""
    file = encode(Image.fromarray(gradient(levels, np.uint16)), "PNG")
    stock = Image.open(io.BytesIO(file["bytes"]))
    assert stock.mode == "I;16"
    opened = np.asarray(open_image(file)).astype(int)
    assert abs(opened - gradient(brightest, np.uint8)).max() <= 1
    if levels > 1023:
        assert (np.asarray(stock.convert("RGB")) == 255).mean() > 0.8


def test_float_images_are_stretched_and_nan_is_black():
    pixels = gradient(1, np.float32) - 0.5
    pixels[0, :] = np.nan
    opened = np.asarray(open_image(encode(Image.fromarray(pixels), "TIFF")))
    assert (opened.min(), opened.max(), opened[0].max()) == (0, 255, 0)


def test_exif_rotation_is_applied_to_a_copy():
    pixels = np.zeros((20, 30), np.uint8)
    pixels[:5] = 255  # a bright top edge
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    for opened in (open_image(encode(image, "PNG", exif=image.getexif())), open_image(image)):
        assert opened.size == (20, 30)
        assert np.asarray(opened)[:, -5:].min() == 255
    assert image.size == (30, 20) and np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_damaged_exif_neither_warns_nor_costs_the_image(form):
    """Pillow would print some lines for each such image, in each epoch."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03\0\x01"
    content = encode(Image.new("L", (20, 30)), form, **({} if form == "TIFF" else {"exif": exif}))
    if form == "TIFF":
        content["bytes"] = content["bytes"].replace(struct.pack("<HHI", 278, 4, 1), struct.pack("<HHI", 278, 4, 9**9))
    with warnings.catch_warnings(record=True, action="always") as caught:
        opened = Image.open(io.BytesIO(content["bytes"]))
        ImageOps.exif_transpose(opened, in_place=True)
    assert caught, "the file does not do what it is made for"
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert open_image(content).size == (20, 30)
    assert not caught


def test_cmyk_and_transparent_palette_images_get_their_colors(captioner):
    def pixel_values(image, form="PNG", **options):
        return captioner.pixel_values([open_image(encode(image, form, **options))])

    red = Image.new("RGB", (16, 16), (200, 30, 30))
    expected = pixel_values(red)
    assert torch.allclose(pixel_values(red.convert("CMYK"), "TIFF"), expected, atol=0.1)
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    white = pixel_values(Image.new("RGB", (16, 16), "white"))
    assert torch.allclose(pixel_values(palette, transparency=0), expected, atol=0.02)
    assert torch.allclose(pixel_values(palette, transparency=1), white)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "not an image: starts with b'<!DOCTYP'"),
        (make_png(0)[:200], "cannot be decoded"),
        (make_png(0, (1, 1)), "1x1 pixels"),
        (make_png(0, (300, 2)), "300x2 pixels"),
        (None, "no image"),
    ],
)
def test_what_is_not_an_image_is_rejected_with_the_reason(content, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        open_image({"bytes": content, "path": None})
    if content is not None:
        (tmp_path / "image.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            open_image({"bytes": None, "path": str(tmp_path / "image.jpg")})
    with pytest.raises(ValueError, match="missing"):
        open_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})


def test_a_truncated_jpeg_is_not_used_half_gray():
    file = encode(make_noise(size=(64, 64)), "JPEG")
    open_image(file)
    with pytest.raises(ValueError, match="truncated"):
        open_image({"bytes": file["bytes"][:-500], "path": None})
