"""Tiny models, images and datasets, built here: nothing is downloaded, and the Hub client is told to stay offline."""

import atexit
import os
import shutil
import signal
import tempfile


# Before the libraries are imported: they read these once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="captioning-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # the tests themselves run in several processes, and start more

import copy
import json
from pathlib import Path

import pytest
from datasets import DatasetDict, Image
from helpers import TINY_CONFIG, make_captions, make_rows, tokenized

from captioning.data.checks import check_rows
from captioning.models.blip import BlipCaptioner
from captioning.models.load import build_captioner
from captioning.training.arguments import CaptioningArguments
from captioning.training.trainer import CaptioningTrainer
from collator import CaptioningCollator
from metrics import compute_metrics


atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
# A shell's background job ignores it, and so would all processes that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by Playwright, where there are both."""
    path = shutil.which("chromium")
    if not path:
        pytest.skip("no chromium on this machine: the page is not read by a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


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
def tiny_captioner(config_file) -> BlipCaptioner:
    """Shared by all tests: they must not change it."""
    return build_captioner(str(config_file), 0, None, make_captions(20), vocab_size=200)


@pytest.fixture
def captioner(tiny_captioner) -> BlipCaptioner:
    return copy.deepcopy(tiny_captioner)


@pytest.fixture
def model(captioner):
    return captioner.model


@pytest.fixture
def processor(captioner):
    return captioner.processor


@pytest.fixture
def collator(captioner) -> CaptioningCollator:
    return CaptioningCollator(captioner)


@pytest.fixture(scope="session")
def checked(raw_dataset, tmp_path_factory) -> DatasetDict:
    splits = DatasetDict({name: rows.cast_column("image", Image(decode=False)) for name, rows in raw_dataset.items()})
    return check_rows(splits, 0.0, tmp_path_factory.mktemp("checked") / "rejected.jsonl")


@pytest.fixture
def splits(checked, captioner) -> DatasetDict:
    return tokenized(checked, captioner)


@pytest.fixture
def make_trainer(captioner, splits, tmp_path):
    """Return a function from training arguments to a `CaptioningTrainer` on the tiny model and data."""

    def make(captioner=captioner, prompt=None, splits=splits, fast=True, **arguments) -> CaptioningTrainer:
        defaults = {"output_dir": str(tmp_path / "run"), "report_to": "none", "max_new_tokens": 12, "use_cpu": True}
        args = CaptioningArguments(**defaults | {"disable_tqdm": True} | arguments)
        captioner.adapt(fast=fast)
        captioner.set_prompt(prompt)
        return CaptioningTrainer(
            captioner=captioner,
            args=args,
            data_collator=CaptioningCollator(captioner),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            compute_metrics=compute_metrics,
            generation_config=args.decoding(),
        )

    return make
