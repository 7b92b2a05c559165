"""ImageCLEF submissions."""

import csv
import zipfile

import pytest

from captioning.errors import UserError
from captioning.scoring.submission import check_submission, write_concepts, write_submission


HARD_CAPTIONS = [
    'a "quoted" finding, and a comma',
    "a line\nbreak and\u2028another\x85one\x0b",
    "  white space at both ends ",
    "",
    '"',
    "nul \0 in it",
    "an unpaired surrogate \ud800",
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


def test_a_submission_passes_the_rules_of_the_official_checker(submission):
    lines = submission.read_bytes().decode("utf-8").splitlines()
    assert lines[0] == "ID,Caption"
    assert len(lines) == 1 + len(HARD_CAPTIONS), "the official checker counts lines as str.splitlines does"
    assert all(line.startswith(f'id_{i},"') and line.endswith('"') for i, line in enumerate(lines[1:]))
    assert check_submission(str(submission), references_of(submission)) == []
    with open(submission, encoding="utf-8", newline="") as file:
        texts = [row[1] for row in csv.reader(file)][1:]
    assert texts[:3] == [HARD_CAPTIONS[0], "a line break and another one", "white space at both ends"]
    assert texts[3:6] == ["", '"', "nul in it"]


def test_the_zip_contains_only_the_submission_and_is_the_same_each_time(submission):
    archive = submission.with_name("submission.zip")
    with zipfile.ZipFile(archive) as opened:
        assert opened.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0), "the time of writing is not part of the zip"
        assert opened.namelist() == ["submission.csv"]
        assert opened.read("submission.csv") == submission.read_bytes()
    assert check_submission(str(archive), references_of(submission)) == []


@pytest.mark.parametrize("image_id", ["a,b", 'a"b', " a", "a\n", "", "a\u2028b"])
def test_an_id_that_would_break_the_submission_is_rejected(tmp_path, image_id):
    with pytest.raises(UserError, match="cannot be in a submission"):
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
        ("ID,Caption\nid_0,x\nid_0,y\n", "id 'id_0' occurs 2 times"),
        ("ID,Caption\nid_1,y\nid_0,x\n", "row 2: id 'id_1' where 'id_0' is expected"),
        ("ID,Caption\nid_0,x\n", "lacks ids of '"),
        ("ID,Caption\nid_0,x\nid_1,y\nid_2,z\n", "has ids that '"),
        ("ID,Caption\nid_0,x, z\nid_1,y\n", "row 2: fields: 3, not 2"),
        ('ID,Caption\nid_0,"x, z" \nid_1,y\n', "row 2: the caption has a comma"),
        ("ID,Caption\n id_0,x\nid_1,y\n", "row 2: the id ' id_0' starts or ends with white space"),
        ("ID,CUIs\nid_0,C0040405;\nid_1,\n", "row 2: '' is not a concept"),
        ("ID,CUIs\nid_0,CT\nid_1,\n", "row 2: 'CT' is not a concept"),
        ("ID,CUIs\nid_0,C1;C1\nid_1,\n", "row 2: a concept occurs twice"),
        ("ID,CUIs\nid_0, C1\nid_1,\n", "row 2: the CUIs start or end with white space"),
        ("ID,CUIs\nid_0," + ";".join(f"C{i}" for i in range(101)) + "\nid_1,\n", "row 2: concepts: 101; keep at most"),
        ("ID,CUIs\nid_0\nid_1,\n", "row 2: fields: 1, not 2"),
        ("ID,CUIs\nid_1,\nid_0,\n", "row 2: id 'id_1' where 'id_0' is expected"),
    ],
)
def test_a_fault_of_a_submission_is_named_with_its_place(write, tmp_path, content, fault):
    path = write("submission.csv", content)
    faults = check_submission(path, references_of(tmp_path / "submission.csv", 2))
    assert any(fault in found for found in faults), faults
    assert not any(path in found for found in faults), "the command names the file before each fault"


def test_a_caption_that_the_official_reader_cannot_hold_is_cut(tmp_path):
    path = write_submission(tmp_path, ["a", "b"], ["x" * 200_000, '"' * 200_000])
    assert check_submission(str(path)) == []


def test_concepts_are_written_by_the_rules_beside_the_captions(tmp_path, write):
    captions = write_submission(tmp_path, ["a", "b"], ["x", "y"])
    path = write_concepts(tmp_path, ["a", "b"], [["C0040405", "c0000001 "], []])
    assert path.read_text() == "ID,CUIs\na,C0000001;C0040405\nb,\n"
    assert captions.read_text().startswith("ID,Caption")
    for name in ("submission_concepts.csv", "submission_concepts.zip"):
        assert check_submission(str(tmp_path / name), write("truth.csv", "ID,CUIs\na,\nb,C1\n")) == []
    for ids, wrong, message in (
        ("a", [["CT"]], "'CT' is not a concept"),
        ("a", [[f"C{i}" for i in range(101)]], "concepts: 101; keep at"),
        ("aa", [[], []], "occurs twice"),
    ):
        with pytest.raises(UserError, match=message):
            write_concepts(tmp_path, ids, wrong)


def test_submissions_of_concepts_and_without_references_are_checked(write):
    concepts = write("submission.csv", "ID,CUIs\na,C0040405;C1\nb,\n")
    assert check_submission(concepts) == check_submission(concepts, concepts) == []
    assert check_submission(write("submission.csv", "ID,Caption\nb,x\na,y\n")) == []


def test_a_submission_that_cannot_be_read_is_a_mistake(tmp_path, write):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("submission.csv", "ID,Caption\n")
        archive.writestr("notes.txt", "")
    broken, wrong = write("broken.zip", "no zip"), write("submission.csv", b"ID,Caption\nid_0,\xff\n")
    for path, message in (
        (tmp_path / "two.zip", "must contain submission.csv only"),
        (broken, "cannot be read"),
        (tmp_path / "none.csv", "cannot be read"),
        (wrong, "cannot be read: .* position 16"),
    ):
        with pytest.raises(UserError, match=message):
            check_submission(str(path))
    with pytest.raises(UserError, match="has no rows"):
        check_submission(write("submission.csv", "ID,Caption\na,x\n"), write("truth.csv", "ID,Caption\n"))
