"""What must be right on a GPU before its speed counts: tokens, gradients, runs resumed, shared, or too large.

    python benchmarks/gpu_check.py tokens|gradients|end_to_end|out_of_memory|resume|two_processes [--device cuda]

tokens: ours and stock `generate`, in float32 and, on a GPU, under bfloat16 autocast. Where a caption differs, stock
scores both: the gap is between the log-probabilities of the first two tokens that differ in greedy search, and between
those of the captions, over their tokens, in a beam search. A gap of rounding is a tie, a larger one a bug.
gradients: loss and gradients of all parameters, as relative differences. The others are runs on phantoms.

The exit status is 1 if a check fails.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import autocast, build_captioner, make_batch, parser, report
from safetensors.torch import load_file
from transformers import GenerationConfig

from captioning.data.phantoms import load_phantoms
from captioning.files import PROJECT
from captioning.models.fast_blip.modules import use_fast_blip


TIES = {"float32": 1e-3, "bfloat16": 0.1}  # gaps of log-probabilities that rounding explains
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.05}  # relative differences
# Of two runs: norm of the difference over that of the change. GPUs do not repeat an addition's order, and AdamW makes
# a full step of a gradient that is rounding alone
WEIGHTS = 0.05
STEPS = 6


def dtypes(arguments) -> list[argparse.Namespace]:
    """Return the arguments for float32 and, on a GPU, for bfloat16."""
    names = ["float32", "bfloat16"] if arguments.device == "cuda" else ["float32"]
    return [argparse.Namespace(**vars(arguments) | {"dtype": name}) for name in names]


@torch.no_grad()
def tokens(arguments) -> list[dict]:
    captioner, rows = build_captioner(arguments), []
    # Captions that differ, and end; random weights write one token again and again
    settings = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "max_new_tokens": 32, "do_sample": False}
    batch = make_batch(captioner.model, arguments.batch_size or (4 if arguments.quick else 32))
    for own in dtypes(arguments):
        for beams in (1, 3):
            found = {}
            for fast in (False, True):
                captioner.adapt(fast=fast)
                with autocast(own), captioner.evaluation():
                    encoded = captioner.encode_images(batch)
                    found[fast] = captioner.generate(encoded, GenerationConfig(num_beams=beams, **settings))
            captioner.adapt(fast=False)
            with autocast(own):
                gaps = gaps_of(
                    captioner, captioner.encode_images(batch).image_embeds, found[False], found[True], beams
                )
            what = f"{'greedy' if beams == 1 else '3 beams'}, {own.dtype}: captions that differ from stock's"
            rows.append({"what": what, "value": f"{len(gaps)} of {len(found[True])}"})
            for image, place, gap in sorted(gaps, key=lambda found: -found[2])[:3]:
                row = {"what": f"  image {image} at token {place}: gap, over that of a tie", "value": f"{gap:.1e}"}
                rows.append(row | {"ratio": gap / TIES[own.dtype], "target": 1, "at_most": True})
    return rows


def gaps_of(captioner, embeds, stock, ours, beams: int) -> list[tuple[int, int, float]]:
    """Return image, first token that differs, and the gap of stock's log-probabilities, for captions that differ."""
    width = max(stock.shape[1], ours.shape[1])
    both = [torch.nn.functional.pad(found, (0, width - found.shape[1])) for found in (stock, ours)]
    scores = []
    for found in both:
        inputs = torch.nn.functional.pad(found, (1, 0), value=captioner.prompt_row[0])[:, :-1]
        logits = captioner.model.text_decoder(input_ids=inputs, encoder_hidden_states=embeds).logits
        scores.append(logits.float().log_softmax(-1).gather(2, found[:, :, None])[:, :, 0])
    gaps = []
    for image in (both[0] != both[1]).any(dim=1).nonzero()[:, 0].tolist():
        place = int((both[0][image] != both[1][image]).nonzero()[0])
        gap = (scores[0] - scores[1])[image]
        gaps.append((image, place, abs(float(gap[place] if beams == 1 else gap.mean()))))
    return gaps


def gradients(arguments) -> list[dict]:
    captioner, rows = build_captioner(arguments), []
    model = captioner.model
    batch = make_batch(model, arguments.batch_size or 4)
    for own in dtypes(arguments):
        found = {}
        for fast in (False, True):
            use_fast_blip(model, fast).zero_grad()
            with autocast(own):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            found[fast] = loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
        (stock, before), (ours, after) = found[False], found[True]
        apart = torch.stack([(a - b).norm() for a, b in zip(before, after, strict=True)]).norm()
        values = {
            "loss": abs(ours - stock) / stock,
            "gradients": float(apart / torch.stack([g.norm() for g in before]).norm()),
        }
        for name, value in values.items():
            row = {"what": f"{name}, {own.dtype}: relative difference", "value": f"{value:.1e}"}
            rows.append(row | {"ratio": value / GRADIENTS[own.dtype], "target": 1, "at_most": True})
    return rows


# --- Runs of the script ---------------------------------------------------------------------------------------


def command(arguments, folder: Path, name: str, *flags: str, launcher: tuple = ()) -> list[str]:
    """Return the command of a run on phantoms, which are drawn once into `folder`."""
    if not (folder / "phantoms").exists():
        number = 64 if arguments.quick else 1600
        load_phantoms(sizes={"train": number, "validation": 64, "test": 64}).save_to_disk(folder / "phantoms")
    words = [*(launcher or (sys.executable,)), "run_captioning.py", "--dataset_name", str(folder / "phantoms")]
    words += ["--config_name", "recipes/configs/blip_small.json", "--vocab_size", "400", "--max_new_tokens", "20"]
    words += ["--max_steps", str(STEPS), "--per_device_train_batch_size", "8", "--eval_strategy", "no"]
    words += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--do_eval", "false", "--do_predict"]
    words += ["false", "--logging_steps", "1", "--report_to", "none", "--output_dir", str(folder / name)]
    return [*words, "--use_cpu", str(arguments.device == "cpu"), "--bf16", "false", *flags]


def finish(words: list[str], status: int = 0) -> str:
    """Run a command to its end and return its standard error; raise if it ends otherwise."""
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode != status:
        raise RuntimeError(f"exit status {done.returncode}, not {status}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stderr


def same_weights(folder: Path, name: str, other: str) -> dict:
    """Return the row of two runs' weights, whose difference is compared with what the training has changed."""
    runs = [load_file(folder / run / "model.safetensors") for run in (name, other, "start")]
    one, two, start = (torch.cat([run[key].flatten().double() for key in sorted(run)]) for run in runs)
    ratio = float((one - two).norm() / (one - start).norm())
    row = {"what": "weights: norm of the difference, over that of the change", "value": f"{ratio:.1e}"}
    return row | {"ratio": ratio / WEIGHTS, "target": 1, "at_most": True}


def resume(arguments, folder: Path) -> list[dict]:
    save = ("--save_strategy", "steps", "--save_steps", str(STEPS // 2))
    finish(command(arguments, folder, "start", "--learning_rate", "0"))
    finish(command(arguments, folder, "whole"))
    killed = command(arguments, folder, "killed", *save)
    with subprocess.Popen(killed, cwd=PROJECT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (folder / f"killed/checkpoint-{STEPS // 2}/trainer_state.json").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL or (folder / f"killed/checkpoint-{STEPS}").exists():
        raise RuntimeError("the run ended before it was killed; nothing is left to resume")
    finish([*killed, "--resume_from_checkpoint", "true"])
    return [
        {"what": f"killed with exit status {process.returncode}, resumed", "value": ""},
        same_weights(folder, "whole", "killed"),
    ]


def two_processes(arguments, folder: Path) -> list[dict]:
    if arguments.device == "cuda" and torch.cuda.device_count() < 2:
        return [{"what": "two processes", "value": "not run: one GPU"}]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    finish(command(arguments, folder, "start", "--learning_rate", "0"))
    finish(command(arguments, folder, "whole"))
    finish(command(arguments, folder, "two", "--per_device_train_batch_size", "4", launcher=launcher))
    return [same_weights(folder, "whole", "two")]


def out_of_memory(arguments, folder: Path) -> list[dict]:
    if arguments.device == "cpu":
        return [{"what": "a batch that is too large", "value": "not run: a CPU would swap"}]
    large = ["--config_name", "recipes/configs/blip_base.json", "--per_device_train_batch_size", "1600"]
    errors = finish(command(arguments, folder, "large", *large), status=2)
    lines = [line for line in errors.splitlines() if "out of memory" in line]
    if len(lines) != 1 or "Traceback" in errors:
        raise RuntimeError(f"not one line: {errors[-300:]}")
    return [{"what": lines[0][:100], "value": "status 2"}]


def end_to_end(arguments, folder: Path) -> list[dict]:
    flags = ["--do_eval", "true", "--do_predict", "true", "--dataloader_num_workers", "0" if arguments.quick else "8"]
    if not arguments.quick:
        flags += ["--config_name", "recipes/configs/blip_base.json", "--max_steps", "100", "--max_new_tokens", "64"]
        flags += ["--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64"]
        flags += ["--bf16", str(arguments.dtype == "bfloat16")]
    words = command(arguments, folder, "whole_run", *flags)
    started = time.perf_counter()
    finish(words)
    seconds = time.perf_counter() - started
    results = json.loads((folder / "whole_run" / "all_results.json").read_text())
    rows = [{"what": "run_captioning.py, wall time, s", "value": f"{seconds:.1f}"}]
    names = {"train_runtime": "training, s", "train_samples_per_second": "training, images/s"}
    names |= {f"{split}_runtime": f"{split}, s" for split in ("eval", "predict")}
    return rows + [{"what": f"  {names[key]}", "value": f"{results[key]:.1f}"} for key in names if key in results]


CHECKS = {check.__name__: check for check in (tokens, gradients)}
RUNS = {run.__name__: run for run in (end_to_end, out_of_memory, resume, two_processes)}

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("check", choices=CHECKS | RUNS)
    given = flags.parse_args()
    if given.check in CHECKS:
        table = CHECKS[given.check](given)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            table = RUNS[given.check](given, Path(temporary))
    report(given, f"Check: {given.check}", table)
    sys.exit(not all(row.get("reached", True) for row in table))
