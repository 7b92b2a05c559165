"""How many milliseconds on one core from the bytes of an image file to `pixel_values`, and what bounds them?

    python benchmarks/input_pipeline.py [--images FOLDER] [--workers N] [--json input_pipeline.json] [--quick]

Stock is `Image.open` and `BlipImageProcessorPil`, ours is `open_image` and `fast_pixel_values`. In the same run, as
medians of alternating rounds, it measures what neither can leave out: to decode the file, and to decode it and let
Pillow resize it (one channel where all three are equal). `bound` is stock's time divided by that. Each kind of file
is a row; FOLDER is searched for image files and for Parquet files with a column `image`; without it images are
generated whose PNG files have about the bytes of real radiographs of that size. `--workers` adds the images per
second of a `DataLoader` with N processes, on all cores that the process may use.

The exit status is 1 if ours is less than 2.8 times as fast as stock for L, gray RGB or color RGB files (not checked
with `--quick`), or if a value differs by more than 1e-6.
"""

import os


os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before numpy is imported
if hasattr(os, "sched_setaffinity"):
    CORES = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(CORES)})
else:
    CORES = set()

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import pyarrow.parquet
import torch
import transformers
from PIL import Image, features
from torch.utils.data import DataLoader
from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil


sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import CLOCK, clock, processor

from captioning.data.images import open_image
from captioning.models.blip import BlipCaptioner
from captioning.models.fast_blip.pixel_values import fast_pixel_values
from captioning.models.tokenizer import add_blip_tokens, train_tokenizer
from collator import CaptioningCollator


TARGET = 2.8  # stock by ours
TOLERANCE = 1e-6
KINDS = ("L", "gray RGB", "color RGB")  # those with a target
SIZE = (640, 520)  # pixels, as most of ROCOv2
NOISE = 5.0  # gray levels; gives PNG files of 200 kB in mode L, as real chest radiographs have
IMAGES, ROUNDS = 16, 9
QUICK_IMAGES, QUICK_ROUNDS = 4, 3
LOADER_IMAGES, LOADER_BATCH = 256, 16

PROCESSOR = BlipImageProcessorPil()
OUTPUT = (PROCESSOR.size["width"], PROCESSOR.size["height"])


def main(arguments: argparse.Namespace) -> bool:
    number, rounds = (QUICK_IMAGES, QUICK_ROUNDS) if arguments.quick else (IMAGES, ROUNDS)
    groups = grouped(read_files(arguments.images) if arguments.images else generated_files(number), number)
    print(f"ms an image, one core of {processor()}\n")
    print(f"{'file':<18}{'images':>7}{'decode':>8}{'+resize':>9}{'stock':>8}{'ours':>8}{'bound':>8}{'ratio':>8}")
    rows = []
    for (kind, format), files in sorted(groups.items()):
        row = {"what": f"{kind} {format}", "kind": kind, "format": format, "images": len(files)}
        row |= measure(kind, files, rounds)
        row["reached"] = row["difference"] <= TOLERANCE and (kind not in KINDS or row["ratio"] >= TARGET)
        rows.append(row)
        print(
            f"{f'{kind} {format}':<18}{len(files):>7}{row['decode']:8.2f}{row['resize']:9.2f}{row['stock']:8.2f}"
            f"{row['ours']:8.2f}{row['bound']:7.2f}x{row['ratio']:7.2f}x"
            f"   {('reached' if row['reached'] else 'MISSED') if kind in KINDS else ''}"
        )
    reached = all(row["reached"] for row in rows)
    difference = max(row["difference"] for row in rows)
    print(f"\ntarget {TARGET}x {'reached' if reached else 'MISSED'}, largest difference of a value {difference:.1e}")
    loader = measure_loader(groups, arguments.workers, rounds) if arguments.workers else []
    for row in loader:
        print(f"DataLoader, {row['workers']} workers: {row['name']} {row['images_per_second']:.0f} images/s")
    if arguments.json:
        record = {"title": "Input pipeline", "quick": arguments.quick, "target": TARGET, "rounds": rounds}
        settings = {"images": arguments.images, "workers": arguments.workers}
        record |= {"settings": settings, "machine": machine(), "rows": rows, "loader": loader}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return reached or (arguments.quick and difference <= TOLERANCE)


# --- Files ----------------------------------------------------------------------------------------------------


def read_files(folder: str) -> Iterator[bytes]:
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if path.suffix == ".parquet":
            for image in pyarrow.parquet.read_table(path, columns=["image"])["image"].to_pylist():
                yield image["bytes"]
        else:
            yield path.read_bytes()


def generated_files(number: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for _ in range(number):
        gray, color = smooth_and_noisy(rng, 1), smooth_and_noisy(rng, 3)
        for image in (gray, gray.convert("RGB"), color):
            yield encode(image, "PNG")
            yield encode(image, "JPEG", quality=90)
        yield encode(gray.convert("RGBA"), "PNG")
        yield encode(color.quantize(), "PNG")


def smooth_and_noisy(rng: np.random.Generator, channels: int) -> Image.Image:
    width, height = SIZE
    noise = rng.normal(0, NOISE, (height, width, 1))
    smooth = [
        Image.fromarray(rng.integers(0, 256, (9, 11), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        for _ in range(channels)
    ]
    pixels = (np.stack(smooth, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grouped(files: Iterator[bytes], number: int) -> dict[tuple[str, str], list[bytes]]:
    """Return the first `number` files of each kind and format; what is not an image is left out."""
    groups = defaultdict(list)
    for content in files:
        with contextlib.suppress(OSError), Image.open(io.BytesIO(content)) as image:
            group = groups[kind_of(image), image.format]
            if len(group) < number:
                group.append(content)
    return groups


def kind_of(image: Image.Image) -> str:
    if image.mode != "RGB":
        return image.mode
    red, green, blue = (channel.tobytes() for channel in image.split())
    return "gray RGB" if red == green == blue else "color RGB"


# --- Measurements ---------------------------------------------------------------------------------------------


def measure(kind: str, files: list[bytes], rounds: int) -> dict[str, float]:
    """Return milliseconds an image of each step, the ratios, and the largest difference of stock's and our values."""
    steps = {
        "decode": lambda: decode(files),
        "resize": lambda: decode_and_resize(files, one_channel=kind == "gray RGB"),
        "stock": lambda: stock(files),
        "ours": lambda: ours(files),
    }
    row = {name: 1e3 * seconds / len(files) for name, seconds in alternating_medians(steps, rounds).items()}
    row |= {"bound": row["stock"] / row["resize"], "ratio": row["stock"] / row["ours"]}
    return row | {"difference": float((stock(files) - ours(files)).abs().max())}


def decode(files: list[bytes]) -> None:
    for content in files:
        Image.open(io.BytesIO(content)).load()


def decode_and_resize(files: list[bytes], one_channel: bool) -> None:
    for content in files:
        image = Image.open(io.BytesIO(content))
        (image.getchannel(0) if one_channel else image).resize(OUTPUT, PROCESSOR.resample)


def stock(files: list[bytes]) -> torch.Tensor:
    images = [Image.open(io.BytesIO(content)) for content in files]
    return PROCESSOR(images, return_tensors="pt")["pixel_values"]


def ours(files: list[bytes]) -> torch.Tensor:
    return fast_pixel_values([open_image({"bytes": content}) for content in files], PROCESSOR)


def measure_loader(groups: dict[tuple[str, str], list[bytes]], workers: int, rounds: int) -> list[dict]:
    """Return the images per second of stock and our collator on files of all kinds with a target, mixed."""
    if CORES:
        os.sched_setaffinity(0, CORES)
    files = [content for (kind, _), group in sorted(groups.items()) if kind in KINDS for content in group]
    examples = [{"image": {"bytes": files[i % len(files)]}, "input_ids": [0, 1]} for i in range(LOADER_IMAGES)]
    loaders = {
        name: DataLoader(
            examples,
            batch_size=LOADER_BATCH,
            num_workers=workers,
            persistent_workers=True,
            collate_fn=collator(fast=name == "ours"),
        )
        for name in ("stock", "ours")
    }
    steps = {name: lambda loader=loader: sum(1 for _ in loader) for name, loader in loaders.items()}
    seconds = alternating_medians(steps, min(rounds, 3), time.perf_counter)  # the workers' time, too
    return [
        {"name": name, "workers": workers, "cores": len(CORES), "images_per_second": len(examples) / seconds[name]}
        for name in loaders
    ]


def collator(fast: bool) -> CaptioningCollator:
    tokenizer = add_blip_tokens(train_tokenizer(["a chest radiograph"], vocab_size=100))
    with torch.device("meta"):  # no weights are needed
        captioner = BlipCaptioner(BlipForConditionalGeneration(BlipConfig()), BlipProcessor(PROCESSOR, tokenizer))
    captioner.adapt(fast=fast)
    return CaptioningCollator(captioner)


def alternating_medians(steps: dict[str, Callable], rounds: int, clock: Callable = clock) -> dict[str, float]:
    """Return the median seconds of each step, after one that is not counted."""
    seconds = defaultdict(list)
    for _ in range(1 + rounds):
        for name, step in steps.items():
            started = clock()
            step()
            seconds[name].append(clock() - started)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def machine() -> dict:
    versions = {module.__name__: module.__version__ for module in (np, PIL, torch, transformers)}
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "zlib_ng", "zlib")}
    same = {"device": processor(), "threads": 1, "dtype": "float32", "clock": CLOCK}
    return same | {"versions": {"python": platform.python_version()} | versions | codecs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("--quick", action="store_true")
    sys.exit(0 if main(parser.parse_args()) else 1)
