"""How long does a training step take against stock BLIP, and against the machine's matrix products?

    python benchmarks/training.py [--device cuda --dtype bfloat16 --batch_size 32] [--json training.json]

A step is forward, backward, clipping, fused AdamW and zeroed gradients, of BLIP-base at 384 pixels with captions as
long as ROCOv2's. Stock is transformers' BLIP: padded to the batch's longest caption as our collator does, and to 128
tokens as most scripts do. The matrix rate is measured in the same run; the products of our step are counted, not those
that it saves.
"""

import sys

import torch
from measure import alternate, autocast, build_model, make_batch, matrix_rate, parser, report
from torch.utils.flop_counter import FlopCounterMode

from captioning.models.fast_blip.modules import use_fast_blip


TARGETS = {  # the matrix rate: a share of the best measured
    "cpu": {"stock": 1.4, "padded": 1.6, "matrix rate": 0.85},
    "cuda": {"stock": 2.0, "padded": 2.0, "matrix rate": 0.45},
}
PADDED_TO = 128


def main(arguments) -> bool:
    model = build_model(arguments).train()
    batch_size = arguments.batch_size or (4 if arguments.device == "cpu" else 32)
    batches = {"dynamic": make_batch(model, batch_size), "padded": make_batch(model, batch_size, PADDED_TO)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(fast, batch) -> None:
        use_fast_blip(model, fast)
        with autocast(arguments):
            loss = model(**batches[batch], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step(True, "dynamic")
    flops = counter.get_total_flops() + attention_flops(model, batch_size, arguments)
    rates = [matrix_rate(arguments)]
    seconds = alternate(
        {
            "ours": lambda: step(True, "dynamic"),
            "stock": lambda: step(False, "dynamic"),
            "padded": lambda: step(False, "padded"),
        },
        1 if arguments.quick else arguments.rounds,
        arguments.device,
    )
    rates.append(matrix_rate(arguments))
    rate, targets = max(rates), TARGETS[arguments.device]
    rows = [{"what": f"ours, {batch_size} images, seconds a step", "value": f"{seconds['ours']:.3f}"}]
    for name, what in (("stock", "stock, padded to the longest"), ("padded", f"stock, padded to {PADDED_TO}")):
        ratio = seconds[name] / seconds["ours"]
        rows.append({"what": what, "value": f"{seconds[name]:.3f}", "ratio": ratio, "target": targets[name]})
    rows += [
        {"what": "matrix products alone, seconds", "value": f"{flops / rate:.3f}"},
        {
            "what": "ours, GFLOP/s of the best measured",
            "value": f"{flops / seconds['ours'] / 1e9:.0f} of {rate / 1e9:.0f}",
            "ratio": flops / seconds["ours"] / rate,
            "target": targets["matrix rate"],
        },
    ]
    figures = {"seconds": seconds, "flops": flops, "matrix_rate": rate}
    return report(arguments, "Training step", rows, **figures, images_per_second=batch_size / seconds["ours"])


def attention_flops(model, batch_size: int, arguments) -> int:
    """Return what the counter leaves out: the products of fused attention on a CPU, whose kernel it does not know.

    Forward two, backward four; the one that the kernel does again is not counted.
    """
    if arguments.device != "cpu":
        return 0
    vision, text = model.config.vision_config, model.config.text_config
    patches, length = model.vision_model.embeddings.num_positions, make_batch(model, batch_size)["input_ids"].shape[1]
    pairs = vision.num_hidden_layers * patches**2 * vision.hidden_size
    pairs += text.num_hidden_layers * length * (length + patches) * text.hidden_size
    return 3 * 2 * 2 * batch_size * pairs


if __name__ == "__main__":
    sys.exit(0 if main(parser(__doc__).parse_args()) else 1)
