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


def test_predictions_have_the_keys_of_the_contract(predictions):
    rows = read_predictions(predictions)
    assert [list(row) for row in rows] == [["image_id", "reference", "prediction", "rougeL", "nll", "cui"]] * 4
    assert [row["rougeL"] for row in rows] == pytest.approx([0.8, 1.0, 0.0, 0.0])
    assert rows[0]["reference"] == "Left lung — clear."
    assert rows[3]["nll"] == 3.0


def test_predictions_appear_whole_or_not_at_all(predictions):
    before = predictions.read_text()
    with pytest.raises(ValueError, match="zip"):
        write_predictions(predictions, Captions(["a"], ["x"], ["y"], [[]]), np.arange(2.0))
    assert predictions.read_text() == before


# --- The captions of any system -------------------------------------------------------------------------------


def test_a_csv_is_read_in_the_order_of_its_references(write):
    run = write("run.csv", 'ID,Caption\nb,"two, ""three"""\na,one\n')
    references = write("refs.csv", "ID,Caption\na,first\nb,second\n")
    concepts = write("concepts.csv", "ID,CUIs\nb,C0040405;C0817096\na,\n")
    captions = read_captions(run, references, concepts)
    assert captions == Captions(
        ["a", "b"], ["one", 'two, "three"'], ["first", "second"], [[], ["C0040405", "C0817096"]]
    )


@pytest.mark.parametrize(
    "content",
    ["\ufeffID,Caption\r\na,x\r\nb,y\r\n", "a,x\nb,y", "id,Caption\na,x\nb,y\n", 'ID,Caption\na,"x"\n"b",y\n'],
    ids=["BOM and CRLF", "no header", "lower-case id", "quotes"],
)
def test_a_csv_is_read_as_others_write_it(write, content):
    assert read_csv(write("run.csv", content), "Caption") == {"a": "x", "b": "y"}


def test_blank_lines_and_a_header_with_spaces_are_not_a_mistake(write):
    assert read_csv(write("run.csv", "ID, caption\n\na,x\n\nb,y\n\n"), "Caption") == {"a": "x", "b": "y"}
    rows = "\n".join(json.dumps({"image_id": i, "prediction": i, "reference": i}) + "\n" for i in "ab")
    assert read_captions(write("run.jsonl", "\ufeff" + rows + "\n\n")).image_ids == ["a", "b"]


def test_concepts_may_be_one_text_and_an_unpaired_surrogate_is_replaced(write):
    row = {"image_id": "a", "prediction": "x \ud800 y", "reference": "z", "cui": "C0040405;C0817096"}
    captions = read_captions(write("run.jsonl", json.dumps(row)))
    assert captions.cuis == [["C0040405", "C0817096"]]
    assert captions.predictions == ["x \ufffd y"]


def test_concepts_must_be_those_of_the_images(write):
    run, references = write("run.csv", "ID,Caption\na,x\nb,y\n"), write("refs.csv", "ID,Caption\na,x\nb,y\n")
    with pytest.raises(UserError, match=r"1 ids of '.*refs.csv' are missing in '.*cuis.csv' \(b\)"):
        read_captions(run, references, write("cuis.csv", "ID,CUIs\na,C0040405\n"))
    more = write("cuis.csv", "ID,CUIs\na,C0040405\nb,\nc,\n")
    assert read_captions(run, references, more).cuis == [["C0040405"], []]


def test_the_predictions_of_a_run_are_read_back(predictions):
    captions = read_captions(str(predictions))
    assert captions.image_ids == list("abcd")
    assert captions.references[1] == "A\nbreak"
    assert captions.cuis == [["C1"], [], [], []]
    assert len(captions) == 4


def test_references_can_be_given_beside_json_lines(write):
    run = write("run.jsonl", "".join(json.dumps({"image_id": i, "prediction": i}) + "\n" for i in "ab"))
    assert read_captions(run, write("refs.csv", "ID,Caption\na,x\nb,y\n")).references == ["x", "y"]
    with pytest.raises(UserError, match=r"'a' has no reference; add --references"):
        read_captions(run)


@pytest.mark.parametrize(
    "run, message",
    [
        (
            "ID,Caption\na,x\n",
            r"1 ids of '.*refs\.csv' are missing in '.*run\.csv' \(b\); both must be",
        ),
        ("ID,Caption\na,x\nb,y\nc,z\n", r"1 ids not in '.*refs\.csv' are in '.*run\.csv' \(c\)"),
        ("ID,Caption\na,x\na,y\n", r"line 3: id 'a' occurs twice"),
        ("ID,Caption\na,x, y\nb,z\n", r"line 2: 3 fields; give ID and Caption, the latter in double quotes"),
        ("ID,Text\na,x\n", r"has the columns \['ID', 'Text'\]; they must be"),
        ("ID;Caption\na;x\n", r"line 1: 1 fields; separate the fields by commas"),
        ("ID,Caption\n", r"run\.csv' has no captions"),
        ("ID,Caption,Other\n", r"has the columns \['ID', 'Caption', 'Other'\]; they must be \['ID', 'Caption'\]"),
        (b"ID,Caption\na,\xff\n", r"is not UTF-8 \(byte 13\); save it as CSV in UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_scored_is_rejected_in_one_line(write, run, message):
    with pytest.raises(UserError, match=message):
        read_captions(write("run.csv", run), write("refs.csv", "ID,Caption\na,x\nb,y\n"))


@pytest.mark.parametrize(
    "run, message",
    [
        ("{}\n", r"line 1 is not a JSON object with image_id and prediction"),
        ("nonsense\n", r"line 1 is not a JSON object"),
        ("[1]\n", r"line 1 is not a JSON object"),
        ("[" * 100_000, r"line 1 is not a JSON object"),
        ('{"image_id": "a", "prediction": 3}', r"line 1: image_id, prediction and reference must be strings"),
        ('{"image_id": "a", "prediction": "x"}\n' * 2, r"line 2: id 'a' occurs twice"),
        ("", r"has no captions"),
        (b"\xff", r"is not UTF-8 \(byte 0\)"),
        ('{"image_id": "a", "prediction": "x", "cui": 5}', r"line 1: cui must be a list of concepts"),
        ('{"image_id": "a", "prediction": "x", "cui": [null]}', r"line 1: cui must be a list of concepts"),
    ],
)
def test_json_lines_that_cannot_be_scored_are_rejected_in_one_line(write, run, message):
    with pytest.raises(UserError, match=message):
        read_captions(write("run.jsonl", run))


def test_a_csv_without_references_and_a_missing_file_are_mistakes(write, tmp_path):
    with pytest.raises(UserError, match="add --references with a CSV of ID,Caption"):
        read_captions(write("run.csv", "ID,Caption\na,x\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(str(tmp_path / "none.jsonl"))
