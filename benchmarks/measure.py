"""What the benchmarks of BLIP share: a model and batch, alternating rounds, the machine and its rate, a table."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil


sys.path.insert(0, str(Path(__file__).parent.parent))
from captioning.files import PROJECT
from captioning.models.blip import BlipCaptioner
from captioning.models.tokenizer import add_blip_tokens, train_tokenizer


# Length in WordPieces of ROCOv2's captions: median 31, mean 38; a log-normal of these has p90 70 and p99 137 where the
# captions have 68 and 134
MEDIAN_LENGTH, SIGMA_LENGTH = 31, 0.638
MAX_LENGTH = 128  # tokens
START, END, PADDING = 30522, 102, 0  # `[DEC]`, `[SEP]`, `[PAD]` of BLIP's vocabulary

SETTINGS = ("model", "batch_size", "images", "epochs", "workers")  # only results of the same are comparable
# On a CPU that other processes share, with one thread, processor time says what the wall clock cannot
CLOCK = "processor" if os.environ.get("PROCESSOR_TIME") else "wall"
clock = time.process_time if CLOCK == "processor" else time.perf_counter


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that the benchmarks of the model share."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: by autocast")
    found.add_argument("--model", default="base", choices=["base", "large"], help="BLIP-base or BLIP-large")
    found.add_argument("--batch_size", type=int, help="images")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds; no target is looked at")
    found.add_argument("--json", help="file that the figures are written to")
    return found


def autocast(arguments: argparse.Namespace):
    """Return the context in which both sides compute."""
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.dtype == "bfloat16")


def build_model(arguments: argparse.Namespace) -> BlipForConditionalGeneration:
    """Return BLIP-base or -large with random weights; with `--quick` one of 2 + 2 layers and 96 pixels."""
    torch.manual_seed(0)
    config = BlipConfig.from_pretrained(PROJECT / "recipes" / "configs" / "blip_base.json")
    config.vision_config.initializer_range = config.initializer_range
    text = config.text_config
    text.bos_token_id, text.pad_token_id = START, PADDING
    text.sep_token_id = text.eos_token_id = END
    if arguments.model == "large":  # as Salesforce/blip-image-captioning-large
        vision, config.text_config.encoder_hidden_size = config.vision_config, 1024
        vision.hidden_size, vision.intermediate_size = 1024, 4096
        vision.num_hidden_layers, vision.num_attention_heads = 24, 16
    if arguments.quick:
        config.vision_config.image_size = 96
        config.vision_config.num_hidden_layers = text.num_hidden_layers = 2
    return BlipForConditionalGeneration(config).eval().to(arguments.device)


class TextlessCaptioner(BlipCaptioner):
    """Its tokens are not turned into text: the tokenizer, which the trainers want, does not know them."""

    def decode(self, tokens):
        """Return N empty captions."""
        return [""] * len(tokens)


def build_captioner(arguments: argparse.Namespace) -> BlipCaptioner:
    """Return `build_model` with a processor for its images."""
    model = build_model(arguments)
    side = model.config.vision_config.image_size
    tokenizer = add_blip_tokens(train_tokenizer([__doc__], 200))
    return TextlessCaptioner(
        model, BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), tokenizer)
    )


def make_batch(model: BlipForConditionalGeneration, number: int, padded_to: int | None = None) -> dict[str, Any]:
    """Return a batch of `number` random images and captions as long as ROCOv2's, the same in each call."""
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    # Evenly spaced quantiles rather than a draw: a batch of any size is typical
    quantiles = (torch.arange(number) + 0.5) / number
    lengths = MEDIAN_LENGTH * torch.exp(SIGMA_LENGTH * torch.special.ndtri(quantiles))
    lengths = lengths.round().int().clamp(max=MAX_LENGTH).tolist()
    width = padded_to or max(lengths)
    input_ids = torch.randint(1000, 30000, (number, width), generator=generator)
    is_token = torch.arange(width) < torch.tensor(lengths)[:, None]
    input_ids[:, 0] = START
    input_ids[~is_token] = PADDING
    labels = input_ids.masked_fill(~is_token, -100)
    labels[:, 0] = -100
    batch = {
        "pixel_values": torch.randn(number, 3, side, side, generator=generator),
        "input_ids": input_ids,
        "attention_mask": is_token.long(),
        "labels": labels,
    }
    return {name: values.to(model.device) for name, values in batch.items()}


def alternate(functions: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Return the median seconds of each function over `rounds` alternating rounds, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = now(device)
            function()
            if number:
                seconds[name].append(now(device) - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def now(device: str) -> float:
    """Return the time in seconds, when the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return clock()


def matrix_rate(arguments: argparse.Namespace) -> float:
    """Return FLOP/s of the products of a vision layer's MLP, the best of some rounds, on 4 images of 577 patches.

    A GPU gets 64: it multiplies 4 in less time than a launch takes.

    The products that BLIP-base spends most of its time in, so that a step at this rate does nothing but multiply.
    """
    dtype, rows = getattr(torch, arguments.dtype), 577 * (4 if arguments.device == "cpu" else 64)
    left, right = (torch.randn(size, device=arguments.device).to(dtype) for size in ((rows, 768), (768, 3072)))
    return 2 * rows * 768 * 3072 / shortest(lambda: left @ right, arguments)


def read_rate(arguments: argparse.Namespace) -> float:
    """Return bytes/s at which memory is read in order, the best of some rounds, on 680 MB.

    As much as the keys and values of 16 images of BLIP-base in float32, which every new token reads.
    """
    values = torch.ones(170_000_000, device=arguments.device)
    return values.nbytes / shortest(values.sum, arguments)


def shortest(function: Callable[[], Any], arguments: argparse.Namespace) -> float:
    """Return the seconds of a call, the least of some rounds; a GPU gets ten calls at once, which hides the launch."""
    best, calls = float("inf"), 1 if arguments.device == "cpu" else 10
    for _ in range(20):
        started = now(arguments.device)
        for _ in range(calls):
            function()
        best = min(best, (now(arguments.device) - started) / calls)
    return best


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return hardware and versions."""
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "clock": CLOCK,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": os.getloadavg()[0],
        **{package: version(package) for package in ("torch", "transformers")},
    }


def processor() -> str:
    """Return the name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def report(arguments: argparse.Namespace, title: str, rows: list[dict[str, Any]], **figures: Any) -> bool:
    """Print a table, write `--json`, and return whether no target is missed.

    Args:
        arguments: of the benchmark.
        title: what is measured.
        rows: each with `what`, `value` as it is to be printed, where there is a ratio to stock `ratio`, and, where
            there is a target, `target`: at least that much, or at most if `at_most`.
        figures: more for the JSON.
    """
    described = machine(arguments)
    print(f"\n{title}\n" + ", ".join(f"{name} {value}" for name, value in described.items()) + "\n")
    reached = True
    for row in rows:
        line = f"{row['what']:<58}{row['value']:>12}"
        if "target" not in row and "ratio" in row:
            line += f"{row['ratio']:9.2f}x"
        elif "ratio" in row:
            met = row["ratio"] <= row["target"] if row.get("at_most") else row["ratio"] >= row["target"]
            row["reached"] = met
            reached &= met or arguments.quick
            sign = "at most " if row.get("at_most") else ""
            line += f"{row['ratio']:9.2f}x" + ("" if arguments.quick else f"   {sign}{row['target']}x: {met}")
        print(line)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name in SETTINGS}
        record = {"title": title, "quick": arguments.quick, "settings": settings, "machine": described, "rows": rows}
        record |= figures
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return reached
