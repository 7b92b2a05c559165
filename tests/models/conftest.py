"""Tiny BLIPs, with the classes of transformers and with the fast ones, and images."""

import copy

import pytest
from helpers import make_noise

from captioning.models.fast_blip.modules import use_fast_blip
from captioning.models.load import build_captioner


@pytest.fixture(scope="session")
def build_model(tiny_captioner, config_file, tmp_path_factory):
    """Return a function from a seed to a stock BLIP with random weights."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tiny_captioner.tokenizer.save_pretrained(folder)
    return lambda seed=0, config=config_file: build_captioner(str(config), seed, folder, (), 0).model


@pytest.fixture(scope="session")
def images():
    """Of several sizes."""
    return [make_noise(seed, size) for seed, size in enumerate([(40, 60), (60, 60), (60, 30)])]


@pytest.fixture
def fast(model):
    """A copy of `model` on the fast path."""
    return use_fast_blip(copy.deepcopy(model))
