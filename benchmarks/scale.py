"""What do 1 to 8 processes send in a step of training, and how long do they wait for the slowest? By arithmetic alone.

    python benchmarks/scale.py [--per_device 32]

The parameters are those of BLIP-base, counted; each gradient is 4 bytes; a ring all-reduce sends and receives
2 (N - 1) / N of them in each of N processes. The rates are assumptions, not measurements: one direction of a card's
NVLink 4 (450 GB/s), of PCIe 4.0 x16 (25 of 32 GB/s), of Ethernet of 100 and 10 Gbit/s.

Each process pads its captions to the longest of its own batch. For the lengths of ROCOv2's captions, in the order in
which `PaddedSampler` deals them out, the table has the mean over the steps of an epoch of the largest by the mean of
the processes: of the padded tokens, and of the products of the whole step, images included.
"""

import argparse

import numpy as np
import torch
from measure import MAX_LENGTH, MEDIAN_LENGTH, SIGMA_LENGTH
from torch.utils.data import RandomSampler
from transformers import BlipConfig, BlipForConditionalGeneration

from captioning.files import PROJECT
from captioning.training.samplers import PaddedSampler


ROWS = 59_962  # of ROCOv2's training split
RATES = {"NVLink": 450e9, "PCIe": 25e9, "100 Gbit/s": 12.5e9, "10 Gbit/s": 1.25e9}  # bytes a second
PROCESSES = (1, 2, 4, 8)


def main(arguments: argparse.Namespace) -> None:
    config = BlipConfig.from_pretrained(PROJECT / "recipes" / "configs" / "blip_base.json")
    with torch.device("meta"):
        size = sum(weight.numel() for weight in BlipForConditionalGeneration(config).parameters())
    of_image, of_token = flops(config)
    print(f"parameters {size:,}, gradients {4 * size / 1e6:.0f} MB")
    print(f"products forward: {of_image / 1e9:.0f} GFLOP an image, {of_token / 1e9:.3f} a token of its caption\n")
    columns = "".join(f"{name + ', ms':>16}" for name in RATES)
    print(f"{'processes':<10}{'MB sent':>9}{columns}{'padded tokens':>16}{'whole step':>12}")
    for number in PROCESSES:
        sent = 2 * (number - 1) / number * 4 * size
        times = "".join(f"{1e3 * sent / rate:16.1f}" for rate in RATES.values())
        padded = padded_tokens(number, arguments.per_device)
        work = arguments.per_device * of_image + padded * of_token
        tokens, step = (float((each.max(axis=1) / each.mean(axis=1)).mean()) for each in (padded, work))
        print(f"{number:<10}{sent / 1e6:9.0f}{times}{tokens:16.3f}{step:12.3f}")


def flops(config: BlipConfig) -> tuple[float, float]:
    """Return the products of a forward pass for an image, and for each position of its caption."""
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    of_layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    of_vision = 2 * vision.num_hidden_layers * patches * (of_layer + 2 * patches * vision.hidden_size)
    keys_and_values = 2 * text.num_hidden_layers * patches * 2 * vision.hidden_size * text.hidden_size
    of_layer = 6 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size  # attention, of images too
    of_token = 2 * text.num_hidden_layers * (of_layer + 2 * patches * text.hidden_size)
    return of_vision + keys_and_values, of_token + 2 * text.hidden_size * text.vocab_size


def padded_tokens(number: int, per_device: int) -> np.ndarray:
    """Return the padded tokens of each step of an epoch but the last, which blank rows fill, `[steps, number]`."""
    lengths = MEDIAN_LENGTH * np.exp(SIGMA_LENGTH * np.random.default_rng(0).standard_normal(ROWS))
    lengths = lengths.round().clip(1, MAX_LENGTH)
    order = list(PaddedSampler(RandomSampler(range(ROWS)), ROWS, number * per_device, data_seed=0))
    whole = ROWS // (number * per_device) * number * per_device
    return per_device * lengths[order[:whole]].reshape(-1, number, per_device).max(axis=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per_device", type=int, default=32, help="images of a batch of a process")
    main(parser.parse_args())
