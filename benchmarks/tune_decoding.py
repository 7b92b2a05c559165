"""How much longer does it take to try the nine decode settings of `--tune_decoding` than to use one?

    python benchmarks/tune_decoding.py [--batch_size 8] [--json tune_decoding.json]

A batch is encoded once and captioned by each of the default settings; the first, 3 beams, is the one. The model is
BLIP-base at 384 pixels with random weights and 3 layers in each half (`--quick`: 2 at 96 pixels). It never ends a
caption, so all have 32 tokens, about what ROCOv2's have. Also: a search of its own for each setting, and what the
projection of the images takes, which each search does again, beside a copy of it. The least time of all rounds counts.

The exit status is 1 if the target is missed, or if the tokens of a shared search are not those of one of its own.
"""

import sys
import time

import torch
from measure import TextlessCaptioner, build_captioner, make_batch, now, parser, report

from captioning.models.captioner import Captioner
from captioning.models.fast_blip.decoder import project_images
from captioning.training.decoding import DEFAULT_GRID, DEFAULTS, generation_config, settings_of_grid


TARGET = 4.0
OWN = DEFAULTS | {"num_beams": 3, "max_new_tokens": 32}
LAYERS = 3


def main(arguments) -> bool:
    captioner = build_captioner(arguments)
    model = captioner.model
    for stack, name in ((model.vision_model.encoder, "layers"), (model.text_decoder.bert.encoder, "layer")):
        setattr(stack, name, getattr(stack, name)[:LAYERS])
    captioner.adapt(fast=True)
    batch = make_batch(model, arguments.batch_size or 4)
    configs = [generation_config(OWN | fields) for fields in settings_of_grid(OWN, DEFAULT_GRID)]

    @torch.no_grad()
    def decode(kind, configs) -> list[torch.Tensor]:
        with captioner.evaluation():
            return kind.generate_each(captioner, captioner.encode_images(batch), configs)

    with torch.no_grad():
        embeds = captioner.encode_images(batch).image_embeds
        projected = project_images(model.text_decoder, embeds)
    steps = {
        "one": lambda: decode(TextlessCaptioner, configs[:1]),
        "nine": lambda: decode(TextlessCaptioner, configs),
        "apart": lambda: decode(Captioner, configs),
        "projection": torch.no_grad()(lambda: project_images(model.text_decoder, embeds)),
        "copy": lambda: [(keys.clone(), values.clone()) for keys, values in projected],
    }
    decode(TextlessCaptioner, configs[:1])  # warm
    rounds = [[clocked(step, arguments.device) for step in steps.values()] for _ in range(arguments.rounds)]
    seconds = {name: min(found) for name, found in zip(steps, zip(*rounds, strict=True), strict=True)}
    pairs = zip(decode(TextlessCaptioner, configs), decode(Captioner, configs), strict=True)
    same = all(torch.equal(ours, own) for ours, own in pairs)
    ratio = {name: seconds[name] / seconds["one"] for name in ("nine", "apart")}
    rows = [
        {"what": f"one setting, {len(embeds)} images, seconds", "value": f"{seconds['one']:.2f}"},
        {"what": f"{len(configs)} settings", "value": f"{seconds['nine']:.2f}"}
        | {"ratio": ratio["nine"], "target": TARGET, "at_most": True},
        {"what": "  with a search for each", "value": f"{seconds['apart']:.2f}"},
        {"what": "  that is, times one", "value": f"{ratio['apart']:.2f}x"},
        {"what": "  tokens are the same", "value": str(same)},
        {"what": "projection of the images, for each search", "value": f"{seconds['projection']:.3f}"},
        {"what": "  a copy of it", "value": f"{seconds['copy']:.3f}"},
    ]
    return report(arguments, "Decode settings tried", rows, seconds=seconds) and same


def clocked(step, device: str) -> float:
    """Return the seconds of a step: on a CPU of the processor, which other processes disturb less."""
    started = now(device) if device == "cuda" else time.process_time()
    step()
    return (now(device) if device == "cuda" else time.process_time()) - started


if __name__ == "__main__":
    sys.exit(0 if main(parser(__doc__).parse_args()) else 1)
