"""Every source of data gives the same rows; bad rows are rejected, counted and listed; captions become tokens."""

import functools
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, load_from_disk
from helpers import make_png, make_rows, read_lines
from source_files import rejected, undecoded, write_table, zenodo_folder, zip_folder

from captioning.__main__ import main
from captioning.data import phantoms
from captioning.data.checks import check_rows, usable
from captioning.data.layout import Layout
from captioning.data.sources import dataset_commit, load_source
from captioning.data.tokenize_captions import tokenize
from captioning.data.zenodo import concept_names
from captioning.errors import UserError


def check(dataset: DatasetDict, folder: Path, fraction: float = 1.0) -> DatasetDict:
    return check_rows(dataset, fraction, folder / "rejected.jsonl")


# --- Sources --------------------------------------------------------------------------------------------------


def test_parquet_and_saved_folders_give_the_same_rows(raw_dataset, parquet_folder, tmp_path):
    raw_dataset.save_to_disk(str(tmp_path / "saved"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (parquet_folder / "data").iterdir():
        (flat / file.name.replace("validation-", "val-")).write_bytes(file.read_bytes())
    expected = raw_dataset["validation"]
    for source in (parquet_folder, tmp_path / "saved", flat):
        loaded = load_source(str(source))
        assert {split: len(rows) for split, rows in loaded.items()} == {"train": 24, "validation": 10, "test": 7}
        rows = usable(check(loaded, tmp_path)["validation"])
        assert rows["image_id"][:] == expected["image_id"][:]
        assert rows["caption"][:] == expected["caption"][:]
        assert rows["cui"][:2] == [["C1306645", "C0817096"], []], "['nan'] means no concept"
        assert rows[3]["image"]["bytes"] == make_png(103)


@pytest.mark.parametrize("zipped", [False, True])
def test_zenodo_layout(tmp_path, zipped):
    folder = zenodo_folder(tmp_path / "zenodo", zipped)
    dataset = check(load_source(str(folder)), tmp_path, 0.0)
    assert list(dataset) == ["train", "validation", "test"]
    rows = usable(dataset["validation"])
    assert rows["image_id"][:] == [f"ROCOv2_2023_valid_{i:06d}" for i in (1, 2, 5, 9)]
    assert rows["caption"][1] == 'A "quoted", comma-separated\ncaption 1'
    assert rows["cui"][:] == [["C0040405", "C0817096"], [], ["C1306645"], []]


def test_manual_or_all_concepts_of_zenodo_are_taken(tmp_path):
    folder = zenodo_folder(tmp_path / "zenodo")
    manual, every = (load_source(str(folder), layout=Layout(concepts=kind)) for kind in ("manual", "all"))
    assert manual["test"]["cui"][:] == [["C1306645"]] * 4
    assert every["test"]["cui"][:] == load_source(str(folder))["test"]["cui"][:] != manual["test"]["cui"][:]
    (folder / "test_concepts_manual.csv").unlink()
    with pytest.raises(UserError, match=r"test_concepts_manual\.csv' does not exist"):
        load_source(str(folder), layout=Layout(concepts="manual"))
    with pytest.raises(UserError, match="is for the tables of Zenodo"):
        load_source("phantoms", layout=Layout(concepts="all"))


def test_names_of_concepts_are_read_where_there_are_some(tmp_path):
    assert concept_names(tmp_path) == {}
    names = {"C0040405": "X-Ray CT, any", "C1": ""}
    write_table(tmp_path / "cui_mapping.csv", *({"CUI": cui, "Canonical name": name} for cui, name in names.items()))
    assert concept_names(tmp_path) == names


def test_a_changed_zenodo_folder_is_read_again(tmp_path):
    folder = zenodo_folder(tmp_path / "zenodo")
    check(load_source(str(folder)), tmp_path, 0.0)
    write_table(folder / "test_captions.csv", {"ID": "ROCOv2_2023_test_000001", "Caption": "New."})
    (folder / "valid_images" / "ROCOv2_2023_valid_000005.png").write_bytes(b"now a text")
    again = load_source(str(folder))
    assert again["test"]["caption"][:] == ["New."]
    assert len(usable(check(again, tmp_path)["validation"])) == 3


def test_zenodo_images_of_other_endings_are_found(tmp_path):
    folder = zenodo_folder(tmp_path / "zenodo")
    for file in (folder / "test_images").iterdir():
        file.rename(file.with_suffix(".PNG"))
    check(load_source(str(folder)), tmp_path, 0.0)


def test_a_damaged_image_in_a_zip_is_rejected(tmp_path):
    folder = zenodo_folder(tmp_path / "zenodo", zipped=True)
    archive = folder / "test_images.zip"
    content = bytearray(archive.read_bytes())
    content[content.rindex(b".png", 0, content.index(b"PK\x01\x02")) + 60] ^= 0xFF  # in the last image
    archive.write_bytes(bytes(content))
    (row,) = rejected(load_source(str(folder)), tmp_path)
    assert "cannot be unpacked" in row["reason"]


@pytest.mark.parametrize("zipped", [False, True])
def test_zenodo_captions_without_their_image_are_rejected(tmp_path, zipped):
    images = zenodo_folder(tmp_path / "zenodo") / "test_images"
    (images / "ROCOv2_2023_test_000005.png").unlink()
    if zipped:
        zip_folder(images)
    (row,) = rejected(load_source(str(images.parent)), tmp_path)
    expected = {"split": "test", "row": 2, "image_id": "ROCOv2_2023_test_000005", "reason": "missing image file"}
    assert row == expected


def test_phantoms_are_a_source(monkeypatch):
    monkeypatch.setattr(phantoms, "SPLIT_SIZES", dict.fromkeys(phantoms.SPLIT_SIZES, 2))
    assert list(load_source("phantoms")) == ["train", "validation", "test"]


def test_a_revision_stays_as_it_is_where_there_is_no_commit_to_be_had(tmp_path):
    """What a reachable Hub answers is tested in test_hub.py."""
    assert dataset_commit("nobody/nothing", "main") == "main", "the Hub is out of reach here"
    assert dataset_commit("phantoms") is None
    assert dataset_commit(str(tmp_path)) is None


def test_no_copy_of_the_images_is_made(parquet_folder, tmp_path):
    """Each step joins small columns to the memory-mapped images instead of writing 18 GB again."""
    loaded = load_source(str(parquet_folder))
    images = {file["filename"] for file in loaded["train"].cache_files}
    checked = check(loaded, tmp_path)
    assert images < {file["filename"] for file in checked["train"].cache_files}


# --- Mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("nobody/nothing", "cannot be loaded from the Hub"),
        ("phantom", "did you mean 'phantoms'"),
    ],
)
def test_unknown_datasets(name, message):
    with pytest.raises(UserError, match=message):
        load_source(name)


def test_the_name_of_a_format_does_not_read_the_working_folder(parquet_folder, monkeypatch):
    monkeypatch.chdir(parquet_folder)
    with pytest.raises(UserError, match="dataset 'parquet' is a format, of which the working folder would be read"):
        load_source("parquet")


def test_a_folder_that_holds_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"holds none of dataset_dict\.json"):
        load_source(str(tmp_path))
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read"):
        load_source(str(tmp_path))
    with pytest.raises(UserError, match="is no table"):
        load_source(str(tmp_path / "train-0.parquet"))


def test_a_split_under_two_names_is_refused(tmp_path):
    DatasetDict(dev=make_rows(2), validation=make_rows(2)).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="split 'validation' under two names"):
        load_source(str(tmp_path))


def test_a_missing_column_is_named(raw_dataset, tmp_path):
    for column in ("image", "caption"):
        raw_dataset.remove_columns(column).save_to_disk(str(tmp_path / column))
        with pytest.raises(UserError, match=f"column '{column}' is missing"):
            load_source(str(tmp_path / column))
    raw_dataset.remove_columns("cui").save_to_disk(str(tmp_path / "cui"))
    assert usable(check(load_source(str(tmp_path / "cui")), tmp_path)["test"])["cui"][0] == []


def test_a_zenodo_table_without_its_columns(tmp_path):
    folder = zenodo_folder(tmp_path / "zenodo")
    table = folder / "train_captions.csv"
    for content, message in (
        ("ID,Text\na,b\n", "has the columns ID, Text; ID and Caption are needed"),
        ("ID,Caption\n", r"train_captions\.csv' holds no row below its columns"),
        ("", r"train_captions\.csv' is empty; add captions"),
    ):
        table.write_text(content)
        with pytest.raises(UserError, match=message):
            load_source(str(folder))


# --- Checks ---------------------------------------------------------------------------------------------------


def test_bad_rows_are_left_out_and_listed_with_the_reason(tmp_path):
    good = make_rows(8)
    images = [dict(image) for image in good.cast_column("image", Image(decode=False))["image"]]
    images[1] = {"bytes": b"<html>not found</html>", "path": None}
    images[2] = {"bytes": make_png(2)[:150], "path": None}
    images[3] = {"bytes": b"", "path": None}
    captions = good["caption"][:]
    captions[4], captions[5] = "\u202f", " \n\t"
    ids = good["image_id"][:]
    ids[7] = ids[6]
    rows = make_rows(8, image=images, caption=captions, image_id=ids)
    dataset = check(undecoded(test=rows), tmp_path)
    assert usable(dataset["test"])["image_id"][:] == ["image_0000", "image_0006"]
    reasons = {row["row"]: row["reason"].split(":")[0] for row in read_lines(tmp_path / "rejected.jsonl")}
    assert reasons == dict.fromkeys((1, 2, 3), "unreadable image") | dict.fromkeys((4, 5), "blank caption") | {
        7: "repeated image_id"
    }


def test_too_many_bad_rows_are_an_error_that_counts_them(tmp_path):
    rows = make_rows(10, caption=["", "  ", *make_rows(8)["caption"]])
    with pytest.raises(UserError, match=r"2 of 10 rows cannot be used \(2 x blank caption\).*max_rejected_fraction"):
        check(undecoded(test=rows), tmp_path, 0.1)
    assert len(read_lines(tmp_path / "rejected.jsonl")) == 2
    check(undecoded(test=rows), tmp_path, 0.2)


def test_numbers_as_ids_and_missing_values(tmp_path):
    rows = make_rows(3).remove_columns(["image_id", "caption"])
    rows = rows.add_column("image_id", [1, 2, None]).add_column("caption", ["A cyst.", None, "A cyst."])
    dataset = check(undecoded(test=rows), tmp_path)
    assert dataset["test"]["rejected"][:] == [None, "blank caption", "blank image_id"]
    assert usable(dataset["test"])["image_id"][:] == ["1"]


# --- Tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [64, 8])
def test_tokens_are_those_of_the_tokenizer_and_long_captions_are_cut_but_end(checked, captioner, caplog, max_length):
    with caplog.at_level("INFO", "captioning"):
        rows = tokenize(checked, captioner, max_length)["train"]
    for row in rows.select(range(6)):
        expected = captioner.tokenizer(row["caption"], truncation=True, max_length=max_length)["input_ids"]
        assert row["input_ids"] == [captioner.tokenizer.bos_token_id, *expected[1:]]
    cut = sum(len(captioner.tokenizer(caption)["input_ids"]) > max_length for caption in rows["caption"])
    assert (f"train: {cut} of 24 captions are cut to {max_length} tokens" in caplog.text) == (max_length == 8)


def test_the_prompt_is_put_before_every_caption(checked, captioner):
    captioner.set_prompt("a picture of")
    row = tokenize(checked, captioner, 64)["train"][0]
    expected = captioner.tokenizer(f"a picture of {row['caption']}")["input_ids"]
    assert row["input_ids"] == [captioner.tokenizer.bos_token_id, *expected[1:]]
    with pytest.raises(UserError, match="no room for a caption"):
        tokenize(checked, captioner, len(captioner.prompt_ids) + 2)


def test_checks_and_tokens_are_cached_for_the_same_prompt(parquet_folder, captioner, tmp_path, monkeypatch):
    def tokens():
        return tokenize(check(load_source(str(parquet_folder)), tmp_path), captioner, 64)["train"]

    first = tokens()

    @functools.wraps(Dataset._map_single)  # what `map` calls where the cache has nothing
    def refuse(*args, **kwargs):
        raise AssertionError("tokenized or checked again")

    monkeypatch.setattr(Dataset, "_map_single", staticmethod(refuse))
    assert tokens()["input_ids"][:] == first["input_ids"][:]
    captioner.set_prompt("a picture of")
    with pytest.raises(AssertionError, match="again"):
        tokens()


# --- python -m captioning prepare -----------------------------------------------------------------------------


def test_the_command_stores_any_source_for_load_from_disk(tmp_path, capsys):
    folder = zenodo_folder(tmp_path / "zenodo")
    (folder / "test_images" / "ROCOv2_2023_test_000005.png").write_bytes(b"")
    main(["prepare", str(folder), str(tmp_path / "stored"), "--max_rejected_fraction", "0.3"])
    assert "train 4, validation 4, test 3" in capsys.readouterr().out
    stored = load_from_disk(str(tmp_path / "stored"))
    assert stored["test"].column_names == ["image", "image_id", "caption", "cui"]
    for file in (folder / "test_images").iterdir():
        file.unlink()  # the stored set holds the images themselves
    assert np.asarray(stored["test"][0]["image"]).shape == (36, 40)
    assert read_lines(tmp_path / "stored" / "rejected.jsonl")[0]["split"] == "test"
    assert usable(check(load_source(str(tmp_path / "stored")), tmp_path)["test"])["cui"][0] == ["C0040405", "C0817096"]


def test_the_command_never_overwrites(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not an empty folder"):
        main(["prepare", "phantoms", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
