"""Predictions on disk, and the captions of any system."""

import json

import numpy as np
import pytest

from captioning.errors import UserError
from captioning.scoring.captions import Captions, read_captions, read_csv, read_predictions, write_predictions


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions" / "test.jsonl"
    references = ["Left lung — clear.", "A\nbreak", "no", "fourth"]
    captions = Captions(list("abcd"), ["lung clear", "a break", "yes", "x"], references, [["C1"], [], [], []])
    write_predictions(path, captions, np.arange(4.0))
    return path


def test_predictions_have_the_keys_of_the_contract_and_are_read_back(predictions):
    rows = read_predictions(predictions)
    assert [list(row) for row in rows] == [["image_id", "reference", "prediction", "rougeL", "nll", "cui"]] * 4
    assert [row["rougeL"] for row in rows] == pytest.approx([0.8, 1.0, 0.0, 0.0])
    assert rows[0]["reference"] == "Left lung — clear." and rows[3]["nll"] == 3.0
    captions = read_captions(str(predictions))
    assert captions.image_ids == list("abcd") and len(captions) == 4
    assert captions.references[1] == "A\nbreak" and captions.cuis == [["C1"], [], [], []]


def test_predictions_appear_whole_or_not_at_all(predictions):
    before = predictions.read_text()
    with pytest.raises(ValueError, match="zip"):
        write_predictions(predictions, Captions(["a"], ["x"], ["y"], [[]]), np.arange(2.0))
    assert predictions.read_text() == before


# --- The captions of any system -------------------------------------------------------------------------------

REFERENCES = "ID,Caption\na,first\nb,second\n"


def json_lines(*rows: dict) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_a_csv_is_read_in_the_order_of_its_references(write):
    run = write("run.csv", 'ID,Caption\nb,"two, ""three"""\na,one\n')
    concepts = write("concepts.csv", "ID,CUIs\nb,C0040405;C0817096\na,\n")
    captions = read_captions(run, write("refs.csv", REFERENCES), concepts)
    cuis = [[], ["C0040405", "C0817096"]]
    assert captions == Captions(["a", "b"], ["one", 'two, "three"'], ["first", "second"], cuis)


CSVS = {
    "BOM and CRLF": "\ufeffID,Caption\r\na,x\r\nb,y\r\n",
    "no header": "a,x\nb,y",
    "lower-case id and quotes": 'id,Caption\na,"x"\n"b",y\n',
    "blank lines and a header with spaces": "ID, caption\n\na,x\n\nb,y\n\n",
}


@pytest.mark.parametrize("content", CSVS.values(), ids=CSVS)
def test_a_csv_is_read_as_others_write_it(write, content):
    assert read_csv(write("run.csv", content), "Caption") == {"a": "x", "b": "y"}


def test_json_lines_are_read_as_others_write_them(write):
    row = {"image_id": "a", "prediction": "x \ud800 y", "reference": "z", "cui": "C0040405;C0817096"}
    content = json_lines(row, row | {"image_id": "b", "cui": None}).replace("\n", "\n \n")
    captions = read_captions(write("run.jsonl", f"\ufeff{content}"))
    assert captions.image_ids == ["a", "b"]
    assert captions.predictions == ["x \ufffd y"] * 2, "an unpaired surrogate is replaced"
    assert captions.cuis == [["C0040405", "C0817096"], []]


def test_concepts_must_be_those_of_the_images(write):
    run, references = write("run.csv", REFERENCES), write("refs.csv", REFERENCES)
    with pytest.raises(UserError, match=r"'.*cuis.csv' lacks ids of '.*refs.csv': 1 \(b\)"):
        read_captions(run, references, write("cuis.csv", "ID,CUIs\na,C0040405\n"))
    more = write("cuis.csv", "ID,CUIs\na,C0040405\nb,\nc,\n")
    assert read_captions(run, references, more).cuis == [["C0040405"], []]


def test_references_can_be_given_beside_json_lines_and_must_be_beside_a_csv(write):
    run = write("run.jsonl", json_lines(*({"image_id": i, "prediction": i} for i in "ab")))
    assert read_captions(run, write("refs.csv", REFERENCES)).references == ["first", "second"]
    for path in (run, write("run.csv", "ID,Caption\na,x\n")):
        with pytest.raises(UserError, match="'a' has no reference; add --references with a CSV of ID,Caption"):
            read_captions(path)


@pytest.mark.parametrize(
    "run, message",
    [
        ("ID,Caption\na,x\n", r"'.*run\.csv' lacks ids of '.*refs\.csv': 1 \(b\); both must be"),
        ("ID,Caption\na,x\nb,y\nc,z\n", r"'.*run\.csv' has ids that '.*refs\.csv' lacks: 1 \(c\)"),
        ("ID,Caption\na,x\na,y\n", r"line 3: id 'a' occurs twice"),
        ("ID,Caption\na,x, y\nb,z\n", r"line 2: fields: 3, not 2; .* text with a comma in double quotes"),
        ("ID;Caption\na;x\n", r"line 1: fields: 1, not 2; give a CSV of ID,Caption"),
        ("ID,Text\na,x\n", r"has the columns \['ID', 'Text'\]; give a CSV of ID,Caption"),
        ("ID,Caption,Other\n", r"has the columns \['ID', 'Caption', 'Other'\]"),
        ("ID,Caption\n", r"run\.csv' has no rows"),
        (b"ID,Caption\na,\xff\n", r"in position 13.*; give a CSV of ID,Caption in UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_scored_is_rejected_in_one_line(write, run, message):
    with pytest.raises(UserError, match=message):
        read_captions(write("run.csv", run), write("refs.csv", REFERENCES))


ROW = '{"image_id": "a", "prediction": "x"'


@pytest.mark.parametrize(
    "run, message",
    [
        *(
            (text, r"line 1 is not a JSON object of strings image_id")
            for text in ("{}\n", "nonsense", "[1]", "[" * 9999)
        ),
        ('{"image_id": "a", "prediction": 3}', r"line 1 is not .*prediction and reference"),
        ('{"image_id": "a", "reference": "x"}', r"line 1 is not .*prediction and reference"),
        *((f'{ROW}, "cui": {cuis}}}', r"line 1 is not .*, and a list cui") for cuis in ("5", "[null]")),
        (f"{ROW}}}\n" * 2, r"line 2: id 'a' occurs twice"),
        ("", r"has no captions"),
        (b"\xff", r"cannot be read: .* in position 0"),
    ],
)
def test_json_lines_that_cannot_be_scored_are_rejected_in_one_line(write, run, message):
    with pytest.raises(UserError, match=message):
        read_captions(write("run.jsonl", run))


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv"])
def test_a_missing_file_is_a_mistake(tmp_path, write, name):
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(str(tmp_path / name), write("refs.csv", REFERENCES))
