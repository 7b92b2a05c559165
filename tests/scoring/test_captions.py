"""Predictions on disk, captions of any system, and ImageCLEF submissions."""

import csv
import json
import zipfile

import numpy as np
import pytest

from captioning.errors import UserError
from captioning.scoring.captions import Captions, read_captions, read_csv, read_predictions, write_predictions
from captioning.scoring.submission import check_submission, write_submission


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


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path as text."""

    def write_file(name, content) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


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


def test_blank_lines_and_a_header_with_spaces_are_no_mistake(write):
    assert read_csv(write("run.csv", "ID, caption\n\na,x\n\nb,y\n\n"), "Caption") == {"a": "x", "b": "y"}
    rows = "\n".join(json.dumps({"image_id": i, "prediction": i, "reference": i}) + "\n" for i in "ab")
    assert read_captions(write("run.jsonl", "\ufeff" + rows + "\n\n")).image_ids == ["a", "b"]


def test_concepts_may_be_one_text_and_half_a_surrogate_pair_is_replaced(write):
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
            r"1 ids of '.*refs\.csv' are missing in '.*run\.csv' \(b\); both files must be",
        ),
        ("ID,Caption\na,x\nb,y\nc,z\n", r"1 ids not in '.*refs\.csv' are in '.*run\.csv' \(c\)"),
        ("ID,Caption\na,x\na,y\n", r"line 3: id 'a' for the second time"),
        ("ID,Caption\na,x, y\nb,z\n", r"line 2: 3 fields; ID and Caption are needed, the latter in double quotes"),
        ("ID,Text\na,x\n", r"has the columns \['ID', 'Text'\]; they must be"),
        ("ID;Caption\na;x\n", r"line 1: 1 fields; the fields must be separated by commas"),
        ("ID,Caption\n", r"run\.csv' holds no captions"),
        ("ID,Caption,Other\n", r"has the columns \['ID', 'Caption', 'Other'\]; they must be \['ID', 'Caption'\]"),
        (b"ID,Caption\na,\xff\n", r"is not UTF-8 \(byte 13\); save it as CSV in UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_scored_is_refused_in_one_line(write, run, message):
    with pytest.raises(UserError, match=message):
        read_captions(write("run.csv", run), write("refs.csv", "ID,Caption\na,x\nb,y\n"))


@pytest.mark.parametrize(
    "run, message",
    [
        ("{}\n", r"line 1 is no JSON object with image_id and prediction"),
        ("nonsense\n", r"line 1 is no JSON object"),
        ("[1]\n", r"line 1 is no JSON object"),
        ("[" * 100_000, r"line 1 is no JSON object"),
        ('{"image_id": "a", "prediction": 3}', r"line 1: image_id, prediction and reference must be texts"),
        ('{"image_id": "a", "prediction": "x"}\n' * 2, r"line 2: id 'a' for the second time"),
        ("", r"holds no captions"),
        (b"\xff", r"is not UTF-8 \(byte 0\)"),
        ('{"image_id": "a", "prediction": "x", "cui": 5}', r"line 1: cui must be a list of concepts"),
        ('{"image_id": "a", "prediction": "x", "cui": [null]}', r"line 1: cui must be a list of concepts"),
    ],
)
def test_json_lines_that_cannot_be_scored_are_refused_in_one_line(write, run, message):
    with pytest.raises(UserError, match=message):
        read_captions(write("run.jsonl", run))


def test_a_csv_without_references_and_a_missing_file_are_mistakes(write, tmp_path):
    with pytest.raises(UserError, match="add --references with a CSV of ID,Caption"):
        read_captions(write("run.csv", "ID,Caption\na,x\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(str(tmp_path / "none.jsonl"))


# --- ImageCLEF submission -------------------------------------------------------------------------------------

HARD_CAPTIONS = [
    'a "quoted" finding, and a comma',
    "a line\nbreak and\u2028another\x85one\x0b",
    "  white space at both ends ",
    "",
    '"',
    "nul \0 in it",
    "half a surrogate \ud800 pair",
    "=SUM(1)",
]


@pytest.fixture
def submission(tmp_path):
    ids = [f"id_{i}" for i in range(len(HARD_CAPTIONS))]
    return write_submission(tmp_path, ids, HARD_CAPTIONS)


def references_of(path, number=8) -> str:
    target = path.with_name("truth.csv")
    target.write_text("ID,Caption\n" + "".join(f'id_{i},"x, {i}"\n' for i in range(number)))
    return str(target)


def test_a_submission_is_what_the_official_checker_wants(submission):
    content = submission.read_bytes()
    lines = content.decode("utf-8").splitlines()
    assert lines[0] == "ID,Caption"
    assert len(lines) == 1 + len(HARD_CAPTIONS), "the official checker counts lines as str.splitlines does"
    assert all(line.startswith(f'id_{i},"') and line.endswith('"') for i, line in enumerate(lines[1:]))
    assert check_submission(str(submission), references_of(submission)) == []
    with open(submission, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == ["id_0", 'a "quoted" finding, and a comma']
    assert rows[2] == ["id_1", "a line break and another one"]
    assert rows[3] == ["id_2", "white space at both ends"]
    assert rows[4:7] == [["id_3", ""], ["id_4", '"'], ["id_5", "nul in it"]]


def test_the_zip_holds_the_submission_alone_and_is_the_same_each_time(submission, tmp_path):
    archive = submission.with_name("submission.zip")
    with zipfile.ZipFile(archive) as opened:
        assert opened.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0), "the hour of its making"
        assert opened.namelist() == ["submission.csv"]
        assert opened.read("submission.csv") == submission.read_bytes()
    assert check_submission(str(archive), references_of(submission)) == []
    before = archive.read_bytes()
    write_submission(tmp_path, [f"id_{i}" for i in range(len(HARD_CAPTIONS))], HARD_CAPTIONS)
    assert archive.read_bytes() == before


@pytest.mark.parametrize("image_id", ["a,b", 'a"b', " a", "a\n", "", "a\u2028b"])
def test_an_id_that_would_break_the_submission_is_refused(tmp_path, image_id):
    with pytest.raises(UserError, match="cannot stand in a submission"):
        write_submission(tmp_path, [image_id], ["x"])


@pytest.mark.parametrize(
    "content, fault",
    [
        ("\ufeffID,Caption\nid_0,x\nid_1,y\n", "byte order mark"),
        ("ID,Caption\nid_0,x\n\nid_1,y\n", "line 3: blank"),
        ("ID,Caption\nid_0,x\nid_1,y\n\n", "line 4: blank"),
        ("Id,Caption\nid_0,x\nid_1,y\n", "the header is 'Id,Caption'"),
        ("id_0,x\nid_1,y\n", "the header is 'id_0,x'"),
        ("", "the header is ''"),
        ("ID,Caption\n", "there are no rows"),
        ("ID,Caption\nid_0," + "x" * 200_000 + "\n", "field larger than field limit (131072); shorten it"),
        ("ID,Caption\nid_0,x\nid_0,y\n", "row 3: id 'id_0' for the second time"),
        ("ID,Caption\nid_1,y\nid_0,x\n", "row 2: id 'id_1' where 'id_0' is due"),
        ("ID,Caption\nid_0,x\n", "1 ids are missing; add them (id_1)"),
        ("ID,Caption\nid_0,x\nid_1,y\nid_2,z\n", "1 ids are not among the official ones; remove them (id_2)"),
        ("ID,Caption\nid_0,x, z\nid_1,y\n", "row 2: 3 fields"),
        ('ID,Caption\nid_0,"x, z" \nid_1,y\n', "row 2: the caption holds a comma"),
        ("ID,Caption\n id_0,x\nid_1,y\n", "row 2: the id ' id_0' has white space"),
        (b"ID,Caption\nid_0,\xff\nid_1,y\n", "not UTF-8 (byte 16)"),
        ("ID,CUIs\nid_0,C0040405;\nid_1,\n", "row 2: '' is no concept"),
        ("ID,CUIs\nid_0,CT\nid_1,\n", "row 2: 'CT' is no concept"),
        ("ID,CUIs\nid_0,C1;C1\nid_1,\n", "row 2: a concept is there twice"),
        ("ID,CUIs\nid_0, C1\nid_1,\n", "row 2: the CUIs have white space"),
    ],
)
def test_a_fault_of_a_submission_is_named_with_its_place(write, tmp_path, content, fault):
    path = write("submission.csv", content)
    faults = check_submission(path, references_of(tmp_path / "submission.csv", 2))
    assert any(fault in found for found in faults), faults


def test_a_caption_that_the_official_reader_cannot_hold_is_cut(tmp_path):
    path = write_submission(tmp_path, ["a", "b"], ["x" * 200_000, '"' * 200_000])
    assert check_submission(str(path)) == []


def test_a_submission_has_each_image_once(tmp_path):
    with pytest.raises(UserError, match="is there twice"):
        write_submission(tmp_path, ["a", "a"], ["x", "y"])


def test_submissions_of_concepts_and_without_references_are_checked(write):
    assert check_submission(write("submission.csv", "ID,CUIs\na,C0040405;C1\nb,\n")) == []
    assert check_submission(write("submission.csv", "ID,Caption\nb,x\na,y\n")) == []


def test_a_zip_with_more_in_it_is_a_fault_and_no_zip_is_a_mistake(tmp_path, write):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("submission.csv", "ID,Caption\n")
        archive.writestr("notes.txt", "")
    assert "must hold submission.csv alone" in check_submission(str(tmp_path / "two.zip"))[0]
    with pytest.raises(UserError, match="cannot be read"):
        check_submission(write("broken.zip", "no zip"))
    with pytest.raises(UserError, match="cannot be read"):
        check_submission(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="holds no ids"):
        check_submission(write("submission.csv", "ID,Caption\na,x\n"), write("truth.csv", "ID,Caption\n"))
