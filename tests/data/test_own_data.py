"""A folder of scans and a table of captions, as people have them, becomes the rows of a run, and of its rerun."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers import flags, make_png, make_rows, read_json, read_lines, run, signal_when
from processes import server
from source_files import rejected, undecoded, write_images, write_parquet, write_table

from captioning.__main__ import main
from captioning.data.checks import check_rows, usable
from captioning.data.image_files import OUTSIDE
from captioning.data.layout import Layout
from captioning.data.sources import UNFINISHED, load_source
from captioning.data.splits import draw_splits
from captioning.errors import UserError
from captioning.files import short_names
from captioning.training.recipe import parse_arguments, resolved_recipe


def load(name: Path | str, **layout) -> DatasetDict:
    return load_source(str(name), layout=Layout(**layout))


def reasons(dataset: DatasetDict, tmp_path: Path) -> dict[str, str]:
    return {row["image_id"]: row["reason"] for row in rejected(dataset, tmp_path)}


def contents(dataset: DatasetDict, tmp_path: Path) -> dict[str, dict[str, tuple]]:
    """By split and id the caption and the bytes of the image."""
    checked = check_rows(dataset, 0.0, tmp_path / "rejected.jsonl")
    return {
        split: {row["image_id"]: (row["caption"], Path(row["image"]["path"]).read_bytes()) for row in usable(rows)}
        for split, rows in checked.items()
    }


def ids(dataset: DatasetDict) -> dict[str, list[str]]:
    return {split: rows["image_id"][:] for split, rows in dataset.items()}


NINE = [f"{split}/{i}.png" for split in ("train", "val", "test") for i in range(3)]


# --- Layouts --------------------------------------------------------------------------------------------------


def imagefolder(folder: Path, ending: str) -> Path:
    for split in ("train", "val", "test"):
        rows = [{"file_name": f"{i}.png", "text": f"{split} {i}"} for i in range(3)]
        write_table(folder / split / f"metadata.{ending}", *rows)
    return folder


def one_metadata(folder: Path, ending: str) -> Path:
    write_table(folder / f"metadata.{ending}", *({"file_name": n, "text": n[:-4].replace("/", " ")} for n in NINE))
    return folder


def split_column(folder: Path, ending: str) -> Path:
    rows = [{"path": n, "report": n[:-4].replace("/", " "), "split": n.split("/")[0]} for n in NINE]
    return write_table(folder / f"all.{ending}", *rows)


def table_of_each_split(folder: Path, ending: str) -> Path:
    for split in ("train", "val", "test"):
        rows = [{"Image Path": str(folder / split / f"{i}.png"), "Findings": f"{split} {i}"} for i in range(3)]
        write_table(folder / f"{split}.{ending}", *rows)
    return folder


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("layout", [imagefolder, one_metadata, split_column, table_of_each_split])
def test_layouts_of_images_and_tables_give_the_same_rows(tmp_path, caplog, layout, ending):
    folder = write_images(tmp_path / "data", *NINE)
    with caplog.at_level("INFO", "captioning"):
        dataset = load(layout(folder, ending))
    expected = {
        {"val": "validation"}.get(split, split): {
            f"{split}/{i}.png": (f"{split} {i}", make_png(NINE.index(f"{split}/{i}.png"))) for i in range(3)
        }
        for split in ("train", "val", "test")
    }
    assert contents(dataset, tmp_path) == expected
    assert sum("image from" in line and "caption from" in line for line in caplog.messages) == 1, "said once"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_folder_of_images_with_captions_csv_is_split_and_said_so(tmp_path, caplog, delimiter):
    """Its ids name the files, without ending and subfolder, as ROCO's do."""
    folder = write_images(tmp_path / "data", *(f"images/{i}.png" for i in range(20)))
    rows = [{"ID": i, "Caption": f"Cyst, {i}; left", "CUIs": "C1;C2"} for i in range(20)]
    write_table(folder / "captions.csv", *rows, delimiter=delimiter)
    with caplog.at_level("INFO", "captioning"):
        dataset = load(folder)
    assert {split: len(own) for split, own in dataset.items()} == {"train": 16, "validation": 2, "test": 2}
    assert "train 16, validation 2, test 2 rows, drawn by image" in caplog.text
    found = {image_id: value for own in contents(dataset, tmp_path).values() for image_id, value in own.items()}
    assert found == {str(i): (f"Cyst, {i}; left", make_png(i)) for i in range(20)}
    assert usable(check_rows(dataset, 0.0, None)["test"])["cui"][0] == ["C1", "C2"]


def test_a_table_elsewhere_needs_the_folder_of_its_images(tmp_path):
    """A table from anyone must not name any file of this machine; the user may say where the images lie."""
    scans = write_images(tmp_path / "disk" / "scans", *(f"{i}.png" for i in range(4)))
    paths = [str(scans / "0.png"), str(scans / "1.png"), "2.png", str(tmp_path / "home" / "x.png")]
    table = write_table(tmp_path / "home" / "labels.csv", *({"path": p, "impression": "A cyst"} for p in paths))
    write_images(tmp_path / "home", "x.png")
    none = write_table(tmp_path / "home" / "none.csv", {"path": paths[0], "text": "A cyst"})
    with pytest.raises(UserError, match=r"none of its 1 images.*outside of the dataset's folder.*set --image_folder"):
        load(none)
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
    dataset = load(table, image_folder=str(scans), **whole)
    assert ids(dataset) == {"train": ["0.png", "1.png", "2.png", "x.png"]}
    assert reasons(dataset, tmp_path) == {"x.png": OUTSIDE}


@pytest.mark.parametrize("source", ["parquet", "saved", "single split"])
def test_other_sources_with_columns_of_other_names(tmp_path, caplog, source):
    rows = make_rows(10).rename_columns({"image": "picture", "caption": "Report", "image_id": "accession"})
    if source == "parquet":
        write_parquet(tmp_path / "data", train=rows, test=rows)
    else:
        (DatasetDict(train=rows, test=rows) if source == "saved" else rows).save_to_disk(str(tmp_path / "data"))
    with caplog.at_level("INFO", "captioning"):
        dataset = load(tmp_path / "data", id_column="accession")
    shown = [line for line in caplog.messages if "image from 'picture', caption from 'Report'" in line]
    assert len(shown) == 1, caplog.messages
    assert set(dataset) == ({"train", "validation", "test"} if source == "single split" else {"train", "test"})
    assert not reasons(dataset, tmp_path)
    without = load(tmp_path / "data", caption_column="accession")
    assert without["test"][0]["caption"].startswith("image_"), "the column of the flag, not that of a usual name"
    numbers = [number for rows in without.values() for number in rows["image_id"][:]]
    assert len(set(numbers)) == len(numbers), "ids are numbers where there are no files, and unique over all splits"


@pytest.mark.parametrize("source", ["parquet", "saved"])
def test_a_column_of_splits_is_obeyed_in_any_source(tmp_path, source):
    paths = [f"/home/x/{i:04d}" for i in range(6)]  # which are shortened
    rows = make_rows(6, image_id=paths).add_column("Split", ["train", "test", "val", "train", "Test", "train"])
    if source == "parquet":
        write_parquet(tmp_path / "data", rows=rows)
    else:
        rows.save_to_disk(str(tmp_path / "data"))
    dataset = load(tmp_path / "data")
    numbers = {split: [int(name[-4:]) for name in rows["image_id"][:]] for split, rows in dataset.items()}
    assert numbers == {"train": [0, 3, 5], "validation": [2], "test": [1, 4]}
    assert not reasons(dataset, tmp_path)
    rows = make_rows(2).add_column("split", ["train", "unused"])
    rows.save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="column 'split' holds 'unused', which is no split"):
        load(tmp_path / "other")


def test_splits_of_adjacent_rows_are_not_copied(tmp_path, monkeypatch):
    rows = make_rows(6).add_column("split", ["train"] * 3 + ["val"] * 2 + ["test"])
    rows.save_to_disk(str(tmp_path / "data"))
    monkeypatch.delattr(Dataset, "flatten_indices")
    dataset = load(tmp_path / "data")
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 3, "validation": 2, "test": 1}
    assert not reasons(dataset, tmp_path)


def test_parquet_of_paths_finds_its_images(tmp_path):
    write_images(tmp_path / "data" / "scans", "a.png", "b.png")
    paths = ["scans/a.png", str(tmp_path / "data" / "scans" / "b.png"), "/etc/passwd"]
    Dataset.from_dict({"image_path": paths, "text": ["x"] * 3}).to_parquet(str(tmp_path / "data" / "train.parquet"))
    dataset = load(tmp_path / "data")
    assert reasons(dataset, tmp_path) == {"passwd": OUTSIDE}
    assert ids(dataset)["train"] == ["a.png", "b.png", "passwd"]


# --- Ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/home/x/scans/1.png", "/home/x/scans/2.png"], ["1.png", "2.png"]),
        (["/home/x/a/1.png", "/home/x/b/1.png"], ["a/1.png", "b/1.png"]),
        (["/home/x/a/1.png", "1.png"], ["a/1.png", "1.png"]),
        (["/home/x/1.png", "C:\\Users\\x\\2.png", "~/3.png", "../4.png"], ["1.png", "2.png", "3.png", "4.png"]),
        ([" /home/x/1.png", "2.png"], ["1.png", "2.png"]),
        (["/home/x/1.png", "study/7", "8"], ["1.png", "study/7", "8"]),
    ],
)
def test_ids_that_are_paths_are_shortened_and_stay_unique(tmp_path, paths, names):
    write_parquet(tmp_path, train=make_rows(len(paths), image_id=paths), test=make_rows(1, image_id=paths[:1]))
    for streaming in (False, True):
        dataset = load_source(str(tmp_path), streaming=streaming)
        assert ids(dataset) == {"train": names, "test": names[:1]}, "and the same image is the same in each split"


def test_an_image_of_several_rows_has_an_id_for_each(tmp_path):
    write_images(tmp_path, "1.png", "a/2.png", "b/2.png")
    rows = [{"file": name, "text": "A cyst"} for name in ("1.png", "a/2.png", "1.png", "b/2.png")]
    dataset = load(write_table(tmp_path / "x.jsonl", *rows), validation_fraction=0.0, test_fraction=0.0)
    assert ids(dataset) == {"train": ["1.png", "a/2.png", "1.png#2", "b/2.png"]}
    drawn = load(tmp_path / "x.jsonl", validation_fraction=0.25, test_fraction=0.0)
    assert ids(drawn)["validation"] in (["a/2.png"], ["b/2.png"]), "the two rows of an image are in one split"


def test_an_id_column_of_a_usual_name_and_repeated_ids_are_as_before(tmp_path):
    write_images(tmp_path, "1.png", "2.png")
    table = write_table(tmp_path / "x.csv", *({"id": 7, "path": f"{i}.png", "text": "A cyst"} for i in (1, 2)))
    assert reasons(load(table, validation_fraction=0.0, test_fraction=0.0), tmp_path) == {"7": "repeated image_id"}


def test_short_names_end_where_no_more_parts_tell_them_apart():
    assert short_names(["/a", "a"]) == {"/a": "a", "a": "a"}
    assert short_names([]) == {}


# --- Splits ---------------------------------------------------------------------------------------------------


def test_no_group_is_in_two_splits_and_the_draw_depends_on_the_seed_alone():
    keys = [f"patient {i % 30}" for i in range(300)]
    fractions = {"test": 0.2, "validation": 0.1}
    drawn = draw_splits(keys, fractions, 0, "x")
    assert {split: len(rows) for split, rows in drawn.items()} == {"train": 210, "test": 60, "validation": 30}
    groups = {split: {keys[row] for row in rows} for split, rows in drawn.items()}
    assert not groups["train"] & groups["test"] and not groups["validation"] & (groups["train"] | groups["test"])
    backwards = draw_splits(keys[::-1], fractions, 0, "x")
    assert {keys[::-1][row] for row in backwards["test"]} == groups["test"], "whatever the order of the rows"
    assert draw_splits(keys, {"test": 0.2}, 0, "x")["test"] == drawn["test"], "whatever else is drawn"
    assert draw_splits(keys, fractions, 1, "x") != drawn


def test_one_large_patient_does_not_fill_the_test_split():
    keys = ["large"] * 80 + [f"small {i}" for i in range(20)]
    for seed in range(5):
        drawn = draw_splits(keys, {"test": 0.1}, seed, "x")
        assert len(drawn["test"]) == 10 and 0 in drawn["train"]


def patients(tmp_path: Path) -> Path:
    write_images(tmp_path / "data", *(f"{i}.png" for i in range(12)))
    rows = [{"path": f"{i}.png", "text": f"Cyst {i}", "ward": "A", "MRN": f"m{i // 3}"} for i in range(12)]
    return write_table(tmp_path / "data" / "x.csv", *rows)


def test_rows_are_split_by_the_column_of_patients(tmp_path):
    dataset = load(patients(tmp_path), group_column="MRN", validation_fraction=0.25, test_fraction=0.25)
    of_split = {split: {int(name[:-4]) // 3 for name in own} for split, own in ids(dataset).items()}
    assert sorted(len(own) for own in of_split.values()) == [1, 1, 2]
    assert set().union(*of_split.values()) == {0, 1, 2, 3} and sum(map(len, of_split.values())) == 4
    assert set(dataset["test"]["group"]) == {f"m{patient}" for patient in of_split["test"]}, "retrieval asks for it"
    with pytest.raises(UserError, match=r"1 images or groups are too few for 3 splits; set --test_fraction 0 or"):
        load(tmp_path / "data" / "x.csv", group_column="ward")


def test_groups_may_be_numbers_and_rows_without_one_are_said(tmp_path, caplog):
    rows = make_rows(9).add_column("subject_id", [0, 0, 0, 1, 1, 1, None, 2, 2])
    rows.to_parquet(str(tmp_path / "data.parquet"))
    dataset = load(tmp_path, validation_fraction=0.0, test_fraction=0.3)
    assert "rows without a group: 1;" in caplog.text
    of_split = {split: {rows["subject_id"][int(name[-4:])] for name in own} for split, own in ids(dataset).items()}
    assert not of_split["train"] & of_split["test"]


def test_the_split_of_a_run_does_not_follow_its_seed(tmp_path):
    table = patients(tmp_path)
    whole = ids(load(table))
    assert ids(load(table)) == whole != ids(load(table, split_seed=1))
    start = ["--config_name", "x", "--dataset_name", str(table), "--seed"]
    splits = [ids(load_source(str(table), layout=parse_arguments([*start, seed])[1])) for seed in "12"]
    assert splits == [whole, whole], "else a model scored with another seed would be scored on what it has learned"


@pytest.mark.parametrize("path", ["{0}/{1}.png", "./{0}/{1}.png", "{0}\\{1}.png", ".\\{0}\\{1}.png"])
def test_splits_in_paths_are_kept_however_the_path_is_written(tmp_path, path):
    write_images(tmp_path, *NINE)
    rows = [{"path": path.format(*name[:-4].split("/")), "text": "A cyst", "split": ""} for name in NINE]
    write_table(tmp_path / "metadata.csv", *rows)
    assert ids(load(tmp_path)) == {
        split: [f"{name}/{i}.png" for i in range(3)]
        for split, name in (("train", "train"), ("validation", "val"), ("test", "test"))
    }


def test_images_outside_of_the_folders_of_splits_are_said(tmp_path, caplog):
    write_images(tmp_path, *NINE, "more/1.png")
    write_table(tmp_path / "metadata.csv", *({"path": name, "text": "A cyst"} for name in [*NINE, "more/1.png"]))
    with caplog.at_level("WARNING", "captioning"):
        load(tmp_path)
    assert "9 of 10 images are in the folder of a split, but 'more/1.png' is in none: splits are drawn" in caplog.text


def test_groups_in_two_splits_of_data_that_came_split_are_said(tmp_path, caplog):
    write_images(tmp_path, *NINE)
    rows = [{"path": name, "text": "A cyst", "patient_id": f"p{i % 4}"} for i, name in enumerate(NINE)]
    write_table(tmp_path / "metadata.csv", *rows)
    with caplog.at_level("WARNING", "captioning"):
        load(tmp_path)
    said = "validation: 2 of 3 groups are also in an earlier split", "test: 3 of 3 groups are also in an earlier split"
    assert all(text in caplog.text for text in said)


def test_a_missing_split_is_drawn_from_train_only_if_asked_for(tmp_path):
    DatasetDict(train=make_rows(10), test=make_rows(3, 20)).save_to_disk(str(tmp_path / "data"))
    assert set(load(tmp_path / "data")) == {"train", "test"}
    drawn = load(tmp_path / "data", validation_fraction=0.2)
    assert {split: len(rows) for split, rows in drawn.items()} == {"train": 8, "validation": 2, "test": 3}
    checked = check_rows(drawn, 0.0, None)
    assert all(len(usable(rows)) == len(drawn[split]) for split, rows in checked.items())
    with pytest.raises(UserError, match="has the splits train, test; leave out --test_fraction"):
        load(tmp_path / "data", test_fraction=0.2)


@pytest.mark.parametrize(
    ("message", "values"),
    [
        ("_fraction from 0 to below 1", {"test_fraction": 1.0}),
        ("_fraction from 0 to below 1", {"validation_fraction": -0.1}),
        ("_fraction from 0 to below 1", {"test_fraction": float("nan")}),
        ("leave nothing", {"test_fraction": 0.5, "validation_fraction": 0.5}),
        ("image_folder '/no/such' is not a folder", {"image_folder": "/no/such"}),
        ("set --concepts to manual or all", {"concepts": "some"}),
    ],
)
def test_flags_that_cannot_be_are_refused(message, values):
    with pytest.raises(UserError, match=message):
        Layout(**values)


# --- Mistakes and malice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", r"x\.csv' is empty"),
        ("x.csv", "path,text\n", r"x\.csv' holds no row"),
        ("x.csv", "a,b\n1,2\n", "column 'image' is missing, it has a, b; name the one .* by --image_column"),
        ("x.csv", "path,b\n1,2\n", "column 'caption' is missing, it has path, b; .* by --caption_column"),
        ("x.csv", "path,path,text\n1,2,3\n", "column 'path' twice"),
        ("x.csv", 'path,text\na.png,"open\nb.png,c\n', "line 2: a double quote is not closed"),
        ("x.csv", "path,text\na.png,\xff\n", "is not UTF-8"),
        ("x.csv", "path,text\nb.png,A cyst\n", r"none of its 1 images .* 'b\.png' \(missing image file\)"),
        ("x.jsonl", "{}\n[1]\n", r"x\.jsonl', line 2 is not a JSON object"),
        ("x.jsonl", "[" * 100_000, "line 1 is not a JSON object"),
        ("x.txt", "path,text\n", "is no table"),
        ("x.csv", "path,text,split\na.png,b,train\na.png,c,unused\n", "column 'split' holds 'unused', .* no split"),
        ("x.csv", "path,text,Split\na.png,b,training\n", "column 'Split' holds 'training', .* no split"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, name, content, message):
    write_images(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name)
    assert len(str(error.value)) < 600


def test_flags_of_columns_that_are_not_there_and_tables_in_the_way(tmp_path):
    table = patients(tmp_path)
    with pytest.raises(UserError, match="--caption_column 'txt' is not a column; did you mean 'text'"):
        load(table, caption_column="txt")
    with pytest.raises(UserError, match=r"or give a table itself: --dataset_name .*x\.csv"):
        load(table.parent)
    with pytest.raises(UserError, match="--caption_column does not go with --streaming"):
        load_source(str(table), streaming=True, layout=Layout(caption_column="text"))
    with pytest.raises(UserError, match="is not parquet"):
        load_source(str(table), streaming=True)
    write_table(tmp_path / "zenodo" / "train_captions.csv", {"ID": "a", "Caption": "A cyst"})
    with pytest.raises(UserError, match="--id_column does not go with the layout of Zenodo"):
        load(tmp_path / "zenodo", id_column="ID")
    os.mkfifo(table.parent / "pipe.csv")
    with pytest.raises(UserError, match="is no table"):
        load(table.parent / "pipe.csv")
    with pytest.raises(UserError, match=r"'nowhere\.csv' does not exist"):
        load("nowhere.csv")


def test_rows_of_a_hostile_table_are_rejected_and_read_nothing(tmp_path):
    folder = write_images(tmp_path / "data", "good.png", "one/same.png", "two/same.png")
    write_images(tmp_path, "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to("good.png")
    names = ["good.png", "inside.png", r"one\same.png", "../secret.png", str(tmp_path / "secret.png"), "/etc/passwd"]
    names += ["link.png", "same.png", "", None, "\0", "x" * 5000, "one", ["good.png"], "good.png"]
    rows = [{"image": name, "caption": "A cyst \ud800"} for name in names[:-1]]
    table = write_table(folder / "x.jsonl", *rows, {"image": "good.png", "caption": {"a": 1}})
    dataset = load(table, validation_fraction=0.0, test_fraction=0.0)
    found = {row["row"]: row["reason"] for row in rejected(dataset, tmp_path)}
    missing = "missing image file"
    expected = dict.fromkeys((3, 4, 5, 6), OUTSIDE) | dict.fromkeys((7, 8, 9), missing) | {
        10: OUTSIDE, 11: "overlong image_id", 12: "unreadable image: is not a regular file", 13: "image is not text",
        14: "caption is not text",
    }  # fmt: skip
    assert found == expected
    images = [dataset["train"][row]["image"] for row in (3, 4, 5, 6, 10, 13, 14)]
    assert images == [None] * 7, "nothing later reads what must not be read"


def test_reasons_are_named_when_no_row_is_left(tmp_path):
    rows = make_rows(3, caption=["", " ", "A cyst"], image=[{"bytes": b"x", "path": None}] * 3)
    with pytest.raises(UserError, match=r"no usable row out of 3 \(2 x blank caption, 1 x unreadable image\); see"):
        check_rows(undecoded(test=rows), 1.0, tmp_path / "rejected.jsonl")


# --- prepare, runs, reruns ------------------------------------------------------------------------------------


def test_prepare_takes_the_same_flags_and_its_folder_is_a_source(tmp_path, capsys):
    table = patients(tmp_path)
    chosen = {"caption_column": "text", "group_column": "MRN", "test_fraction": 0.25, "validation_fraction": 0.25}
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    main(["prepare", str(table), str(tmp_path / "stored"), *words])
    assert "train 6, validation 3, test 3" in capsys.readouterr().out
    assert ids(load(tmp_path / "stored")) == ids(load(table, **chosen))
    assert not (tmp_path / "stored" / UNFINISHED).exists()


def test_a_folder_that_prepare_did_not_finish_names_itself(tmp_path, capsys):
    table, folder = patients(tmp_path), tmp_path / "stored"
    process = server().start(["-m", "captioning", "prepare", table, folder])
    signal_when((folder / UNFINISHED).exists, signal.SIGKILL, process)
    process.wait(60)
    with pytest.raises(UserError, match="is half written: the command that wrote it was stopped; delete it"):
        load(folder)
    words = ["prepare", str(table), str(folder)]
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"is half written: .*delete it and run again"):
        main(words)
    shutil.rmtree(folder)
    main(words)
    assert set(load(folder)) == {"train", "validation", "test"}


def test_a_folder_of_rejected_rows_alone_does_not_offer_them_as_a_table(tmp_path):
    (tmp_path / "rejected.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"see docs/data\.md$"):
        load(tmp_path)


def test_prepare_goes_on_in_a_folder_that_holds_rejected_rows_only(tmp_path):
    table = patients(tmp_path)
    (table.parent / "0.png").unlink()
    words = ["prepare", str(table), str(tmp_path / "stored"), "--validation_fraction", "0", "--test_fraction", "0"]
    with pytest.raises(UserError, match=r"1 of 12 rows cannot be used \(1 x missing image file\)"):
        main(words)
    main([*words, "--max_rejected_fraction", "0.5"])
    assert len(load(tmp_path / "stored")["train"]) == 11


def test_a_recipe_rerun_draws_the_same_rows(tmp_path):
    table = patients(tmp_path)
    words = ["--config_name", "x", "--dataset_name", str(table), "--group_column", "MRN", "--test_fraction", "0.5"]
    first = parse_arguments(words)
    (tmp_path / "recipe.json").write_text(json.dumps(resolved_recipe(*first)))
    again = parse_arguments([str(tmp_path / "recipe.json")])[1]
    assert (again.group_column, again.test_fraction) == ("MRN", 0.5)
    assert ids(load_source(again.dataset_name, layout=again)) == ids(load_source(str(table), layout=first[1]))


def test_a_run_on_a_table_of_scans(config_file, tmp_path):
    table = patients(tmp_path)
    run(flags(config_file, table, tmp_path / "run", num_train_epochs=1, group_column="MRN"))
    recipe = read_json(tmp_path / "run" / "recipe.json")
    assert (recipe["group_column"], recipe["validation_fraction"]) == ("MRN", None)
    names = [row["image_id"] for row in read_lines(tmp_path / "run" / "predictions" / "test.jsonl")]
    assert names == ids(load(table, group_column="MRN"))["test"]
