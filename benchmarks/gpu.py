"""The parts of `benchmarks/gpu.sh`, one after the other, and its table."""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path


HERE = Path(__file__).parent
NEEDED = {"torch": (2, 11), "transformers": (5, 23)}  # at least; transformers: what `fast_blip` was checked against
CPU_FACTOR = 5
AHEAD_OF = ("evaluation_base", "training_base")
COMPUTE = ["--device", "{device}", "--dtype", "{dtype}"]
# name: seconds at most, on a CPU `CPU_FACTOR` times as many, and the command; the most telling first
PARTS = {
    "tokens": (90, ["gpu_check.py", "tokens"]),
    "evaluation_base": (150, ["evaluation.py", "--rounds", "1"]),
    "training_base": (60, ["training.py"]),
    "profile": (60, ["gpu_measure.py", "profile"]),
    "gradients": (60, ["gpu_check.py", "gradients"]),
    "batch_sizes_base": (90, ["gpu_measure.py", "batch_sizes"]),
    "new_lengths": (60, ["gpu_measure.py", "new_lengths"]),
    "end_to_end": (120, ["gpu_check.py", "end_to_end"]),
    "workers_8": (120, ["input_pipeline.py", "--workers", "8"]),
    "workers_16": (120, ["input_pipeline.py", "--workers", "16"]),
    "memory_base": (90, ["memory.py"]),
    "out_of_memory": (90, ["gpu_check.py", "out_of_memory"]),
    "resume": (120, ["gpu_check.py", "resume"]),
    "two_processes": (120, ["gpu_check.py", "two_processes"]),
    "training_large": (60, ["training.py", "--model", "large"]),
    "evaluation_large": (90, ["evaluation.py", "--model", "large", "--rounds", "1", "--batch_size", "32"]),
    "batch_sizes_large": (90, ["gpu_measure.py", "batch_sizes", "--model", "large"]),
    "memory_large": (90, ["memory.py", "--model", "large"]),
    "torch_compile": (240, ["gpu_measure.py", "compile"]),
}


def main(arguments: argparse.Namespace) -> int:
    if fault := versions_fault() or device_fault(arguments.device):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    factor = CPU_FACTOR if arguments.device == "cpu" else 1
    end, outcomes = time.monotonic() + factor * arguments.seconds, {}
    for name, (limit, words) in PARTS.items():
        if arguments.only and name not in arguments.only:
            continue
        if end - time.monotonic() < 5:
            outcomes[name] = "not run: no time left"
        else:
            outcomes[name] = run(name, min(factor * limit, end - time.monotonic()), words, arguments)
        if name == "tokens" and outcomes[name].startswith("failed: exit status"):
            os.environ["CUDA_GRAPHS"] = "0"  # for this part and those after it
            again = run(name, min(factor * limit, end - time.monotonic()), words, arguments)
            outcomes[name] += f"; without graphs, as all parts below: {again}"
        print(f"{name}: {outcomes[name]}", flush=True)
        (arguments.out / "report.md").write_text(table(arguments, outcomes), encoding="utf-8")
    print(arguments.out / "report.md")
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


def versions_fault() -> str | None:
    """Return what is wrong with the installed versions, None: nothing."""
    for name, least in NEEDED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed; pip install -r requirements.txt"
        if tuple(int(part) for part in found.split(".")[:2]) < least:
            return f"{name} {found} is older than {'.'.join(map(str, least))}; pip install -r requirements.txt"
    return None


def device_fault(device: str) -> str | None:
    """Return what is missing of the device, None: nothing."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if device == "cuda" and subprocess.run([sys.executable, "-c", code], check=False).returncode:
        return "PyTorch finds no GPU; --device cpu --quick shows that the parts run"
    return None


def run(name: str, limit: float, words: list[str], arguments: argparse.Namespace) -> str:
    """Run a part in a process group of its own, which ends with it, and return how it ended."""
    (arguments.out / f"{name}.json").unlink(missing_ok=True)
    dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    command = [sys.executable, str(HERE / words[0]), *words[1:], "--json", str(arguments.out / f"{name}.json")]
    if words[0] != "input_pipeline.py":
        command += [word.format(device=arguments.device, dtype=dtype) for word in COMPUTE]
    command += ["--quick"] * arguments.quick
    started, log = time.monotonic(), arguments.out / f"{name}.log"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        both = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=HERE.parent, env=offline, start_new_session=True, **both)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = f"{time.monotonic() - started:.0f} s"
    if status is None:
        return f"failed: more than {limit:.0f} s"
    if status > 1 or not (arguments.out / f"{name}.json").exists():
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        return f"failed: exit status {status}, {last[:160]}"
    return f"{seconds}" + (", a target is missed or a check has failed" if status else "")


def table(arguments: argparse.Namespace, outcomes: dict[str, str]) -> str:
    """Return the report: a table of what was measured, one of how the parts ended."""
    found = {
        name: json.loads(path.read_text()) for name in outcomes if (path := arguments.out / f"{name}.json").exists()
    }
    machine = next((one["machine"] for one in found.values() if "device" in one["machine"]), {})
    about = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "load")
    lines = [f"# GPU benchmarks, {date.today().isoformat()}", "", about or "nothing measured yet", ""]
    if arguments.quick:
        lines += ["Quick: small models, which show that the parts run. No target is looked at.", ""]
    lines += ["| part | what | value | ratio | target | |", "|---|---|---|---|---|---|"]
    for name, record in found.items():
        for row in rows_of(record, found):
            ratio, target = (f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "target"))
            target = ("at most " if row.get("at_most") and target else "") + target
            reached = "" if "ratio" not in row or arguments.quick else "reached" if row["reached"] else "**missed**"
            lines.append(f"| {name} | {row['what'].strip()} | {row['value']} | {ratio} | {target} | {reached} |")
    lines += ["", "| part | how it ended |", "|---|---|", *(f"| {name} | {how} |" for name, how in outcomes.items())]
    return "\n".join(lines) + "\n"


def rows_of(record: dict, found: dict[str, dict]) -> list[dict]:
    """Return the rows of a record of `measure.report`, or those of the workers of `input_pipeline.py`.

    The input pipeline must be ahead of what `found` says of evaluation and training with BLIP-base.
    """
    if "loader" not in record:
        return record["rows"]
    needed = max((found[name]["images_per_second"] for name in AHEAD_OF if name in found), default=None)
    rows = []
    for row in record["loader"]:
        rate = row["images_per_second"]
        what = (
            f"{row['name']}, {row['workers']} workers on {row['cores']} cores, over those of evaluation and training"
        )
        rows.append({"what": f"images/s, {what}", "value": f"{rate:.0f}"})
        if needed:
            rows[-1] |= {"ratio": rate / needed, "target": 1, "reached": rate >= needed}
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=600, help="for all parts on a GPU: 600")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    sys.exit(main(parser.parse_args()))
