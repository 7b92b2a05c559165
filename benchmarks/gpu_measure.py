"""Where a GPU's time goes in evaluation, how large a batch may be, and what `torch.compile` gives in training.

    python benchmarks/gpu_measure.py profile|batch_sizes|new_lengths|compile [--device cuda --dtype bfloat16]

profile: the kernels of an evaluation by `torch.profiler`, with steps of decoding recorded as a CUDA graph and without.
batch_sizes: images a second of evaluation and training, doubled until memory is full.
new_lengths: what the first loss of captions of a new length costs; cuDNN's attention plans for each shape anew.
"""

import statistics
import sys

import torch
from evaluation import DECODING, make_trainer
from measure import alternate, autocast, build_captioner, make_batch, now, parser, report
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from captioning.errors import is_out_of_memory
from captioning.models.fast_blip import decoder


PRODUCTS = (
    "gemm",
    "cutlass",
    "xmma",
    "nvjet",
    "flash",
    "fmha",
    "attention",
    "cudnn",
    "splitkreduce",
)  # in names of kernels
SHARE = 0.6  # of the time in products and attention, which read the weights and keys that must be read


def setting(arguments):
    """Return the captioner and a function from a batch to its evaluation."""
    captioner = build_captioner(arguments)
    captioner.adapt(fast=True)
    trainer = make_trainer(captioner, DECODING | ({"max_new_tokens": 16} if arguments.quick else {}), 1, arguments)
    return captioner, lambda batch: trainer.prediction_step(captioner.model.eval(), dict(batch), False)


def train_step(model, batch, arguments, optimizer) -> None:
    with autocast(arguments):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def profile(arguments) -> list[dict]:
    captioner, evaluate = setting(arguments)
    batch, rows = make_batch(captioner.model, arguments.batch_size or (4 if arguments.quick else 64)), []
    on_gpu = arguments.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    for graphs in (True, False) if on_gpu else (False,):
        decoder.GRAPHS_ON = {"cuda"} if graphs else set()
        evaluate(batch)
        started = now(arguments.device)
        evaluate(batch)
        alone = now(arguments.device) - started
        with profiler(activities=activities) as profiled:
            started = now(arguments.device)
            evaluate(batch)
            wall = now(arguments.device) - started
        events = profiled.key_averages()
        # Without the operations that launched them, to which the profiler adds the same time
        on_device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
        kernels = {event.key.lower(): event.self_device_time_total / 1e6 for event in on_device}
        busy = sum(kernels.values())
        products = sum(time for name, time in kernels.items() if any(part in name for part in PRODUCTS))
        launches = sum(event.count for event in events if "LaunchKernel" in event.key or "GraphLaunch" in event.key)
        name = "with a graph" if graphs else "without a graph"
        rows.append({"what": f"evaluation {name}, {len(batch['labels'])} images, s", "value": f"{alone:.3f}"})
        rows.append({"what": "  of that, GPU idle (under the profiler)", "value": f"{1 - busy / wall:.2f}"})
        rows.append(
            {"what": "  share of GPU time in products and attention", "value": f"{products / max(busy, 1e-9):.2f}"}
        )
        if on_gpu:
            rows[-1] |= {"ratio": products / alone, "target": SHARE} if graphs else {}
            rows.append(
                {"what": "  launches by the CPU, a token", "value": f"{launches / DECODING['max_new_tokens']:.0f}"}
            )
    return rows


def batch_sizes(arguments) -> list[dict]:
    captioner, evaluate = setting(arguments)
    model, rows, limit = captioner.model, [], 4 if arguments.quick else 1024
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    steps = {
        "evaluation": evaluate,
        "training": lambda batch: train_step(model.train(), batch, arguments, optimizer),
    }
    for name, step in steps.items():
        number = 2 if arguments.quick else 16
        while number <= limit:
            try:
                batch = make_batch(model, number)
                step(batch)
                started = now(arguments.device)
                step(batch)
                value = f"{number / (now(arguments.device) - started):.1f}"
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                value = "out of memory"
            rows.append({"what": f"{name}, {number} images: images/s", "value": value})
            if value == "out of memory":
                break
            number *= 2
        batch = None
        optimizer.zero_grad()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def new_lengths(arguments) -> list[dict]:
    captioner, rows = setting(arguments)[0], []
    number = arguments.batch_size or (2 if arguments.quick else 32)
    with autocast(arguments):
        encoded = captioner.encode_images(make_batch(captioner.model, number))
        for name, first_length in {"with cuDNN's attention": 20, "without": 21}.items():
            torch.backends.cuda.enable_cudnn_sdp(name != "without")
            found = []
            for length in range(first_length, first_length + (4 if arguments.quick else 20), 2):
                batch, times = make_batch(captioner.model, number, length), []
                for _ in range(2):
                    started = now(arguments.device)
                    captioner.caption_nll(encoded, batch)
                    times.append(now(arguments.device) - started)
                found.append(times)
            new, known = (statistics.median(column) for column in zip(*found[1:], strict=True))
            what = f"loss of {number} captions of a new length, {name}, ms; again"
            rows.append({"what": what, "value": f"{1e3 * new:.1f}; {1e3 * known:.1f}"})
    return rows


def compile(arguments) -> list[dict]:
    model = setting(arguments)[0].model.train()
    batch = make_batch(model, arguments.batch_size or (2 if arguments.quick else 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    compiled = torch.compile(model, dynamic=True)  # captions of a batch are as long as its longest
    forwards = {"as it is": model, "compiled": compiled}
    steps = {name: lambda run=run: train_step(run, batch, arguments, optimizer) for name, run in forwards.items()}
    started = now(arguments.device)
    steps["compiled"]()
    first = now(arguments.device) - started
    seconds = alternate(steps, arguments.rounds, arguments.device)
    rows = [{"what": f"training step, {name}, s", "value": f"{value:.3f}"} for name, value in seconds.items()]
    rows.append(
        {"what": "  as it is takes, times compiled", "value": f"{seconds['as it is'] / seconds['compiled']:.2f}"}
    )
    return [*rows, {"what": "first compiled step, s", "value": f"{first:.1f}"}]


PARTS = {part.__name__: part for part in (profile, batch_sizes, new_lengths, compile)}

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("part", choices=PARTS)
    given = flags.parse_args()
    sys.exit(not report(given, f"{given.part}, BLIP-{given.model}", PARTS[given.part](given)))
