"""A good system on phantoms that several modules score, and files."""

import pytest
from helpers import phantom_rows

from benchmarks.phantom_attributes import oracle_captions
from captioning.scoring.captions import Captions
from captioning.scoring.training_split import Training


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path as text."""

    def write_file(name, content) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture(scope="session")
def training():
    captions, cuis, features = phantom_rows(300, seed=0)
    return Training(captions, cuis, features, captions)


@pytest.fixture(scope="session")
def rows():
    """Captions, concepts and features of 120 images."""
    return phantom_rows(120, seed=1, split="test")


@pytest.fixture(scope="session")
def captions(rows):
    """A good system: the oracle, which knows every attribute and picks a wording at random."""
    references, cuis, _ = rows
    return Captions([f"id{i}" for i in range(120)], oracle_captions(references, seed=5), references, cuis)
