"""How much memory does an image take in training, against stock BLIP, with and without gradient checkpointing?

    python benchmarks/memory.py [--device cuda --dtype bfloat16] [--json memory.json]

Forward and backward of BLIP-base at 384 pixels, twice; on a CPU each variant and batch size has its own process.
What an image takes is the slope of the peak between two batch sizes, so weights, gradients and the libraries cancel
out. On a CPU the peak is that of the resident memory, on a GPU that of what is allocated. Beside it, what autograd
keeps for the backward pass by its own account: the bytes of the tensors it saves, each storage once, parameters left
out.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys

import torch
from measure import autocast, build_model, make_batch, parser, report

from captioning.models.fast_blip.modules import use_fast_blip


VARIANTS = {  # and the share of stock's memory that it may take
    "stock": None,
    "fast": 0.65,
    "fast, gradient checkpointing": 0.25,
    "stock, gradient checkpointing": None,
}


def main(arguments) -> bool:
    sizes = (2, 6) if arguments.device == "cpu" else (8, 24)
    slopes = {}
    for variant in VARIANTS:
        measured = [measure_apart(arguments, variant, size) for size in sizes]
        slopes[variant] = [(measured[1][i] - measured[0][i]) / (sizes[1] - sizes[0]) / 2**20 for i in range(2)]
    rows = []
    for variant, target in VARIANTS.items():
        peak, saved = slopes[variant]
        row = {"what": f"{variant}: MiB an image, peak", "value": f"{peak:.0f}"}
        if target:
            row |= {"ratio": peak / slopes["stock"][0], "target": target, "at_most": True}
        rows += [row, {"what": "  kept for the backward pass", "value": f"{saved:.0f}"}]
    return report(arguments, "Activation memory of an image in training", rows, mebibytes=slopes)


def measure_apart(arguments, variant: str, batch_size: int) -> tuple[int, int]:
    """Return `measure_here` of a process of its own; a GPU counts what is allocated, so that one process will do."""
    if arguments.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return measure_here(argparse.Namespace(**vars(arguments) | {"variant": variant, "batch_size": batch_size}))
    command = [sys.executable, __file__, "--device", arguments.device, "--dtype", arguments.dtype]
    command += ["--model", arguments.model]
    command += ["--batch_size", str(batch_size), "--variant", variant] + ["--quick"] * arguments.quick
    # Blocks of this size and above go back to the system when they are freed: the peak is that of what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    printed = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    return tuple(json.loads(printed.splitlines()[-1]))


def measure_here(arguments) -> tuple[int, int]:
    """Return the peak of this process in bytes, and those that autograd keeps for the backward pass."""
    model = build_model(arguments).train()
    if "fast" in arguments.variant:
        use_fast_blip(model)
    if "checkpointing" in arguments.variant:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(model, arguments.batch_size)
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(2):  # gradients are there in the second
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(arguments):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated(), sum(kept.values())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sum(kept.values())


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--variant", choices=VARIANTS, help="measure this one here: peak and kept bytes as JSON")
    given = flags.parse_args()
    if given.variant:
        print(json.dumps(measure_here(given)))
    else:
        sys.exit(0 if main(given) else 1)
