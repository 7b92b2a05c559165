"""Tiny BLIPs, with the classes of transformers and with the fast ones."""

import copy

import pytest

from captioning.models.blip import BlipCaptioner
from captioning.models.fast_blip.modules import use_fast_blip


@pytest.fixture(scope="session")
def build_model(tiny_captioner, config_file):
    """Return a function from a seed to a stock BLIP with random weights."""
    return lambda seed: BlipCaptioner.from_tokenizer(str(config_file), seed, tiny_captioner.tokenizer).model


@pytest.fixture
def fast(model):
    """A copy of `model` on the fast path."""
    return use_fast_blip(copy.deepcopy(model))
