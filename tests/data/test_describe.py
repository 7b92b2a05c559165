"""The statistics of `prepare --describe` are those of the rows, and leaks between splits are said in a line."""

import json

import numpy as np
import pytest
from PIL import Image
from source_files import write_images, write_table

from captioning.__main__ import main
from captioning.errors import UserError


ROWS = [
    # split, image, id, caption, concepts
    ("train", "0.png", "a", "Chest CT scan with no effusion", "C0040405;C7"),
    ("train", "1.png", "b", "Chest CT scan with no effusion", "C0040405"),
    ("train", "1.png", "c", "An ultrasound image", ""),
    ("train", "2.png", "c", "A second row of this id", ""),
    ("train", "3.png", "d", " ", ""),
    ("test", "4.png", "e", "MRI of the knee", "C0024485"),
    ("test", "0.png", "a", "Chest CT scan with no effusion", "C0040405"),
]


@pytest.fixture
def source(tmp_path):
    folder = write_images(tmp_path / "scans", *(f"{number}.png" for number in range(4)))
    Image.fromarray(np.zeros((20, 50), np.uint8)).save(folder / "4.png")
    columns = ("split", "path", "image_id", "caption", "cui")
    write_table(folder / "captions.csv", *(dict(zip(columns, row, strict=True)) for row in ROWS))
    write_table(folder / "cui_mapping.csv", {"CUI": "C7", "Canonical name": "A thing"})
    return str(folder)


def test_statistics_are_those_of_the_usable_rows(source, capsys):
    main(["prepare", source, "--describe", "--json"])
    result = json.loads(capsys.readouterr().out)
    train, test = result["splits"]["train"], result["splits"]["test"]
    assert train["rows"] == 5
    assert train["left_out"] == {"repeated image_id": 1, "blank caption": 1}
    assert train["words"] == {"min": 3, "mean": 5, "median": 6, "p95": 6, "max": 6}
    assert train["characters"]["max"] == len(ROWS[0][3])
    assert train["modalities"] == {"CT": 2, "ultrasound": 1}
    assert train["concepts"]["distinct"] == 2
    assert train["concepts"]["images_without"] == 1
    named = [("C0040405", "computed tomography", 2), ("C7", "A thing", 1)]
    assert train["concepts"]["most_frequent"] == [{"cui": c, "name": name, "images": n} for c, name, n in named]
    assert train["repeated"] == {"image_id": 1, "caption": 1, "pixels": 1}
    assert sum(train["images"]["modes"].values()) == 3
    assert test["images"]["width"]["max"] == 50
    assert test["images"]["height"]["min"] == 20
    leaks = result["leaks"]["test"]["train"]
    assert (leaks["image_id"], leaks["pixels"], leaks["pixels_and_caption"], leaks["caption"]) == (1, 1, 1, 1)


def test_the_table_says_leaks_in_one_line(source, capsys, tmp_path):
    before = set(tmp_path.rglob("*"))
    main(["prepare", source, "--describe"])
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("rows")).split() == ["rows", "5", "2"]
    leaks = [line for line in lines if line.startswith("leaks between splits")]
    assert len(leaks) == 1
    assert "1 of 2 image ids are also in split 'train'" in leaks[0]
    assert "same pixels" in leaks[0]
    assert "captions in common: test: 1 of them in 'train'" in lines
    assert "  left out: repeated image_id 1, blank caption 1" in lines
    assert "  concepts: computed tomography 2, A thing 1" in lines
    assert set(tmp_path.rglob("*")) == before, "nothing is written"


def test_data_without_leaks_or_usable_rows_is_described_too(tmp_path, capsys):
    write_images(tmp_path / "scans", "1.png")
    write_table(tmp_path / "scans" / "captions.csv", {"path": "1.png", "caption": " "})
    fractions = ["--validation_fraction", "0", "--test_fraction", "0"]
    main(["prepare", str(tmp_path / "scans"), "--describe", *fractions])
    text = capsys.readouterr().out
    assert "leaks between splits: there is one split" in text
    assert "blank caption 1" in text


@pytest.mark.parametrize("arguments", [[], ["folder", "--describe"]])
def test_either_a_folder_or_describe(source, arguments):
    with pytest.raises(UserError, match="give a FOLDER to write, or --describe"):
        main(["prepare", source, *arguments])
