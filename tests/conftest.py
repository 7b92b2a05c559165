"""Tiny models, images and datasets, built here: nothing is downloaded, and the Hub client is told to stay offline."""

import atexit
import os
import shutil
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
from helpers import TINY_CONFIG, make_captions, make_rows

from captioning.data import checks
from captioning.data.tokenize_captions import tokenize
from captioning.models import blip
from captioning.models.fast_blip.modules import use_fast_blip
from captioning.models.tokenizer import add_blip_tokens, train_tokenizer
from captioning.training.arguments import CaptioningArguments
from captioning.training.trainer import CaptioningTrainer
from collator import CaptioningCollator


atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


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
    tokenizer = add_blip_tokens(train_tokenizer(make_captions(20), vocab_size=200))
    return blip.build_blip(str(config_file), tokenizer, seed=0)


@pytest.fixture
def model(tiny_blip):
    return copy.deepcopy(tiny_blip[0])


@pytest.fixture
def processor(tiny_blip):
    return copy.deepcopy(tiny_blip[1])


@pytest.fixture
def collator(model, processor):
    return CaptioningCollator(processor, model.config.text_config.bos_token_id)


@pytest.fixture(scope="session")
def checked(raw_dataset, tmp_path_factory) -> DatasetDict:
    splits = DatasetDict({name: rows.cast_column("image", Image(decode=False)) for name, rows in raw_dataset.items()})
    return checks.check_rows(splits, 0.0, tmp_path_factory.mktemp("checked") / "rejected.jsonl")


@pytest.fixture
def splits(checked, processor) -> DatasetDict:
    tokenized = tokenize(checked, processor.tokenizer, max_caption_length=64, prompt_ids=[])
    return DatasetDict({split: checks.usable(rows) for split, rows in tokenized.items()})


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
