"""DICOM: one frame as an image of 8 bits, as a viewer shows it; nothing else of the header is kept or quoted.

Values pass the modality LUT, the VOI LUT or window (PS3.3 C.11.1, C.11.2.1), and the inversion of MONOCHROME1. Headers
hold names of patients, and pydicom's messages quote headers: errors here are our own texts, its log is silent.
"""

import io
import logging
import math
import os
import pickle
import re
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from pydicom import Dataset, uid
from pydicom import __version__ as pydicom_version
from pydicom.datadict import DicomDictionary, tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels import as_pixel_options, get_decoder
from pydicom.pixels.utils import _get_jpg_parameters
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR


logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
# For all threads: `catch_warnings` of one ends where another leaves it first
warnings.filterwarnings("ignore", module="pydicom")

ENDINGS = (".dcm", ".dicom", ".ima", "")  # many archives write files without one
PREAMBLE = 128  # bytes, followed by "DICM"
BURNED_IN = "burned_in"  # a key of `Image.info`
# Of one image; mammograms, the largest in radiology, have 20 million. Rescaling floats takes some 32 bytes a pixel:
# with 22 million it stays below 1 GB
MAX_PIXELS = 2**26
MAX_PIXELS_16_BIT = 22 * 2**20
MIN_FRAME_BYTES = 8  # of 8x8 pixels of one bit, or of the head of a compressed frame
MAX_INFLATED = 2**28  # bytes of a deflated data set
MAX_JPEG_SCANS = 100  # encoders write about 10; each takes few bytes and makes the decoder pass over all pixels
MAX_GDCM_SECONDS = 60  # for one frame; the largest takes some seconds
PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")  # values of a frame go first
PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit", "FloatPixelPaddingValue", "DoubleFloatPixelPaddingValue")
OFFSETS = (0x7FE00001, 0x7FE00002)  # tables of where frames are
# The only elements of a header that are read
TAGS = [tag for tag in DicomDictionary if tag >> 16 == 0x0028 or tag in OFFSETS]
TAGS += [tag_for_keyword(name) for name in ("SOPClassUID", "PresentationLUTShape", *GROUPS)]
# One decoder for each syntax, whatever else is installed: pixels of lossy ones differ between decoders
PILLOW, GDCM = ("pillow", "pillow"), ("gdcm", "python-gdcm")
DECODERS = {
    uid.RLELossless: ("pydicom", "pydicom"),
    **dict.fromkeys((uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEG2000Lossless, uid.JPEG2000), PILLOW),
    **dict.fromkeys((uid.JPEGLossless, uid.JPEGLosslessSV1, *uid.JPEGLSTransferSyntaxes), GDCM),
    **dict.fromkeys((uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL), ("pylibjpeg", "pylibjpeg-openjpeg")),
}
# The first element of a file without preamble: of the file meta information, or of the data set
BARE = re.compile(rb"\x02\0[\0-\x02]\0(UL|OB|UI)|\x08\0[\0\x05\x08\x16]\0(UL|CS|UI|.\0\0\0)", re.DOTALL)


class UnusableDicom(ValueError):
    """What an image cannot be made of; the message quotes nothing of the header that may concern a patient."""


class _File(NamedTuple):
    content: BinaryIO  # at the value of the pixels
    header: Dataset
    options: dict[str, Any]  # of pydicom's decoders
    num_bytes: int  # of the pixels, as far as the file goes
    num_frames: int


def is_dicom(source: bytes | str | os.PathLike) -> bool:
    """Tell by its first bytes whether content or a file is DICOM; without the preamble, by its first element."""
    if not isinstance(source, bytes):
        if not os.path.isfile(source):
            return False
        with open(source, "rb") as file:
            source = file.read(PREAMBLE + 4)
    return source[PREAMBLE : PREAMBLE + 4] == b"DICM" or BARE.match(source) is not None


def count_frames(source: bytes | str | os.PathLike) -> int:
    """Return how many frames a DICOM says that it has; ValueError if it has no pixels, or is damaged."""
    with _at_pixels(source) as file:
        if file.num_frames > max(1, file.num_bytes / MIN_FRAME_BYTES):
            raise UnusableDicom("is a damaged DICOM: its header says more frames than it can hold")
        return file.num_frames


def open_dicom(source: bytes | str | os.PathLike, frame: int | str = "middle") -> Image.Image:
    """Decode one frame; of a file, no more than its header and that frame are read.

    Without a window, the range of the frame's values, padding left out, becomes 0 to 255; unsigned values of 8 bits
    stay as they are. Of several windows the first counts.

    Args:
        source: content or path.
        frame: its number from 1, or "middle", the later of two.

    Returns:
        An image of mode L or RGB; see `burned_in`.

    Raises:
        ValueError: the frame cannot be decoded; the message says why.
    """
    with _at_pixels(source) as file:
        index = file.num_frames // 2 if frame == "middle" else int(frame) - 1
        if not 0 <= index < file.num_frames:
            raise UnusableDicom(f"has {file.num_frames} frames; frame {frame} is none of them")
        pixels, interpretation = _decode(file, index)
        if pixels.ndim == 2 and interpretation in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"):
            pixels = _render(pixels, file.header, index, interpretation)
        elif pixels.ndim != 3 or interpretation != "RGB":
            raise UnusableDicom("has a photometric interpretation that is not supported")
        elif pixels.dtype != np.uint8:
            pixels = np.clip(np.rint(pixels * (255 / (2**file.header.BitsStored - 1))), 0, 255)
        image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
        image.info[BURNED_IN] = str(file.header.get("BurnedInAnnotation", "")).strip().upper() == "YES"
        return image


def burned_in(image: Image.Image) -> bool:
    """Tell whether an image is from a DICOM whose header says that text is burned into the pixels."""
    return image.info.get(BURNED_IN) is True  # of another file, any key is text


def installed_decoders() -> list[Any]:
    """Return the version of pydicom, and by compressed syntax the names of the decoders that are installed."""
    return [pydicom_version, *(get_decoder(syntax).available_plugins for syntax in DECODERS)]


# --- Reading --------------------------------------------------------------------------------------------------


@contextmanager
def _at_pixels(source: bytes | str | os.PathLike) -> Iterator[_File]:
    """Yield the file at its pixels; any error of the block but an `UnusableDicom` loses its text, which may quote."""
    content = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
    with content, warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        try:
            yield _read_header(content)
        except UnusableDicom:
            raise
        except (KeyError, AttributeError):
            raise UnusableDicom("is a DICOM whose header lacks what an image needs") from None
        except Exception as error:
            raise UnusableDicom(f"is a damaged DICOM: {type(error).__name__}") from None


def _read_header(content: BinaryIO) -> _File:
    start = PREAMBLE + 4 if content.read(PREAMBLE + 4).endswith(b"DICM") else 0
    content.seek(start)
    meta = read_dataset(content, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = meta.get("TransferSyntaxUID")
    if syntax is None:  # a bare data set, which is little endian
        vr = content.read(6)[4:].decode("latin-1")
        content.seek(-6, os.SEEK_CUR)
        syntax = uid.ExplicitVRLittleEndian if vr in set(VR) else uid.ImplicitVRLittleEndian
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        content = io.BytesIO(unpacker.decompress(content.read(MAX_INFLATED), MAX_INFLATED))
        if unpacker.unconsumed_tail:
            raise UnusableDicom(f"unpacks to more than {MAX_INFLATED:,} bytes")
        syntax = uid.ExplicitVRLittleEndian
    if syntax not in uid.UID_dictionary or not uid.UID(syntax).is_transfer_syntax:
        raise UnusableDicom("has an unknown transfer syntax")
    found: list[tuple[int, str | None, int]] = []

    def is_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in PIXELS:
            found.append((tag, vr, length))
        return tag in PIXELS

    order = (syntax.is_implicit_VR, syntax.is_little_endian)
    header = read_dataset(content, *order, stop_when=is_pixels, specific_tags=TAGS)
    if not found:
        kind = uid.UID(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
        name = f": it is {kind.name}" if kind in uid.UID_dictionary else ""
        raise UnusableDicom(f"is a DICOM without pixels{name}")
    tag, vr, length = found[-1]
    content.seek(12 if vr in EXPLICIT_VR_LENGTH_32 else 8, os.SEEK_CUR)
    place = content.tell()
    left = content.seek(0, os.SEEK_END) - place
    content.seek(place)
    about = {"transfer_syntax_uid": syntax, "pixel_keyword": PIXELS[tag], "pixel_vr": vr or "OW"}
    options = as_pixel_options(header, **about)
    return _File(content, header, options, min(length, left), max(1, int(options["number_of_frames"])))


def _decode(file: _File, index: int) -> tuple[np.ndarray, str]:
    """Return the values of a frame, `[rows, columns]` or `[rows, columns, 3]`, and what they mean."""
    header, options, plugin = file.header, file.options, ""
    syntax = options["transfer_syntax_uid"]
    names = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
    rows, columns, samples, bits = (int(header[name].value) for name in names)
    most = MAX_PIXELS if bits <= 8 else MAX_PIXELS_16_BIT
    if rows * columns > most:
        raise UnusableDicom(f"is {columns}x{rows} pixels; at most {most:,} are decoded")
    raw = rows * columns * samples * bits / 8  # bytes
    if syntax.is_encapsulated:
        plugin = _decoder(syntax, int(header.BitsStored), samples)
        place = file.content.tell()
        offsets = options.get("extended_offsets")
        encoded = get_frame(file.content, index, number_of_frames=file.num_frames, extended_offsets=offsets)
        file.content.seek(place)
        _check_frame(encoded, plugin, (columns, rows), raw)
    else:
        part = 2 / 3 if header.PhotometricInterpretation == "YBR_FULL_422" else 1
        if file.num_bytes < math.ceil((index + 1) * raw * part):
            raise UnusableDicom("is a truncated DICOM: its pixels are fewer than its header says")
    decode = partial(get_decoder(syntax).as_array, file.content, index=index, decoding_plugin=plugin, **options)
    pixels, properties = _in_child(decode) if plugin == GDCM[0] else decode()
    return pixels, str(properties["photometric_interpretation"])


def _in_child(decode: Callable[[], Any]) -> Any:
    """Return what `decode` does, from a forked process: on a damaged frame gdcm prints, and may abort or hang."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with open(write, "wb") as file:
                pickle.dump(decode(), file)
        finally:
            os._exit(0)
    os.close(write)
    limit = threading.Timer(MAX_GDCM_SECONDS, os.kill, (pid, signal.SIGKILL))
    limit.start()
    try:
        with open(read, "rb") as file:
            content = file.read()
    finally:
        limit.cancel()
        limit.join()
        os.kill(pid, signal.SIGKILL)  # it has ended, or nobody waits for it any more
        os.waitpid(pid, 0)
    return pickle.loads(content)  # nothing, or half of it, is an error too


def _decoder(syntax: uid.UID, bits: int, samples: int) -> str:
    """Return the name of the decoder of a compressed syntax; UnusableDicom if there is none, or none installed."""
    plugin, package = DECODERS.get(syntax, ("", ""))
    if syntax == uid.JPEGExtended12Bit and bits > 8:
        plugin, package = "pylibjpeg", "pylibjpeg-libjpeg"
    elif plugin == "pillow" and samples > 1 and bits > 8:
        plugin, package = GDCM
    if not plugin:
        raise UnusableDicom(f"is stored as {syntax.name}, which is not supported")
    if plugin not in get_decoder(syntax).available_plugins:
        raise UnusableDicom(f"is stored as {syntax.name}; to read it: pip install {package}")
    return plugin


def _check_frame(encoded: bytes, plugin: str, size: tuple[int, int], raw: float) -> None:
    """Raise UnusableDicom if decoding a frame takes much more memory or time than its header suggests."""
    if len(encoded) > 1.25 * raw + 2**16:
        raise UnusableDicom("has a frame that is larger compressed than not")
    if plugin != "pydicom":  # RLE names no size
        jpeg = _get_jpg_parameters(encoded)
        there = (jpeg["width"], jpeg["height"]) if jpeg else Image.open(io.BytesIO(encoded), formats=["JPEG2000"]).size
        if there != size:
            raise UnusableDicom(f"has a frame of {there[0]}x{there[1]} pixels, its header says {size[0]}x{size[1]}")
        if jpeg and encoded.count(b"\xff\xda") > MAX_JPEG_SCANS:
            raise UnusableDicom(f"has more than {MAX_JPEG_SCANS} JPEG scans")


# --- Rendering ------------------------------------------------------------------------------------------------


def _render(pixels: np.ndarray, header: Dataset, index: int, interpretation: str) -> np.ndarray:
    """Return stored values as 0 to 255, or as colors of a palette; each of few integers is rendered once."""
    for sequence, item in zip(GROUPS, (0, index), strict=True):
        for group in (header.get(sequence) or [])[item : item + 1]:
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for part in group.get(name) or ():
                    header.update(part)
    values, place, present = pixels, ..., np.ones(pixels.shape, bool)
    if pixels.dtype.kind in "iu" and int(pixels.max()) - int(pixels.min()) < 2**16:
        values = np.arange(int(pixels.min()), int(pixels.max()) + 1)
        place = pixels.astype(np.intp)
        place -= values[0]
        present = np.bincount(place.ravel(), minlength=len(values)) > 0
    if interpretation == "PALETTE COLOR":
        names = [f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue")]
        if f"{names[0]}Data" not in header:
            raise UnusableDicom("has a segmented palette, which is not supported")
        pairs = [[header[f"{name}{part}"].value for part in ("Descriptor", "Data")] for name in names]
        tables = [_look_up(values, *pair, header) for pair in pairs]
        return np.stack([np.rint(table * (255 / (2 ** (8 * size) - 1))) for table, size in tables], axis=-1)[place]
    padding = [header.get(name) for name in PADDING]
    padding = [np.asarray(value).astype(pixels.dtype) for value in padding if value is not None]  # US for SS, as some
    if padding:
        present &= (values < min(padding)) | (values > max(padding))
    gray = np.nan_to_num(np.clip(np.rint(_gray(values, present, header)), 0, 255)).astype(np.uint8)
    shape = str(header.get("PresentationLUTShape", "")).strip().upper()
    return (255 - gray if interpretation == "MONOCHROME1" or shape == "INVERSE" else gray)[place]


def _gray(stored: np.ndarray, present: np.ndarray, header: Dataset) -> np.ndarray:
    """Return 0 to 255 for stored values, whose `present` ones are the range without a window."""
    values = stored
    if tables := header.get("ModalityLUTSequence"):
        values, _ = _look_up(stored, tables[0].LUTDescriptor, tables[0].LUTData, header)
    elif header.get("RescaleSlope") is not None and header.get("RescaleIntercept") is not None:
        values = stored * float(header.RescaleSlope) + float(header.RescaleIntercept)
    if (tables := header.get("VOILUTSequence")) and tables[0].get("LUTData") is not None:
        values, _ = _look_up(values, tables[0].LUTDescriptor, tables[0].LUTData, header)
        return values * (255 / (2 ** int(tables[0].LUTDescriptor[2]) - 1))
    center, width = (_first(header, name) for name in ("WindowCenter", "WindowWidth"))
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    if math.isfinite(center) and (width >= 1 or (width > 0 and function in ("LINEAR_EXACT", "SIGMOID"))):
        if function == "SIGMOID":
            return 255 / (1 + np.exp(-4 * (values - center) / width))
        if function == "LINEAR_EXACT":
            return 255 * ((values - center) / width + 0.5)
        return 255 * (values - (center - width / 2)) / max(width - 1, 1e-9)
    if header.get("BitsStored") == 8 and header.get("PixelRepresentation") == 0 and np.array_equal(values, stored):
        return stored
    finite = np.isfinite(values)
    usable = values[finite & present]
    usable = usable if usable.size else values[finite]
    if not usable.size:
        raise UnusableDicom("has only NaN and infinite values")
    low, high = float(usable.min()), float(usable.max())
    return (values - low) * (255 / max(high - low, 1e-12))


def _first(header: Dataset, name: str) -> float:
    """Return a number, or the first of several; NaN if there is none."""
    try:
        return float(np.ravel(header.get(name))[0])
    except (TypeError, ValueError, IndexError):
        return math.nan


def _look_up(values: np.ndarray, descriptor: Any, data: Any, header: Dataset) -> tuple[np.ndarray, int]:
    """Return what a LUT makes of values, and its bytes an entry; values outside get the first or last (C.11.1.1)."""
    number, first = int(descriptor[0]) or 2**16, int(descriptor[1])
    if isinstance(data, bytes):  # OW
        order = "<" if header.original_encoding[1] else ">"
        data = np.frombuffer(data, f"{order}u{2 if len(data) >= 2 * number else 1}")
    table = np.asarray(data)[:number]
    places = np.clip(np.nan_to_num(np.floor(values)) - first, 0, len(table) - 1).astype(np.int64)
    return table[places].astype(np.float64), table.itemsize
