"""How long does it take to sample captions for self-critical training, against stock `generate`?

    python benchmarks/sampling.py [--device cuda --dtype bfloat16 --batch_size 32] [--json sampling.json]

Both sides encode the images of a batch once and sample 4 captions of each. Stock is `generate` of the text decoder
with `num_return_sequences`. The model is BLIP-base at 384 pixels with random weights. It never ends a caption, so all
have 40 new tokens.
"""

import sys

import torch
from measure import alternate, autocast, build_captioner, make_batch, parser, report
from transformers import GenerationConfig


TARGET = 1.1
SAMPLES, TOKENS = 4, 40
TRUNCATED = {"temperature": 0.9, "top_k": 40, "top_p": 0.85}


def main(arguments) -> bool:
    captioner, number = build_captioner(arguments), arguments.batch_size or 4
    captioner.adapt(fast=True)
    batch = make_batch(captioner.model, number)
    uniforms = torch.rand(number, SAMPLES, TOKENS, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    settings = {"do_sample": True, "num_return_sequences": SAMPLES, "max_new_tokens": TOKENS} | TRUNCATED

    def ours():
        captioner.fast = True
        with captioner.evaluation():
            encoded = captioner.encode_images(batch)
            return captioner.sample(encoded, GenerationConfig(do_sample=True, **TRUNCATED), uniforms)

    def stock():
        captioner.fast = False
        return captioner.generate(captioner.encode_images(batch), GenerationConfig(**settings))

    with torch.no_grad(), autocast(arguments):
        seconds = alternate({"stock": stock, "ours": ours}, arguments.rounds, arguments.device)
    rows = [{"what": f"{name}, seconds", "value": f"{value:.2f}"} for name, value in seconds.items()]
    rows[1] |= {"ratio": seconds["stock"] / seconds["ours"], "target": TARGET}
    title = f"{SAMPLES} samples of {TOKENS} tokens of each of {number} images"
    return report(arguments, title, rows, seconds=seconds)


if __name__ == "__main__":
    sys.exit(0 if main(parser(__doc__).parse_args()) else 1)
