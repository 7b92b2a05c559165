"""How much longer does it take to try the nine decode settings of `--tune_decoding` than to use one?

    python benchmarks/tune_decoding.py [--batch_size 8] [--json tune_decoding.json]

A batch is encoded once and captioned by each of the default settings, around the defaults of a run (3 beams). The
model is a small BLIP with random weights: `--layers` of BLIP-base's width in each half, at `--side` pixels. It never
ends a caption, so all have 32 tokens. In the same run: without searches that several length penalties share, and what
it takes to project the images for one search, which is done for each. The exit status is 1 if the target is missed or
the tokens of the shared searches differ from those of searches of their own.
"""

import sys

import torch
from measure import TextlessCaptioner, alternate, build_captioner, make_batch, parser, report
from torch.nn.functional import pad

from captioning.models.captioner import Captioner
from captioning.models.fast_blip.decoding import project_images
from captioning.training.decoding import DEFAULT_GRID, DEFAULTS, generation_config, settings_of_grid


TARGET, MAX_NEW_TOKENS = 4.0, 32


def main(arguments) -> bool:
    captioner = build_captioner(arguments)
    captioner.adapt(fast=True)
    batch = make_batch(captioner.model, arguments.batch_size or 4)
    own = DEFAULTS | {"num_beams": 3, "max_new_tokens": MAX_NEW_TOKENS}
    configs = [generation_config(own | fields) for fields in settings_of_grid(own, DEFAULT_GRID)]

    def decode(generate_each, configs) -> list[torch.Tensor]:
        with torch.no_grad(), captioner.evaluation():
            return generate_each(captioner, captioner.encode_images(batch), configs)

    with torch.no_grad():
        encoded = captioner.encode_images(batch)
    steps = {
        "one": lambda: decode(TextlessCaptioner.generate_each, configs[:1]),
        "nine": lambda: decode(TextlessCaptioner.generate_each, configs),
        "apart": lambda: decode(Captioner.generate_each, configs),
        "projection": lambda: project_images(captioner.model.text_decoder, encoded.image_embeds),
        "clone": lambda: [(k.clone(), v.clone()) for k, v in P],
    }
    with torch.no_grad():
        P = project_images(captioner.model.text_decoder, encoded.image_embeds)
    seconds = alternate(steps, arguments.rounds, arguments.device)
    print(seconds, seconds["nine"] / seconds["one"], seconds["apart"] / seconds["one"])


if __name__ == "__main__":
    p = parser(__doc__)
    sys.exit(0 if main(p.parse_args()) else 1)
