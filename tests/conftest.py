"""Tiny models, images and datasets, built here: nothing is downloaded, and the Hub client is told to stay offline."""

import atexit
import io
import os
import shutil
import tempfile


# Before the libraries are imported: they read these once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="captioning-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # the tests themselves run in several processes, and start more

import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PIL

import blip
import rocov2
from arguments import CaptioningArguments
from collator import CaptioningCollator
from fast_blip import use_fast_blip, use_stock_blip
from trainer import CaptioningTrainer


atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"  # real data of development, absent elsewhere
TINY_CONFIG = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # large, so that an untrained model has opinions
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.3,
    },
}
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
    features = {
        "image": Image(),
        "image_id": Value("string"),
        "caption": Value("string"),
        "cui": List(Value("string")),
    }
    return Dataset.from_dict(rows | columns, features=Features(features))


@pytest.fixture(scope="session")
def raw_dataset() -> DatasetDict:
    return DatasetDict(train=make_rows(24), validation=make_rows(10, 100), test=make_rows(7, 200))


@pytest.fixture(scope="session")
def parquet_folder(raw_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    (folder / "data").mkdir()
    for split, rows in raw_dataset.items():
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY_CONFIG))
    return path


@pytest.fixture(scope="session")
def tiny_blip(config_file):
    tokenizer = blip.add_blip_tokens(blip.train_tokenizer(make_captions(20), vocab_size=200))
    return blip.build_blip(str(config_file), tokenizer, seed=0)


@pytest.fixture
def model(tiny_blip):
    return copy.deepcopy(tiny_blip[0])


def stock_copy(model):
    """Return a copy of `model` that computes as transformers ships it."""
    return use_stock_blip(copy.deepcopy(model))


@pytest.fixture
def processor(tiny_blip):
    return copy.deepcopy(tiny_blip[1])


@pytest.fixture
def collator(model, processor):
    return CaptioningCollator(processor, model.config.text_config.bos_token_id)


@pytest.fixture(scope="session")
def checked(raw_dataset, tmp_path_factory) -> DatasetDict:
    splits = DatasetDict({name: rows.cast_column("image", Image(decode=False)) for name, rows in raw_dataset.items()})
    return rocov2.check_rows(splits, 0.0, tmp_path_factory.mktemp("checked") / "rejected.jsonl")


@pytest.fixture
def splits(checked, processor) -> DatasetDict:
    tokenized = rocov2.tokenize(checked, processor.tokenizer, max_caption_length=64, prompt_ids=[])
    return DatasetDict({split: rocov2.usable(rows) for split, rows in tokenized.items()})


@pytest.fixture(params=["fast", "stock"])
def make_trainer(request, model, processor, splits, tmp_path):
    """Return a function from training arguments to a `CaptioningTrainer` on the tiny model and data.

    Each test that uses it runs twice, with fast BLIP and with stock; `stock_copy` is what it compares with.
    """

    def make(model=model, prompt_ids=(), splits=splits, **arguments) -> CaptioningTrainer:
        defaults = {"output_dir": str(tmp_path / "run"), "report_to": "none", "max_new_tokens": 12, "use_cpu": True}
        args = CaptioningArguments(**defaults | {"disable_tqdm": True} | arguments)
        bos_token_id = model.config.text_config.bos_token_id
        return CaptioningTrainer(
            model=use_fast_blip(model) if request.param == "fast" else model,
            args=args,
            processing_class=processor,
            data_collator=CaptioningCollator(processor, bos_token_id, prompt_length=len(prompt_ids)),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            start_ids=[bos_token_id, *prompt_ids],
            decoding=args.decoding(),
        )

    return make
