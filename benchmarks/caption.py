"""How soon is the first caption there, how fast are the next, and does memory stay flat?

    python benchmarks/caption.py [--images 1000] [--batch_size 8] [--json caption.json] [--quick]

Runs whole commands, `python -m captioning caption`, on a saved BLIP-base at 384 pixels with random weights, 3 beams
and 64 new tokens, on the CPU; another process imports PyTorch and transformers alone. Random weights hardly ever end a
caption, so each has all 64 tokens. The rate is that between the first and the last caption of a command; beside it, in
this process, the same images are captioned as the Trainer's `prediction_step` does, without the loss. For memory, a
small model captions 100 and `--images` images, by one command each, whose highest resident memory is compared.

Exits with status 1 if the first caption takes more than 10 s, the command's rate is below .9 of the evaluation's, or
the memory of the larger folder is more than 1.1 times that of the smaller.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import parser, report
from PIL import Image

from captioning.data.images import open_image
from captioning.files import PROJECT
from captioning.models.load import build_captioner, load_captioner
from captioning.training.decoding import generation_config


SETTINGS = dict(num_beams=3, max_new_tokens=64, min_new_tokens=0, no_repeat_ngram_size=0, length_penalty=1.0)
SECONDS, RATE, MEMORY = 10, 0.9, 1.1


def main(arguments) -> bool:
    size, rows = arguments.batch_size or 8, []
    with tempfile.TemporaryDirectory() as folder:
        large, small = (save_model(Path(folder), name) for name in ("blip_base", "blip_small"))
        model = small if arguments.quick else large
        images = draw(Path(folder) / "images", 1 + 2 * size)
        imports = [command(["-c", "import torch, transformers"])[1] for _ in range(arguments.rounds)]
        runs = [command(caption(model, images, size))[0] for _ in range(arguments.rounds)]
        first = float(np.median([times[0] for times in runs]))
        rate = float(np.median([(len(times) - 1) / (times[-1] - times[0]) for times in runs]))
        evaluated = evaluation_rate(model, images, size, arguments.rounds)
        rows.append({"what": "import of PyTorch and transformers, s", "value": f"{np.median(imports):.1f}"})
        rows.append({"what": "first caption after the start of the command, s", "value": f"{first:.1f}"})
        rows[-1] |= {"ratio": first / SECONDS, "target": 1, "at_most": True}
        rows.append({"what": "captions a second, evaluation", "value": f"{evaluated:.2f}"})
        rows.append({"what": "captions a second, command", "value": f"{rate:.2f}"})
        rows[-1] |= {"ratio": rate / evaluated, "target": RATE}
        few, many = 100, 200 if arguments.quick else arguments.images
        peaks = []
        for number in (few, many):
            found = draw(Path(folder) / f"images_{number}", number)
            peaks.append(command(caption(small, found, size, "--num_beams", "1", "--max_new_tokens", "8"))[2])
            rows.append({"what": f"highest memory for {number:,} images, MB", "value": f"{peaks[-1] / 2**20:,.0f}"})
        rows[-1] |= {"ratio": peaks[1] / peaks[0], "target": MEMORY, "at_most": True}
    return report(arguments, f"Captions of one's own images, batches of {size}", rows)


def save_model(folder: Path, name: str) -> Path:
    """Save a BLIP of `recipes/configs/` with random weights and a vocabulary of 30,522 entries at most."""
    words = (f"word{number}" for number in range(40_000))
    captioner = build_captioner(f"recipes/configs/{name}.json", 0, None, words, 30_522)
    captioner.set_generation_config(generation_config(SETTINGS))
    for part in (captioner.model, captioner.processor):
        part.save_pretrained(folder / name)
    return folder / name


def draw(folder: Path, number: int) -> Path:
    """Write gray JPEG files of 640 x 512 pixels of noise, as large as radiographs of ROCOv2."""
    folder.mkdir()
    for i in range(number):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 80), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 512)).save(folder / f"{i:05}.jpg")
    return folder


def caption(model: Path, images: Path, size: int, *flags: str) -> list[str]:
    """Return the words of the command after `python`."""
    words = ["-m", "captioning", "caption", str(model), str(images), "--device", "cpu", *flags]
    return [*words, "--batch_size", str(size)]


def command(words: list[str]) -> tuple[list[float], float, int]:
    """Run `python *words`; return when each line came and when it ended, in seconds, and its peak memory in bytes."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *words], cwd=PROJECT, stdout=subprocess.PIPE) as process:
        lines = [time.perf_counter() - started for _ in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    scale = 1 if sys.platform == "darwin" else 1024
    return lines, time.perf_counter() - started, usage.ru_maxrss * scale


def evaluation_rate(model: Path, images: Path, size: int, rounds: int) -> float:
    """Return captions a second of what the Trainer does with a batch, but for the loss, images opened included."""
    captioner, config = load_captioner(str(model)), generation_config(SETTINGS)
    captioner.adapt()
    paths, seconds = sorted(images.iterdir())[:size], []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        opened = [open_image({"bytes": None, "path": str(path)}) for path in paths]
        with torch.no_grad(), captioner.evaluation():
            batch = captioner.collate(opened, [captioner.prompt_row] * size)
            captioner.decode(captioner.generate(captioner.encode_images(batch), config).numpy())
        seconds.append(time.perf_counter() - started)
    return size / float(np.median(seconds[1:]))


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--images", type=int, default=1000)
    sys.exit(not main(flags.parse_args()))
