"""Files made by strangers: no traceback, no hang, bounded memory, and no code of theirs is run."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import DatasetDict
from helpers import TINY_CONFIG, flags, make_captions, make_png, make_rows, read_json, run, save_captioner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from source_files import rejected, write_images

import run_captioning
from captioning.command_line import exit_on_user_error
from captioning.data import checks, image_files, images, sources, zenodo
from captioning.data.images import open_image
from captioning.errors import UserError, printable
from captioning.models.load import build_captioner, load_captioner
from captioning.training.recipe import parse_arguments, read_recipe, recipe_fields


EXAMPLES = settings(
    max_examples=150,
    deadline=5000,  # ms: a hang is a failure
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BIDIRECTIONAL = "\u202e\u2066\x1b[31m"


def as_bytes(content: bytes) -> dict:
    return {"bytes": content, "path": None}


# --- Images ---------------------------------------------------------------------------------------------------


def encoded(name: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((24, 20), 60).convert(mode).save(buffer, name, **options)
    return buffer.getvalue()


IMAGES = [encoded(name) for name in ("PNG", "JPEG", "BMP", "WEBP", "JPEG2000")]
IMAGES += [encoded("PNG", "I;16"), encoded("GIF", "P"), encoded("TIFF", "F"), encoded("TIFF", compression="tiff_lzw")]


CHANGES = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)


@settings(EXAMPLES, max_examples=600)
@given(st.sampled_from(IMAGES) | st.binary(max_size=300), CHANGES, st.floats(0.2, 1))
def test_damaged_images_are_decoded_or_refused(content, changes, kept):
    damaged = bytearray(content)
    for place, new in changes:
        start = int(place * len(damaged))
        damaged[start : start + len(new)] = new
    try:
        image = open_image(as_bytes(bytes(damaged[: int(kept * len(damaged)) + 1])))
    except ValueError as error:
        assert str(error)
    else:
        assert image.width * image.height <= images.MAX_PIXELS


def png_of(width: int, height: int, bits: int = 8, rows: int = 1) -> bytes:
    """A PNG whose header claims any size, with a few rows of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0" * rows * (1 + width * bits // 8))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height", "bits"), [(10_000, 9_000, 8), (100_000, 100_000, 8), (6_000, 5_000, 16)])
def test_giant_images_are_refused_before_they_are_decoded(width, height, bits):
    tracemalloc.start()
    with pytest.raises(ValueError, match="pixels"):
        open_image(as_bytes(png_of(width, height, bits)))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_mammogram_is_not_refused():
    pixels = Image.new("I;16", (4_096, 5_328), 2_000)
    assert open_image(pixels).size == (4_096, 5_328)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "."])
def test_a_device_pipe_or_folder_is_read_neither_as_an_image_nor_as_a_recipe(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        open_image({"bytes": None, "path": str(tmp_path / name)})
    with pytest.raises(UserError, match="is not a file"):
        read_recipe(str(tmp_path / name))


def test_postscript_starts_no_program(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program is started"))
    with pytest.raises(ValueError, match="not an image"):
        open_image(as_bytes(buffer.getvalue()))


def test_a_stripe_is_refused():
    """Qwen's image processors raise an error at it, in the middle of a training."""
    assert open_image(Image.new("L", (1600, 8))).size == (1600, 8)
    with pytest.raises(ValueError, match="is 8x1601 pixels; one side may be 200 times the other"):
        open_image(Image.new("L", (8, 1601)))


def test_a_small_tiff_of_a_giant_tile_is_refused():
    side = 30_000
    tags = [(256, 100), (257, 100), (258, 8), (259, 1), (262, 1), (277, 1), (322, side), (323, side)]
    tags += [(324, 134), (325, side * side)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    with pytest.raises(ValueError, match="tiles of"):
        open_image(as_bytes(b"II*\0\x08\0\0\0\x0a\0" + entries + bytes(4)))


def test_a_jpeg_of_thousands_of_scans_is_refused_in_time():
    content = encoded("JPEG", "L", progressive=True)
    last = content.rindex(b"\xff\xda")
    open_image(as_bytes(content))
    began = time.monotonic()
    with pytest.raises(ValueError, match="JPEG scans"):
        open_image(as_bytes(content[:last] + content[last:-2] * 20_000 + content[-2:]))
    assert time.monotonic() - began < 2


# --- Recipes --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(recipe_fields().keys() - {"output_dir", "deepspeed"}))
START = {"config_name": "recipes/configs/blip_small.json", "output_dir": "out"}
RECIPES = {
    "bytes": st.binary(max_size=200),
    "JSON": JSON.map(lambda value: json.dumps(value).encode()),
    "values": st.dictionaries(FIELDS, JSON, min_size=1, max_size=4).map(lambda v: json.dumps(START | v).encode()),
}


@pytest.mark.parametrize("strategy", RECIPES.values(), ids=RECIPES)
@EXAMPLES
@given(data=st.data())
def test_any_file_is_a_recipe_or_refused_in_a_line(tmp_path, strategy, data):
    path = tmp_path / "recipe.json"
    path.write_bytes(data.draw(strategy))
    try:
        parse_arguments([str(path)])
    except UserError as error:
        assert len(printable(str(error)).splitlines()) == 1  # as `exit_on_user_error` shows it
        assert len(str(error)) < 3_000


SETTINGS = {
    "prompt": "\ud800", "num_train_epochs": 1e300, "num_beams": 100_000, "data_seed": -1, "image_size": 1_000_000,
    "dataloader_prefetch_factor": -1, "eval_do_concat_batches": False, "vocab_size": 2**62, "save_only_model": True,
    "accelerator_config": {"split_batches": True}, "dataloader_num_workers": 1_000_000,
    "preprocessing_num_workers": 1_000_000,
}  # fmt: skip
HURTFUL = {name: json.dumps({name: value, "config_name": "x"}) for name, value in SETTINGS.items()} | {
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "huge": " " * 2**20 + "{}",
    "digits": '{"seed": 1' + "0" * 5_000 + "}",
    "integer": '{"seed": 1' + "0" * 300 + "}",
    "NaN": '{"learning_rate": NaN}',
    "infinite": '{"weight_decay": 1e999}',
    "device": '{"accelerator_config": "/dev/zero", "config_name": "x"}',
    "keys": "{" + ",".join(f'"k{i}": 1' for i in range(50_000)) + "}",
}


@pytest.mark.parametrize("content", HURTFUL.values(), ids=HURTFUL)
def test_recipes_meant_to_hurt_are_one_short_line(tmp_path, content):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        parse_arguments([str(path)])
    assert time.monotonic() - began < 5
    assert len(str(error.value)) < 600


def test_a_long_error_keeps_its_advice_and_fits_a_screen(capsys):
    def fail():
        raise UserError(f"unknown key '{'x' * 10**6}\x1b[2J'; see --help")

    with pytest.raises(SystemExit):
        exit_on_user_error(fail)
    shown = capsys.readouterr().err
    assert len(shown) < 2_100
    assert shown.endswith("; see --help\n")
    assert "\x1b" not in shown


# --- Captions -------------------------------------------------------------------------------------------------


def zenodo_folder(folder: Path, captions: bytes, *names: str) -> Path:
    """Write a folder of one split, with these files of images."""
    write_images(folder / "test_images", *names)
    (folder / "test_captions.csv").write_bytes(captions)
    return folder


def checked(folder: Path, tmp_path: Path, streaming: bool = False) -> list[dict]:
    """Load and check a folder; return the rejected rows."""
    return rejected(sources.load_source(str(folder), streaming=streaming), tmp_path)


def table(*rows: tuple[str, str]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("ID", "Caption"), *rows])
    return file.getvalue().encode("utf-8", "surrogatepass")


@settings(EXAMPLES, max_examples=60)
@given(st.binary(max_size=120) | st.text(alphabet=' ,"\n\r\0;aé\u202e', max_size=60).map(str.encode))
def test_any_table_of_captions_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("table")
    path = folder / "captions.csv"
    path.write_bytes(b"ID,Caption\n" + content)
    try:
        for row in zenodo._zenodo_rows(str(path), None, str(folder), ""):
            checks._check_row(row, open_images=True)
    except UserError as error:
        assert "captions.csv" in str(error)


def test_captions_and_ids_meant_to_hurt_are_rejected_and_the_rest_is_kept(tmp_path):
    missing, link = "missing image file", "link out of the"
    rows = [
        ("good", "An effu\0sion", None),
        ("quoted", "A cyst,\nmultilocular", None),
        ("long", "word " * 2_000_000, "overlong caption"),
        ("../escape", "A nodule", missing),
        ("../good", "A nodule", missing),
        ("/etc/passwd", "A nodule", missing),
        ("link", "A nodule", link),
        ("nowhere", "A nodule", link),
        ("", "A nodule", ""),
        ("x" * 2000, "A nodule", "overlong image_id"),
        ("blank", "\u202e\u2066\x07", "blank caption"),
        ("commas", "Chest, CT", "more fields than columns"),
    ]
    names = (f"{name}.png" for name in ("good", "quoted", "long", "blank", "commas"))
    content = table(*(row[:2] for row in rows)).replace(b'"Chest, CT"', b"Chest, CT")
    folder = zenodo_folder(tmp_path / "zenodo", content, *names)
    write_images(tmp_path, "secret.png", "zenodo/escape.png")
    (folder / "test_images" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "test_images" / "nowhere.png").symlink_to("/no/such/file")
    found = {row["row"]: row["reason"] for row in checked(folder, tmp_path)}
    assert found.keys() == {number for number, row in enumerate(rows) if row[2] is not None}
    assert all(rows[number][2] in reason for number, reason in found.items()), found


def test_a_link_within_the_folder_and_a_folder_that_is_a_link_are_followed(tmp_path):
    folder = zenodo_folder(tmp_path / "zenodo", table(("a", "An effusion"), ("b", "A nodule")), "a.png")
    images = folder / "test_images"
    (images / "b.png").symlink_to("a.png")
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    assert not checked(folder, tmp_path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("large", r"[\d,]+ bytes in the zip unpack to 3,145,728"),
        ("dense", r"[\d,]+ bytes in the zip unpack to 4,194,304"),
        ("link", "a symbolic link in the zip"),
        ("encrypted", "cannot be unpacked: .*encrypted"),
        ("traversal", None),  # read from the zip like any other; nothing is written
    ],
)
def test_zips_meant_to_hurt(tmp_path, kind, reason, monkeypatch):
    member = zipfile.ZipInfo("../../b.png" if kind == "traversal" else "b.png")
    member.external_attr = 0o120777 << 16 if kind == "link" else 0
    content = {"large": bytes(3 * 2**20), "dense": bytes(4 * 2**20), "link": b"/etc/passwd"}.get(kind, make_png(2))
    (tmp_path / "test_captions.csv").write_bytes(table(("a", "An effusion"), ("b", "A nodule")))
    path = tmp_path / "test_images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", make_png(1))
        archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    if kind == "encrypted":
        packed = bytearray(path.read_bytes())
        packed[packed.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of the last entry in the directory
        path.write_bytes(packed)
    if kind == "large":
        monkeypatch.setattr(zenodo, "MAX_MEMBER", 2**20)
        monkeypatch.setattr(zenodo, "SMALL_MEMBER", 2**30)
    found = checked(tmp_path, tmp_path)
    assert [row["image_id"] for row in found] == (["b"] if reason else [])
    assert all(re.match(f"unreadable image: {reason}", row["reason"]) for row in found)


@pytest.mark.parametrize("disguise", [False, True])
def test_a_table_reads_no_files_of_the_machine(tmp_path, disguise):
    write_images(tmp_path, "secret.png", "data/own.png")
    paths = [str(tmp_path / "secret.png"), str(tmp_path / "data" / "own.png"), "/etc/passwd", "\0"]
    images = [*({"bytes": None, "path": path} for path in paths), {"bytes": make_png(1), "path": "x.png"}]
    columns = {"image": images, "image_id": list("abcde"), "caption": ["A nodule"] * 5}
    if disguise:
        columns[sources.UNUSABLE] = [""] * 5
    pq.write_table(pa.table(columns), tmp_path / "data" / "train-0.parquet")
    reasons = {row["image_id"]: row["reason"] for row in checked(tmp_path / "data", tmp_path)}
    assert reasons == dict.fromkeys("acd", image_files.OUTSIDE)
    reasons = {row["image_id"]: row["reason"] for row in checked(tmp_path / "data", tmp_path, streaming=True)}
    assert reasons == dict.fromkeys("abcd", "unreadable image: no image")


def test_foreign_files_are_found_in_splits_that_a_column_names(tmp_path):
    images = [{"bytes": None, "path": "/etc/passwd"}] * 2 + [{"bytes": make_png(1), "path": None}] * 2
    columns = {"image": images, "image_id": list("abcd"), "caption": ["A nodule"] * 4, "split": ["test", "train"] * 2}
    pq.write_table(pa.table(columns), tmp_path / "rows-0.parquet")
    reasons = {row["image_id"]: row["reason"] for row in checked(tmp_path, tmp_path)}
    assert reasons == dict.fromkeys("ab", image_files.OUTSIDE)


FILES = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PLACES = pa.struct({"shard": pa.int32(), "row_group": pa.int32(), "row": pa.int32(), "group_bytes": pa.int64()})
TEXT = pa.string(), "A nodule", {"_type": "Value", "dtype": "string"}
PICTURE = FILES, {"bytes": make_png(1), "path": None}, {"_type": "Image"}


def plant(folder: Path, **columns: tuple) -> None:
    """Write a parquet file whose metadata say what `datasets` should take its columns for.

    Args:
        columns: the type, the value and the feature of each.
    """
    columns = {"image": PICTURE, "image_id": TEXT, "caption": TEXT} | columns
    table = pa.table({name: pa.array([value], kind) for name, (kind, value, _) in columns.items()})
    features = {name: feature for name, (_, _, feature) in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    folder.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata(metadata), folder / "train-0.parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_a_table_that_says_its_images_lie_in_other_files_is_refused(tmp_path, saved, streaming):
    """As `StreamedImage`, which only we may write, does: a pipe among those files would be read forever."""
    os.mkfifo(tmp_path / "pipe")
    place = {"shard": 0, "row_group": 0, "row": 0, "group_bytes": 1}
    feature = {"_type": "StreamedImage", "shards": [str(tmp_path / "pipe")]}
    plant(tmp_path / "data", image=(PLACES, place, feature))
    if saved:
        datasets.load_dataset("parquet", data_dir=str(tmp_path / "data")).save_to_disk(str(tmp_path / "saved"))
    expected = "save_to_disk|is not parquet" if saved and streaming else "column 'image' holds no images"
    with pytest.raises(UserError, match=expected):
        sources.load_source(str(tmp_path / ("saved" if saved else "data")), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_that_says_its_captions_are_files_is_refused(tmp_path, streaming):
    plant(tmp_path / "data", caption=(FILES, {"bytes": None, "path": str(tmp_path / "pipe")}, {"_type": "Image"}))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"'caption'.* is not text but Image|cannot be read"):
        sources.load_source(str(tmp_path / "data"), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_bomb_is_named_before_it_is_unpacked(tmp_path, monkeypatch, streaming):
    shards = tmp_path / "data"
    shards.mkdir()
    images = [{"bytes": bytes(2**20), "path": None}] * 3
    columns = {"image": images, "image_id": list("abc"), "caption": ["A nodule"] * 3}
    pq.write_table(pa.table(columns), shards / "train-0.parquet", compression="zstd", use_dictionary=False)
    sources.load_source(str(tmp_path), streaming=streaming)  # a small one is not a bomb
    monkeypatch.setattr("captioning.data.streaming.SMALL_SHARD", 2**20)
    pq.write_table(pa.table(columns), shards / "train-0.parquet", compression="gzip", use_dictionary=False)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read_row_group", lambda *args: pytest.fail("it is unpacked"))
    with pytest.raises(UserError, match=r"train-0.parquet': [\d,]+ bytes unpack to 3,145,\d\d\d"):
        sources.load_source(str(tmp_path), streaming=streaming)


def test_text_that_is_not_utf_8_in_a_table_is_named(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff\xfe"]).buffers())
    columns = {"image": [{"bytes": make_png(i), "path": None} for i in (1, 2)], "image_id": ["a", "b"]}
    pq.write_table(pa.table(columns | {"caption": texts}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="column 'caption' is damaged"):
        sources.load_source(str(tmp_path))


@pytest.mark.parametrize("name", ["train-0.parquet", "train/state.json", "dataset_dict.json"])
def test_a_pipe_instead_of_a_table_is_refused_at_once(tmp_path, name):
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is not a regular file"):
        sources.load_source(str(tmp_path))


def test_a_table_of_many_other_columns_is_named_in_a_short_line(tmp_path):
    folder = zenodo_folder(tmp_path, b"ID," + b",".join(b"c%d" % i for i in range(50_000)) + b"\n", "a.png")
    with pytest.raises(UserError, match="ID and Caption are needed") as error:
        sources.load_source(str(folder))
    assert len(str(error.value)) < 1_000


# --- What is shown --------------------------------------------------------------------------------------------


def test_errors_and_logs_show_no_control_and_no_bidirectional_characters(config_file, tmp_path):
    rows = make_rows(8, caption=[f"{BIDIRECTIONAL}{text}" for text in make_captions(8)],
                     image_id=[f"{BIDIRECTIONAL}{i}" for i in range(8)])  # fmt: skip
    DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(str(tmp_path / "data"))
    result = run(flags(config_file, tmp_path / "data", tmp_path / "run", num_train_epochs=1))
    wrong = run(flags(config_file, f"{tmp_path}/{BIDIRECTIONAL}", tmp_path / "other"), code=2)
    for text in (result.stdout, wrong.stderr, result.stderr.replace("\x1b[A", "")):
        assert not set(text) & set("\u202e\u2066\x1b"), text
    assert printable("a\u202eb\x1b[1m") == "a b [1m"


# --- Nothing is run -------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


CODE = "import os\nos.mkdir({marker!r})\nclass Planted: pass\n"


@pytest.fixture
def saved(tiny_captioner, tmp_path):
    """A saved model, and the marker that a payload would make."""
    return save_captioner(tiny_captioner, tmp_path / "model"), tmp_path / "marker"


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


def test_a_pickle_instead_of_weights_is_not_unpickled(saved):
    folder, marker = saved
    (folder / "model.safetensors").unlink()
    torch.save({"payload": Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded: a pickled file holds other things than tensors") as error:
        load_captioner(str(folder))
    assert "weights_only" not in str(error.value), "torch's advice is to run it"
    assert not marker.exists()


def test_tensors_of_a_bin_are_read_where_there_are_no_others(saved):
    """As of checkpoints on the Hub that were saved before safetensors."""
    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model = load_captioner(str(folder)).model
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 10**9}, {"hidden_size": 64_000, "intermediate_size": 64_000}])
def test_a_config_of_a_giant_model_is_refused_before_it_is_built(tmp_path, sizes):
    text_config = TINY_CONFIG["text_config"] | sizes
    (tmp_path / "giant.json").write_text(json.dumps(TINY_CONFIG | {"text_config": text_config}))
    with pytest.raises(UserError, match="more than 1,000 layers or"):
        build_captioner(str(tmp_path / "giant.json"), 0, None, make_captions(20), 200)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_in_a_model_folder_is_not_run(saved, file, monkeypatch):
    folder, marker = saved
    (folder / "planted.py").write_text(CODE.format(marker=str(marker)))
    config = read_json(folder / file)
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    config["auto_map"] = dict.fromkeys(names, "planted.Planted") | {"AutoTokenizer": ["planted.Planted"] * 2}
    if file == "tokenizer_config.json":
        config["tokenizer_class"] = "Planted"
    (folder / file).write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked"))
    try:
        load_captioner(str(folder))
    except UserError as error:
        assert str(folder) in str(error)
    assert not marker.exists()


@pytest.fixture(scope="module")
def stopped(config_file, parquet_folder, tmp_path_factory):
    """Return a run with a checkpoint in its middle: its folder, and a function from a copy of it to its flags."""
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4, "do_eval": False, "do_predict": False}
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_captioning.main(flags(config_file, parquet_folder, folder, **options))
    shutil.rmtree(folder / "checkpoint-6")
    return folder, lambda copy: flags(config_file, parquet_folder, copy, resume_from_checkpoint=True, **options)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_is_not_unpickled(stopped, tmp_path, file):
    folder, marker = shutil.copytree(stopped[0], tmp_path / "run"), tmp_path / "marker"
    torch.save(Payload(marker), folder / "checkpoint-4" / file)
    if file == "training_args.bin":  # is never read
        run_captioning.main(stopped[1](folder))
    else:
        with pytest.raises(UserError, match="cannot be resumed"):
            run_captioning.main(stopped[1](folder))
    assert not marker.exists()


def test_code_beside_a_data_set_is_not_run(parquet_folder, tmp_path):
    folder, marker = tmp_path / "data", tmp_path / "marker"
    folder.mkdir()
    (folder / "data.py").write_text(CODE.format(marker=str(marker)))
    for path in (parquet_folder / "data").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    sources.load_source(str(folder))
    assert not marker.exists()
