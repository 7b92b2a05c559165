"""Tiny models, images and datasets that the tests share."""

import copy
import csv
import importlib.util
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PIL
from processes import ROOT, Process, server
from safetensors.torch import load_file
from transformers import TrainerCallback

from captioning.data import phantoms
from captioning.data.checks import usable
from captioning.data.tokenize_captions import tokenize
from captioning.models.fast_blip.modules import use_fast_blip
from captioning.reporting.run_record import RunRecord


SHARED = ROOT.parent / "shared" / "data"  # real data of development, absent elsewhere
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"initializer_range": 0.3}  # large, so that an untrained model has opinions
TINY_CONFIG = {
    "text_config": TOWER | {"max_position_embeddings": 64},
    "vision_config": TOWER | {"image_size": 32, "patch_size": 8},
}
HAS_LIBRARY = importlib.util.find_spec("pycocoevalcap") is not None
needs_java = pytest.mark.skipif(
    not HAS_LIBRARY or shutil.which("java") is None, reason="pycocoevalcap or a Java runtime is not installed"
)
SUBJECTS = ("chest radiograph", "axial CT of the abdomen", "sagittal MRI of the lumbar spine", "renal ultrasound")
FINDINGS = (
    "a small nodule in the right upper lobe",
    "no abnormality",
    "a large cyst at the left lower pole, with a thin septum and without solid parts",
    "an effusion",
    "multilevel degeneration (arrow)",
)


def make_captions(number: int) -> list[str]:
    """Captions of very different lengths, all distinct for `number` up to 20."""
    return [f"{SUBJECTS[i % 4]} shows {FINDINGS[i % 5]}".capitalize() for i in range(number)]


def real_captions(number: int | None = None, splits: tuple[str, ...] = ("test",)) -> list[str]:
    """Captions as published, the first `number`; a test that needs them is skipped where they are absent."""
    captions = []
    for split in splits:
        path = SHARED / "roco_captions_ccby" / f"{split}.csv"
        if not path.is_file():
            pytest.skip("the published captions are not beside the project")
        with open(path, encoding="utf-8", newline="") as file:
            captions += [row["caption"] for row in csv.DictReader(file)]
    return captions[:number]


def make_png(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(number: int, start: int = 0, **columns) -> Dataset:
    """Rows in the schema of the Hub's ROCOv2; `columns` replace the made ones."""
    rows = {
        "image": [{"bytes": make_png(start + i), "path": None} for i in range(number)],
        "image_id": [f"image_{start + i:04d}" for i in range(number)],
        "caption": make_captions(number),
        "cui": [["C1306645", "C0817096"], ["nan"]] * (number // 2) + [[]] * (number % 2),
    }
    text = Value("string")
    features = Features({"image": Image(), "image_id": text, "caption": text, "cui": List(text)})
    return Dataset.from_dict(rows | columns, features=features)


def tokenized(checked: DatasetDict, captioner, max_length: int = 64) -> DatasetDict:
    """Return the splits as a trainer takes them."""
    return DatasetDict({split: usable(rows) for split, rows in tokenize(checked, captioner, max_length).items()})


def save_captioner(captioner, folder: Path) -> Path:
    """Save model and processor, as the Trainer does."""
    for part in (captioner.model, captioner.processor):
        part.save_pretrained(folder)
    return folder


def phantom_rows(number: int, seed: int, split: str = "train") -> tuple[list[str], list[list[str]], np.ndarray]:
    """Captions, concepts, and features that tell one combination of attributes from another, as an image would."""
    rng = np.random.default_rng(seed)
    sets = phantoms.combinations(split)
    drawn = rng.integers(len(sets), size=number)
    cuis = [[phantoms.CUIS[sets[i]["modality"]], phantoms.CUIS[sets[i]["region"]]] for i in drawn]
    values = sorted({str(value) for each in phantoms.combinations("train") for value in each.values()})
    features = [[float(str(value) in map(str, sets[i].values())) for value in values] for i in drawn]
    return [phantoms.reword(sets[i], rng) for i in drawn], cuis, np.array(features)


def stock_copy(model):
    """Return a copy of `model` that computes as transformers ships it."""
    return use_fast_blip(copy.deepcopy(model), fast=False)


# --- Runs of the script ---


TIMES = ("_runtime", "_per_second", "_time", "total_flos")


def flags(config_file, dataset, folder, **values) -> list[str]:
    """Return the flags of a short training; a value of None leaves a flag out."""
    values = {
        "config_name": config_file,
        "dataset_name": dataset,
        "output_dir": folder,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "max_new_tokens": 12,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "vocab_size": 200,
        "coco_metrics": False,  # BLEU, CIDEr, METEOR would start Java in each run; see scoring/test_score.py
    } | values
    return [item for key, value in values.items() if value is not None for item in (f"--{key}", str(value))]


def score_flags(trained, dataset, folder, **values) -> list[str]:
    """Return the flags of a run that scores a model without training it."""
    training = dict.fromkeys(("num_train_epochs", "learning_rate", "per_device_train_batch_size", "vocab_size"))
    return flags(None, dataset, folder, model_name_or_path=trained, do_train=False, **training | values)


def start(arguments: list) -> Process:
    """Start the script in a process of its own."""
    return server().start(["run_captioning.py", *arguments])


def run(arguments: list, code: int = 0) -> subprocess.CompletedProcess:
    """Run the script in a process of its own and assert its exit status."""
    return server().run(["run_captioning.py", *arguments], code)


def kill_and_resume(arguments: list, folder: Path) -> None:
    """Run the script into a folder, kill it after its last checkpoint, and resume it."""
    process = start(arguments)
    signal_when(lambda: (folder / "checkpoint-6/trainer_state.json").is_file(), signal.SIGKILL, process)
    process.communicate()
    assert not (folder / "all_results.json").exists()
    run([*arguments, "--resume_from_checkpoint", "true"])


def start_ranks(number: int, arguments: list, script: str = "run_captioning.py", **environment: str) -> list[Process]:
    """Start the processes that a launcher would start, with the environment that it would give them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), **environment}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [server().start([script, *arguments], environment=rank) for rank in ranks]


def run_ranks(number: int, arguments: list, code: int = 0, **options: str) -> list[str]:
    """Run the script in several processes, assert the exit status of each, and return what it wrote as errors."""
    ranks = start_ranks(number, arguments, **options)
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    assert [rank.returncode for rank in ranks] == [code] * number, errors
    return errors


def signal_when(condition, number: int, *processes: Process) -> None:
    """Send a signal to the processes once `condition()` holds."""
    deadline = time.monotonic() + 120
    while not condition() and processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        process.send_signal(number)


def read_json(path: Path):
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(folder: Path, split: str = "test") -> list[dict]:
    return read_lines(folder / "predictions" / f"{split}.jsonl")


def without_times(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if not key.endswith(TIMES)}


def losses(folder: Path, key: str = "loss") -> list[float]:
    """Return the training losses, or other values, that a finished run has logged."""
    return [entry[key] for entry in read_json(folder / "trainer_state.json")["log_history"] if key in entry]


def outcome(folder: Path, weights: str = "model.safetensors") -> dict:
    """All that a run decides: weights, scores, predictions, the logged history; no times."""
    state = read_json(folder / "trainer_state.json")
    return {
        "weights": {name: value.tolist() for name, value in load_file(folder / weights).items()},
        "results": without_times(read_json(folder / "all_results.json")),
        "predictions": {path.name: path.read_text() for path in (folder / "predictions").iterdir()},
        "history": [without_times(entry) for entry in state["log_history"] if "train_runtime" not in entry],
        "best": (state["best_metric"], state["best_global_step"]),
    }


# --- Output folders and images of a report ---

RECIPE = {
    "model_name_or_path": "Salesforce/blip",
    "model_revision": "0123456789" * 4,
    "config_name": None,
    "dataset_name": "/home/somebody/data/my-data",
    "dataset_revision": None,
    "num_beams": 3,
    "max_new_tokens": 64,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
}


def make_predictions(number: int, **columns) -> list[dict]:
    rows = {
        "image_id": [f"image_{i}" for i in range(number)],
        "reference": [f"reference {i}" for i in range(number)],
        "prediction": [f"prediction {i}" for i in range(number)],
        "rougeL": [0.5] * number,
        "nll": [10.0] * number,
    } | columns
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


def make_record(folder: Path, predictions: list[dict], log_history=(), scores=None, **recipe) -> RunRecord:
    """Write the output folder of a run that captioned its test split, and return its record."""
    (folder / "predictions").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in predictions)
    (folder / "predictions" / "test.jsonl").write_text(lines, encoding="utf-8")
    files = {"recipe": RECIPE | recipe, "scores": scores or {}, "trainer_state": {"log_history": log_history}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return RunRecord(folder)


def make_noise(seed: int = 0, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> PIL.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return PIL.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# --- Batches ---


def make_batch(model, seed=0, number=5, length=14, prompt_length=0, side=None):
    """Random images and captions of `length` and less tokens, padded at their right, without labels on the prompt."""
    random = torch.Generator().manual_seed(seed)
    side = side or model.config.vision_config.image_size
    input_ids = torch.randint(5, model.config.text_config.vocab_size, (number, length), generator=random)
    input_ids[:, 0] = model.config.text_config.bos_token_id
    lengths = torch.randint(prompt_length + 3, length + 1, (number, 1), generator=random)
    lengths[0] = length
    attention_mask = (torch.arange(length) < lengths).long()
    input_ids = input_ids.masked_fill(attention_mask == 0, model.config.text_config.pad_token_id)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, : 1 + prompt_length] = -100
    pixel_values = torch.randn(number, 3, side, side, generator=random)
    return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    """Losses within 1e-5 and each gradient within 1e-4, by its norm, of stock's.

    The bias of keys has gradients of 0 but for rounding: they are measured by those of the whole model.
    """
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    whole = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name


def change(file: Path, **values) -> None:
    """Change values of a JSON file."""
    file.write_text(json.dumps(read_json(file) | values))


def output_of_card(folder: Path, monkeypatch, capsys, **replaced: str) -> str:
    """Run the code of the card of an output folder beside it, with other strings in it, and return what it prints."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    for string, other in replaced.items():
        code = code.replace(f'"{string}"', repr(other))
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    return capsys.readouterr().out.removesuffix("\n")


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(make, captioner, batch_size, accumulation, **arguments):
    """Loss and gradients of one optimizer step over the same 8 rows."""
    keep = KeepGradients()
    arguments |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    arguments |= {"max_steps": 1, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "logging_steps": 1}
    trainer = make(captioner=copy.deepcopy(captioner), save_strategy="no", do_eval=False, **arguments)
    trainer.add_callback(keep)
    trainer.train()
    return trainer.state.log_history[0]["loss"], keep.gradients
