"""DICOM files become the images that a viewer shows, and nothing of their headers goes anywhere else."""

import io
import logging
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
from datasets import load_from_disk
from helpers import flags, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import ROOT
from pydicom import Dataset, FileMetaDataset, uid
from pydicom.data import get_testdata_files
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from source_files import write_table

from captioning.__main__ import main
from captioning.data import dicom, images
from captioning.data.dicom import burned_in, count_frames, is_dicom, open_dicom
from captioning.data.images import open_image


MARK = "SECRETNAME"
GRADIENT = np.add.outer(np.arange(24), np.arange(20) * 3)  # 0 to 80
GRAY_8, GRAY_16, DEEP = GRADIENT.astype(np.uint8), GRADIENT.astype(np.uint16), (GRADIENT * 40).astype(np.uint16)


def dataset(pixels: np.ndarray, **elements) -> Dataset:
    """Return a data set of frames `[(frames,) rows, columns(, 3)]`, with these elements."""
    colors = pixels.ndim > 2 and pixels.shape[-1] == 3
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = elements.pop("syntax", uid.ExplicitVRLittleEndian)
    ds.SOPClassUID, ds.SOPInstanceUID = uid.CTImageStorage, uid.generate_uid()
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colors else pixels.shape[-2:]
    if pixels.ndim > 2 + colors:
        ds.NumberOfFrames = len(pixels)
    ds.SamplesPerPixel = 3 if colors else 1
    ds.PhotometricInterpretation = "RGB" if colors else "MONOCHROME2"
    if colors:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    if pixels.dtype.kind == "f":
        setattr(ds, "FloatPixelData" if ds.BitsAllocated == 32 else "DoubleFloatPixelData", pixels.tobytes())
    else:
        ds.BitsStored = elements.pop("BitsStored", ds.BitsAllocated)
        ds.HighBit = ds.BitsStored - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        content = pixels.tobytes()
        ds.PixelData = content + b"\0" * (len(content) % 2)
        ds["PixelData"].VR = "OW"
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def shown(pixels: np.ndarray, **elements) -> np.ndarray:
    return np.asarray(open_dicom(written(dataset(pixels, **elements))))


def lut(values: np.ndarray, first: int, bits: int, signed: bool = False) -> pydicom.Sequence:
    item = Dataset()
    item.add_new(0x00283002, "SS" if signed else "US", [len(values), first, bits])
    item.add_new(0x00283006, "OW", values.astype("<u2").tobytes())
    return pydicom.Sequence([item])


# --- The pixels of pydicom's own pipeline --------------------------------------------------------------------------


def by_pydicom(ds: Dataset, index: int) -> np.ndarray:
    """Return 0 to 255 as pydicom computes it, with the range that its documentation gives for its windows."""
    plugins = {uid.JPEGBaseline8Bit: "pillow", uid.JPEG2000: "pillow", uid.JPEG2000Lossless: "pillow"}
    arr = pixel_array(ds, index=index, decoding_plugin=plugins.get(ds.file_meta.TransferSyntaxUID, ""))
    if ds.SamplesPerPixel == 3:
        return np.rint(arr / (2.0**ds.BitsStored - 1) * 255)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        arr = pydicom.pixels.apply_color_lut(arr, ds)
        return np.rint(arr / float(np.iinfo(arr.dtype).max) * 255)
    values = apply_modality_lut(arr, ds)
    if "WindowWidth" in ds or "VOILUTSequence" in ds:
        low = -(2 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0
        high = low + 2**ds.BitsStored - 1
        low, high = apply_modality_lut(np.array([low, high]), ds)
        if "VOILUTSequence" in ds:
            low, high = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
        values = apply_voi_lut(values, ds)
    elif ds.BitsStored == 8 and arr.dtype == np.uint8 and np.array_equal(values, arr):
        low, high = 0, 255
    else:
        low, high = values.min(), values.max()
    gray = np.clip(np.rint((values - float(low)) * (255 / (float(high) - float(low)))), 0, 255)
    return 255 - gray if ds.PhotometricInterpretation == "MONOCHROME1" else gray


READABLE = [path for path in sorted(get_testdata_files()) if os.path.isfile(path) and is_dicom(path)]


def test_pydicoms_test_files_have_the_pixels_of_its_own_pipeline_or_a_reason():
    compared, reasons = 0, set()
    for path in READABLE:
        try:
            frames = count_frames(path)
            image = open_dicom(path)
        except ValueError as error:
            reasons.add(str(error).split(":")[0].split(";")[0])
            continue
        with warnings.catch_warnings(action="ignore"):
            expected = by_pydicom(pydicom.dcmread(path), frames // 2)
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1, path  # of rounding
        assert (np.asarray(image) == expected).mean() > 0.95, path
        assert open_dicom(Path(path).read_bytes()) == image
        compared += 1
    assert compared == 87
    assert reasons == {
        "is a DICOM without pixels",
        "is a DICOM whose header lacks what an image needs",
        "is a damaged DICOM",
        "is a truncated DICOM",
        "is stored as JPEG Extended (Process 2 and 4)",
    }


WINDOWS = {
    "none": {},
    "linear": {"WindowCenter": 30, "WindowWidth": 40},
    "narrowest": {"WindowCenter": 30, "WindowWidth": 1},
    "first of two": {"WindowCenter": [30, 10], "WindowWidth": [40, 5]},
    "exact": {"WindowCenter": 30, "WindowWidth": 40, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 30, "WindowWidth": 40, "VOILUTFunction": "SIGMOID"},
    "table": {"VOILUTSequence": lut(np.arange(50)[::-1] * 1300, 5, 16)},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_bits_signs_windows_and_polarity_are_those_of_pydicom(kind, window, interpretation):
    for stored, rescale in ((0, {}), (0, {"RescaleSlope": 1.5, "RescaleIntercept": -12}), (1, {})):
        pixels = (GRADIENT - 20 * (kind[0] == "i")).astype(kind)
        options = WINDOWS[window] | rescale | {"PhotometricInterpretation": interpretation}
        ds = dataset(pixels, BitsStored=8 * pixels.itemsize - stored * (4 if pixels.itemsize > 1 else 0), **options)
        difference = np.abs(np.asarray(open_dicom(written(ds))) - by_pydicom(ds, 0))
        assert difference.max() <= 1
        assert (difference == 0).mean() > 0.9


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian]
)
def test_native_syntaxes_show_the_same(syntax):
    pixels = (GRADIENT * 40).astype(np.int16)
    table = lut(np.arange(3000) * 20, -10, 16, signed=True)
    expected = shown(pixels, ModalityLUTSequence=table)
    assert expected.std() > 20
    swapped = pixels.astype(">i2") if syntax == uid.ExplicitVRBigEndian else pixels
    if syntax == uid.ExplicitVRBigEndian:
        table[0].LUTData = np.frombuffer(table[0].LUTData, "<u2").astype(">u2").tobytes()
    np.testing.assert_array_equal(shown(swapped, syntax=syntax, ModalityLUTSequence=table), expected)


def test_a_table_of_8_bits_may_have_more_than_256_entries():
    table = np.clip(np.arange(4096) // 13, 0, 255)
    np.testing.assert_array_equal(shown(DEEP, VOILUTSequence=lut(table, 0, 8)), table[DEEP])


def test_an_unreadable_window_is_none():
    content = written(dataset(DEEP, WindowCenter=30, WindowWidth=[20, 9]))
    place = content.index(b"\x28\x00\x50\x10DS") + 8
    broken = content[:place] + b"ab" + content[place + 2 :]
    np.testing.assert_array_equal(np.asarray(open_dicom(broken)), shown(DEEP))
    np.testing.assert_array_equal(shown(DEEP, WindowCenter=30, WindowWidth=0), shown(DEEP))


def test_colors_in_planes_and_in_luminance_are_the_same_picture():
    rgb = np.stack([GRADIENT * 3, 255 - GRADIENT, GRADIENT * 2], -1).astype(np.uint8)
    np.testing.assert_array_equal(shown(rgb), rgb)
    planes = dataset(rgb, PlanarConfiguration=1, PixelData=rgb.transpose(2, 0, 1).tobytes())
    np.testing.assert_array_equal(np.asarray(open_dicom(written(planes))), rgb)
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    assert np.abs(shown(ybr, PhotometricInterpretation="YBR_FULL").astype(int) - rgb).max() <= 3
    deep = rgb.astype(np.uint16) * 16
    assert np.abs(shown(deep, BitsStored=12).astype(int) - rgb).max() <= 1


def test_a_palette_is_applied():
    colors = np.random.default_rng(0).integers(0, 2**16, (3, 100))
    names = [f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue")]
    elements = {f"{name}Descriptor": [100, 0, 16] for name in names}
    elements |= {f"{name}Data": table.astype("<u2").tobytes() for name, table in zip(names, colors, strict=True)}
    pixels = shown(GRAY_8, PhotometricInterpretation="PALETTE COLOR", **elements)
    np.testing.assert_array_equal(pixels, np.rint(colors[:, GRADIENT].transpose(1, 2, 0) / 257))


def test_inverse_presentation_inverts_once():
    inverted = 255 - shown(DEEP)
    np.testing.assert_array_equal(shown(DEEP, PresentationLUTShape="INVERSE"), inverted)
    both = {"PresentationLUTShape": "INVERSE", "PhotometricInterpretation": "MONOCHROME1"}  # as the standard has it
    np.testing.assert_array_equal(shown(DEEP, **both), inverted)
    np.testing.assert_array_equal(shown(DEEP, PresentationLUTShape="IDENTITY"), 255 - inverted)


@pytest.mark.parametrize("limit", [{}, {"PixelPaddingRangeLimit": -1900}])
def test_padding_is_left_out_of_the_range(limit):
    pixels = (GRADIENT * 10).astype(np.int16)
    pixels[:3] = -2000
    pixels[1] = -1950 if limit else -2000
    without = shown(pixels, PixelPaddingValue=-2000, **limit)
    assert without[:3].max() == 0
    np.testing.assert_array_equal(without[3:], np.rint((pixels[3:] - 30.0) / (pixels[3:].max() - 30) * 255))


def test_floats_are_scaled_without_nan_and_infinity():
    pixels = GRADIENT / 7 - 3
    pixels[0, :3] = np.nan, np.inf, -np.inf
    for kind in (np.float32, np.float64):
        result = shown(pixels.astype(kind))
        assert (*result[0, :3], result[-1, -1]) == (0, 255, 0, 255)
    with pytest.raises(ValueError, match="only NaN"):
        shown(np.full((9, 9), np.nan, np.float32))


def test_the_frame_asked_for_is_decoded_and_has_its_own_window():
    frames = np.stack([GRADIENT + 40 * frame for frame in range(5)]).astype(np.uint16)
    content = written(dataset(frames, WindowCenter=100, WindowWidth=256))
    assert count_frames(content) == 5
    values = [np.asarray(open_dicom(content, frame)).astype(int) for frame in range(1, 6)]
    assert all((after - before)[0, 0] > 30 for before, after in pairwise(values))
    np.testing.assert_array_equal(np.asarray(open_dicom(content)), values[2])
    np.testing.assert_array_equal(np.asarray(open_image({"bytes": content}, 5)), values[4])
    for frame in (0, 6):
        with pytest.raises(ValueError, match="has 5 frames"):
            open_dicom(content, frame)

    def window(center: int) -> Dataset:
        item, group = Dataset(), Dataset()
        item.WindowCenter, item.WindowWidth = center, 40
        group.FrameVOILUTSequence = [item]
        return group

    of_frames = dataset(
        np.stack([GRADIENT] * 2).astype(np.uint16),
        SharedFunctionalGroupsSequence=[window(9)],
        PerFrameFunctionalGroupsSequence=[window(20), window(70)],
    )
    first, second = (np.asarray(open_dicom(written(of_frames), frame)).mean() for frame in (1, 2))
    assert first - second > 60


# --- Files as they come --------------------------------------------------------------------------------------------


def test_a_file_without_preamble_is_known_by_its_content(tmp_path):
    content = written(dataset(GRAY_16))
    expected = np.asarray(open_dicom(content))
    bare = io.BytesIO()
    implicit = dataset(GRAY_16)
    del implicit.file_meta
    implicit.save_as(bare, implicit_vr=True, little_endian=True, enforce_file_format=False)
    for without in (content[132:], bare.getvalue()):
        (tmp_path / "IM0001").write_bytes(without)
        assert is_dicom(without)
        np.testing.assert_array_equal(np.asarray(open_image({"path": str(tmp_path / "IM0001")})), expected)
    for other in (b"", b"%PDF-1.7", b"\x08\0", b"II*\0" + bytes(200), b"\xff\xd8\xff\xe0"):
        assert not is_dicom(other)


def test_only_the_frame_is_read_of_a_large_file(tmp_path):
    frames = 3000
    ds = dataset(np.zeros((2, 64, 64), np.uint16), NumberOfFrames=frames, WindowCenter=5, WindowWidth=10)
    content = written(ds)
    head = content[: -2 * 64 * 64 * 2 - 4] + struct.pack("<I", frames * 64 * 64 * 2)
    with open(tmp_path / "big.dcm", "wb") as file:
        file.write(head)
        file.truncate(len(head) + 200 * 2**30)  # sparse: more than this machine has
    assert np.asarray(open_dicom(tmp_path / "big.dcm", frames)).max() == 0


@pytest.mark.parametrize(
    ("syntax", "package"),
    [
        (uid.JPEGLSLossless, "pip install python-gdcm"),
        (uid.JPEGLosslessSV1, "pip install python-gdcm"),
        (uid.HTJ2K, "pip install pylibjpeg-openjpeg"),
        (uid.MPEG2MPML, "not supported"),
    ],
)
def test_a_syntax_without_its_decoder_names_both(monkeypatch, syntax, package):
    if syntax != uid.MPEG2MPML:
        monkeypatch.setattr(dicom.get_decoder(syntax), "_available", {})
    ds = dataset(GRAY_8, syntax=syntax, PixelData=encapsulate([b"\xff\xd8" + bytes(100)]))
    ds["PixelData"].is_undefined_length = True
    with pytest.raises(ValueError) as error:
        open_dicom(written(ds))
    assert syntax.name in str(error.value)
    assert package in str(error.value)


def test_lossy_pixels_do_not_depend_on_what_is_installed(monkeypatch):
    path = next(path for path in READABLE if path.endswith("SC_rgb_dcmtk_+eb+cy+np.dcm"))
    expected = open_dicom(path)
    decoder = dicom.get_decoder(uid.JPEGBaseline8Bit)
    monkeypatch.setattr(decoder, "_available", {"pillow": decoder._available["pillow"]})
    assert open_dicom(path) == expected


# --- What the header says of the patient ---------------------------------------------------------------------------


def full_of_marks(pixels: np.ndarray, **elements) -> Dataset:
    ds = dataset(pixels, **elements)
    for tag, (vr, _, _, _, keyword) in list(pydicom.datadict.DicomDictionary.items()):
        is_text = vr in ("PN", "LO", "SH", "LT", "ST", "UT", "CS", "AE") and keyword != "SpecificCharacterSet"
        if tag >> 16 in (0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0040) and is_text and keyword not in ds:
            ds.add_new(tag, vr, MARK)
    ds.WindowCenterWidthExplanation = MARK
    return ds


BROKEN = {
    "whole": {},
    "burned": {"BurnedInAnnotation": "YES"},
    "polarity": {"PhotometricInterpretation": MARK},
    "window": {"WindowCenter": None, "VOILUTFunction": MARK},
    "shape": {"PresentationLUTShape": MARK},
}


def test_nothing_of_the_header_is_printed_logged_or_stored(tmp_path, capfd, caplog):
    scans = tmp_path / "scans"
    scans.mkdir()
    with warnings.catch_warnings(action="ignore"):
        files = {name: written(full_of_marks(DEEP, **elements)) for name, elements in BROKEN.items()}
    whole = files["whole"]
    assert MARK.encode() in whole
    files |= {
        "number": whole.replace(b"MONOCHROME2", MARK.encode() + b"X").replace(b"CS\0\0", b"IS\0\0"),
        "syntax": whole.replace(b"1.2.840.10008.1.2.1\0", MARK.encode().ljust(20, b"X")),
        "cut": whole[:-300],
        "half": whole[: len(whole) // 2],
    }
    for name, content in files.items():
        (scans / f"{name}.dcm").write_bytes(content)
    rows = [{"path": f"{name}.dcm", "caption": f"No effusion {name}."} for name in (*files, "gone")]
    write_table(scans / "captions.csv", *rows)
    options = ["--max_rejected_fraction", "1", "--test_fraction", "0", "--validation_fraction", "0"]
    with caplog.at_level(logging.DEBUG):
        main(["prepare", str(scans), str(tmp_path / "stored"), *options])
    stored = load_from_disk(str(tmp_path / "stored"))["train"]
    assert {row["image_id"] for row in stored} >= {"whole.dcm", "burned.dcm", "shape.dcm", "window.dcm"}
    assert stored[0]["image"].format == "PNG"
    assert "1 of 10 images have text burned into the pixels" in caplog.text
    written_out = capfd.readouterr()
    assert MARK not in caplog.text + written_out.out + written_out.err
    files = [path.read_bytes() for path in (tmp_path / "stored").rglob("*") if path.is_file()]
    assert not any(MARK.encode() in content for content in files)
    reasons = (tmp_path / "stored" / "rejected.jsonl").read_text()
    assert "unknown transfer syntax" in reasons
    assert "truncated" in reasons
    for row in stored:  # the pixels are those of the file
        opened = open_image({"path": str(scans / row["image_id"])})
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(opened))
        assert MARK not in repr(opened.info)


def test_a_run_on_dicom_leaves_nothing_of_the_headers(tmp_path, config_file):
    scans = tmp_path / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(action="ignore"):
        for number in range(20):
            pixels = rng.integers(0, 4096, (40, 36)).astype(np.uint16)
            (scans / f"{number}").write_bytes(written(full_of_marks(pixels, BitsStored=12)))
    rows = [{"path": number, "caption": f"Scan {number} shows nothing."} for number in range(20)]
    write_table(scans / "captions.csv", *rows)
    process = run(flags(config_file, scans, tmp_path / "run", num_train_epochs=1, publish_images=True))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"report.html", "sample.png", "README.md"} <= {path.name for path in files}
    assert not [path for path in files if MARK.encode() in path.read_bytes()]
    assert MARK not in process.stdout + process.stderr


def test_an_error_keeps_no_cause_that_quotes_the_header():
    content = written(full_of_marks(GRAY_16, PhotometricInterpretation=MARK))
    with pytest.raises(ValueError) as error:
        open_dicom(content)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    assert MARK not in str(error.value)


def test_burned_in_text_is_what_the_header_says(tmp_path):
    for value, expected in (("YES", True), ("NO", False), (None, False)):
        elements = {} if value is None else {"BurnedInAnnotation": value}
        assert burned_in(open_dicom(written(dataset(GRAY_16, **elements)))) is expected
    assert not burned_in(Image.new("L", (9, 9)))


# --- Hostile files -------------------------------------------------------------------------------------------------


def test_sizes_are_bounded_before_anything_is_decoded():
    for name, value in (("Rows", 60000), ("NumberOfFrames", 2**31 - 1)):
        with pytest.raises(ValueError, match=r"truncated|at most"):
            open_dicom(written(dataset(GRAY_8, **{name: value})))
    with pytest.raises(ValueError, match="60000x60000 pixels; at most"):
        open_dicom(written(dataset(GRAY_8, Rows=60000, Columns=60000)))
    small = Image.new("L", (20, 24))
    large = Image.new("L", (2000, 2000))
    for form, syntax in (("JPEG", uid.JPEGBaseline8Bit), ("JPEG2000", uid.JPEG2000)):
        frames = []
        for image in (small, large):
            buffer = io.BytesIO()
            image.save(buffer, form)
            ds = dataset(GRAY_8, syntax=syntax, PixelData=encapsulate([buffer.getvalue()]))
            ds["PixelData"].is_undefined_length = True
            frames.append(written(ds))
        assert open_dicom(frames[0]).size == (20, 24)
        with pytest.raises(ValueError, match=r"has a frame of 2000x2000 pixels, its header says 20x24|larger"):
            open_dicom(frames[1])


def test_a_deflated_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(dicom, "MAX_INFLATED", 2**20)
    content = written(dataset(GRAY_8, syntax=uid.DeflatedExplicitVRLittleEndian))
    assert open_dicom(content).size == (20, 24)
    start = content[: 132 + 12 + struct.unpack_from("<I", content, 140)[0]]
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = start + packer.compress(bytes(2**21)) + packer.flush()
    with pytest.raises(ValueError, match="unpacks to more than 1,048,576 bytes"):
        open_dicom(bomb)


def test_files_without_an_image_say_what_they_are(tmp_path):
    (tmp_path / "empty.dcm").touch()
    with pytest.raises(ValueError, match="is empty"):
        open_image({"path": str(tmp_path / "empty.dcm")})
    for name, what in (("test-SR.dcm", "Comprehensive SR Storage"), ("rtplan.dcm", "RT Plan Storage")):
        path = next(path for path in READABLE if path.endswith(name))
        with pytest.raises(ValueError, match=f"without pixels: it is {what}"):
            open_image({"path": path})
    with pytest.raises(ValueError, match="shorter side"):
        open_image({"bytes": written(dataset(GRADIENT[:4].astype(np.uint8)))})


@pytest.mark.parametrize(
    ("name", "place", "value"), [("JPEGLSNearLossless_16.dcm", 586, 181), ("SC_rgb_jpeg_gdcm.dcm", 1374, 1)]
)
def test_gdcm_neither_aborts_the_process_nor_prints(capfd, name, place, value):
    content = bytearray(Path(next(path for path in READABLE if path.endswith(name))).read_bytes())
    content[place] = value
    if name.startswith("SC"):
        content[3538:3541] = b"\x7f\x0d\x7f"
    with pytest.raises(ValueError, match="damaged"):
        open_dicom(bytes(content))
    assert capfd.readouterr() == ("", "")


def test_a_header_cannot_name_more_frames_than_its_file_holds():
    """With `--frame all`, each would be an image."""
    content = written(dataset(GRAY_16, NumberOfFrames=2**31 - 1))
    with pytest.raises(ValueError, match="more frames than it can hold"):
        count_frames(content)


def test_a_decoder_that_hangs_ends(monkeypatch):
    monkeypatch.setattr(dicom, "MAX_GDCM_SECONDS", 0.3)
    with pytest.raises(EOFError):
        dicom._in_child(lambda: time.sleep(100))


def test_no_thread_prints_a_header_while_another_ends():
    """`catch_warnings` of two threads that do not nest would leave the second without it."""
    code = """
import io, sys, warnings
from pydicom.data import get_testdata_file
from captioning.data.dicom import _at_pixels
first, second = (_at_pixels(get_testdata_file("CT_small.dcm")) for _ in range(2))
first.__enter__(); second.__enter__(); first.__exit__(None, None, None)
warnings.warn_explicit("the name of a patient", UserWarning, "valuerep.py", 1, module="pydicom.valuerep")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stderr == ""


def test_no_letter_of_a_name_is_quoted_of_a_file_that_is_not_known_as_dicom():
    with pytest.raises(ValueError, match="not an image") as error:
        open_image({"bytes": b"\x10\0\x10\0PN\x10\0" + MARK.encode(), "path": None})
    assert MARK[:2] not in str(error.value)


SEEDS = [Path(path).read_bytes() for path in READABLE if os.path.getsize(path) < 12_000]
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6)


@settings(
    max_examples=800, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(st.sampled_from(SEEDS), CHANGES, CHANGES, st.floats(0.5, 1))
def test_damaged_dicom_is_decoded_or_refused(content, changes, in_head, kept):
    damaged = bytearray(content)
    for place, new in [*changes, *((place * 800 / len(content), new) for place, new in in_head)]:
        start = int(place * len(damaged))
        damaged[start : start + len(new)] = new
    damaged = bytes(damaged[: int(kept * len(damaged)) + 1])
    try:
        image = open_image({"bytes": damaged, "path": None})
    except ValueError as error:
        assert str(error)
    else:
        assert image.width * image.height <= images.MAX_PIXELS
