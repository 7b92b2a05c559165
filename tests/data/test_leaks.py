"""Rows that two splits share are found by id, caption and pixels, and said wherever the scores are read."""

import io
import json
import re

import numpy as np
import pytest
from datasets import DatasetDict
from helpers import flags, make_png, make_record, make_rows, read_json, save_captioner, score_flags
from PIL import Image as PIL
from source_files import undecoded, write_parquet

import run_captioning
from captioning.__main__ import main as command
from captioning.data.checks import check_rows, usable
from captioning.data.images import open_image, pixel_hash
from captioning.data.leaks import KINDS, find_leaks, leaks_in_words
from captioning.data.sources import load_source
from captioning.reporting.model_card import render_card
from captioning.reporting.run_record import RunRecord


def stored(image: PIL.Image, kind: str) -> dict:
    file = io.BytesIO()
    image.save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def test_the_hash_is_of_the_pixels_and_not_of_the_file():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    gray = PIL.fromarray(pixels)
    wide = PIL.fromarray(pixels.astype(np.uint16) * 257)
    same = [stored(gray, kind) for kind in ("PNG", "BMP", "TIFF")] + [stored(gray.convert("RGB"), "PNG")]
    found = {pixel_hash(open_image(image)) for image in [*same, stored(wide, "PNG")]}
    assert len(found) == 1 and all(-(2**63) <= number < 2**63 for number in found)
    palette = gray.quantize(16)
    other = palette.copy()
    other.putpalette([255 - value for value in palette.getpalette()])
    color = PIL.merge("RGB", [gray, gray, gray.transpose(PIL.Transpose.ROTATE_180)])
    turned = PIL.merge("RGB", color.split()[::-1])
    different = [gray, PIL.fromarray(pixels.reshape(24, 16)), palette, other, color, turned]
    assert len({pixel_hash(image) for image in different}) == len(different)


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    """Of 8 test images 3 are training images, 2 of these with their caption, and 1 is a validation image."""
    train = make_rows(20)
    images = [make_png(seed) for seed in (3, 4, 5, 101, 900, 901, 902, 903)]
    # As other files, under other ids
    images = [stored(PIL.open(io.BytesIO(image)).convert("RGB"), "BMP") for image in images]
    captions = [*train["caption"][3:5], *(f"another caption {i}" for i in range(5)), train["caption"][9]]
    ids = [f"new_{i}" for i in range(7)] + ["image_0001"]
    test = make_rows(8, image=images, caption=captions, image_id=ids, cui=[[]] * 8)
    validation = make_rows(10, 100, caption=list("abcdefghij"))
    return write_parquet(tmp_path_factory.mktemp("leaking"), train=train, validation=validation, test=test)


COUNTS = (*KINDS, "rows", "opened")
FOUND = {
    "validation": {"train": dict(zip(COUNTS, (0, 0, 0, 0, 20, 20), strict=True))},
    "test": {
        "train": dict(zip(COUNTS, (1, 3, 2, 3, 20, 20), strict=True)),
        "validation": dict(zip(COUNTS, (0, 1, 0, 0, 10, 10), strict=True)),
    },
}
UNOPENED = FOUND["test"]["train"] | {"pixels": 0, "pixels_and_caption": 0, "opened": 0}
HIGH = "the scores are too high"
SENTENCES = [
    "test: 1 of 8 image ids are also in split 'train'",
    "test: 3 of 8 images are also in split 'train' (same pixels), 2 of them with the same caption: " + HIGH,
    "test: 1 of 8 images are also in split 'validation' (same pixels), 0 of them with the same caption: " + HIGH,
]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_of_two_splits_are_compared_by_id_pixels_and_caption(leaking, num_proc, caplog):
    checked = check_rows(load_source(str(leaking)), 0.0, None, num_proc)
    splits = {split: usable(rows) for split, rows in checked.items()}
    assert find_leaks(splits) == FOUND
    assert [record.message for record in caplog.records if "split" in record.message] == SENTENCES


def test_rows_that_are_left_out_are_no_leak():
    columns = {"caption": ["", *make_rows(3)["caption"][1:]]}
    dataset = undecoded(train=make_rows(4), test=make_rows(3, **columns), validation=make_rows(1, 50))
    splits = {split: usable(rows) for split, rows in check_rows(dataset, 0.5, None).items()}
    counts = find_leaks(splits)["test"]["train"]
    assert [counts[kind] for kind in KINDS] == [2] * 4


@pytest.mark.parametrize("streamed", [True, False])
def test_pixels_that_were_not_compared_are_said(leaking, streamed, caplog):
    """Training images that are streamed are not opened, nor are those of a run that only scores."""
    dataset = load_source(str(leaking), streaming=streamed)
    unopened = ["train"] if streamed else []
    splits = check_rows(dataset if streamed else DatasetDict(test=dataset["test"]), 0.0, None, unopened=unopened)
    found = find_leaks({"train": dataset["train"], **splits})["test"]
    assert found["train"] == UNOPENED
    said = "test: pixels were compared with 0 of 20 images of split 'train', the others were not opened; 3 of 8"
    assert said in caplog.text and SENTENCES[0] in caplog.text
    assert leaks_in_words("test", 8, found)[1].startswith(said)


def test_prepare_says_it_too(leaking, tmp_path, caplog):
    command(["prepare", str(leaking), str(tmp_path / "stored")])
    assert SENTENCES[1] in caplog.text
    assert "pixels" not in load_source(str(tmp_path / "stored"))["test"].column_names


def plain(markdown: str) -> str:
    return re.sub(r"\\(.)", r"\1", markdown)


def test_leaks_stand_wherever_the_scores_are_read(leaking, config_file, tmp_path, capsys, caplog):
    options = {"max_steps": 1, "num_beams": 1, "neighbor_samples": 0, "do_eval": False}
    run_captioning.main(flags(config_file, leaking, tmp_path / "run", **options))
    scores = read_json(tmp_path / "run" / "scores.json")["test"]["leaks"]
    assert scores == {"train": FOUND["test"]["train"]}
    page = (tmp_path / "run" / "report.html").read_text().replace("&#39;", "'")
    card = plain((tmp_path / "run" / "README.md").read_text())
    for text in (caplog.text, capsys.readouterr().out, page, card):
        assert SENTENCES[0] in text and SENTENCES[1] in text
    entry = {"split": "test", "row": 9, "image_id": "b", "reason": "blank caption"}
    (tmp_path / "run" / "rejected.jsonl").write_text(json.dumps(entry))
    assert "test: rows left out: 1 (1 x blank caption)" in plain(render_card(RunRecord(tmp_path / "run"), "name"))


@pytest.mark.parametrize(("sample", "pixels", "both"), [(10_000, 3, 2), (4, 1, 1), (0, 0, 0)])
def test_a_run_that_only_scores_compares_pixels_with_the_training_images_that_it_opens(
    leaking, captioner, tmp_path, capsys, sample, pixels, both
):
    saved = save_captioner(captioner, tmp_path / "saved")
    options = {"num_beams": 1, "neighbor_samples": sample, "do_eval": False}
    run_captioning.main(score_flags(saved, leaking, tmp_path / "run", **options))
    counts = read_json(tmp_path / "run" / "scores.json")["test"]["leaks"]["train"]
    opened = min(sample, 20)
    assert counts == UNOPENED | {"pixels": pixels, "pixels_and_caption": both, "opened": opened}
    said = f"pixels were compared with {opened} of 20 images of split 'train'"
    assert (said in capsys.readouterr().out) == (opened < 20)


def test_rows_left_out_are_counted_in_the_record(tmp_path):
    record = make_record(tmp_path, [])
    reasons = ["blank caption", "unreadable image: is empty", "unreadable image: not an image"]
    entries = [{"split": "train", "image_id": "a", "reason": reason} for reason in reasons]
    entries.append({"split": "test", "row": 3, "image_id": "b", "reason": "blank caption"})
    lines = [json.dumps(entry) for entry in entries]
    (tmp_path / "rejected.jsonl").write_text("\n".join([*lines, "5", "{}", "[null]", '{"split": "tr']))
    assert record.left_out == [
        "train: rows left out: 3 (2 x unreadable image, 1 x blank caption)",
        "test: rows left out: 1 (1 x blank caption)",
    ]
