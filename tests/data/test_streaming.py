"""Streaming: which images are read, by whom and how often, and that a run on them is the run on stored data."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from datasets import DatasetDict, Image
from helpers import flags, losses, make_png, make_rows, read_json, read_lines, run
from hub_server import HubServer
from processes import Server, server
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import run_captioning
from captioning.command_line import exit_on_user_error
from captioning.data import checks, sources, streaming
from captioning.data.tokenize_captions import tokenize
from captioning.errors import UserError
from captioning.training import safeguards, samplers
from captioning.training.arguments import CaptioningArguments
from captioning.training.safeguards import UnreadableImages
from captioning.training.samplers import StreamingSampler
from captioning.training.trainer import CaptioningTrainer


GROUP = 6  # rows of a row group
SHARD = 20  # rows of a shard: its last row group is a short one


def write_shards(rows, folder: Path, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(0, len(rows), SHARD)
    for number, start in enumerate(shards):
        path = folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
        shard = rows.select(range(start, min(start + SHARD, len(rows))))
        shard.to_parquet(str(path), batch_size=GROUP)


def damage(rows, *numbers: int):
    """Return the rows, some with bytes that are not an image."""
    columns = {name: rows.with_format("arrow")[name][:].to_pylist() for name in rows.column_names}
    for number in numbers:
        columns["image"][number] = {"bytes": b"no image", "path": None}
    return make_rows(len(rows), **columns)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """Rows in shards of several row groups; captions repeat, ids do not."""
    folder = tmp_path_factory.mktemp("sharded")
    for split, number, start in (("train", 52, 0), ("validation", 26, 100), ("test", 22, 200)):
        write_shards(make_rows(number, start), folder / "data", split)
    return folder


@pytest.fixture
def rows(sharded):
    return sources.load_source(str(sharded), streaming=True)["train"]


@pytest.fixture(autouse=True)
def forget():
    """Forget the row groups that were read, before a test and when it asks."""

    def forget():
        streaming._row_groups.clear()
        shutil.rmtree(streaming.SHARED_FOLDER, ignore_errors=True)

    forget()
    return forget


def group_of(row: int) -> tuple[int, int]:
    """Return the shard and the row group of a row."""
    return row // SHARD, row % SHARD // GROUP


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Return a function that lists (process, (shard, row group)) of each read, in workers too."""
    log = tmp_path / "reads"
    read = streaming._read_images

    def logged(file, group):
        with open(log, "a") as opened:
            opened.write(f"{os.getpid()} {re.search(r'-([0-9]+)', Path(file).name)[1]} {group}\n")
        return read(file, group)

    def listed() -> list[tuple[int, tuple[int, int]]]:
        found = [map(int, line.split()) for line in log.read_text().splitlines()]
        log.write_text("")
        return [(process, (shard, group)) for process, shard, group in found]

    log.touch()
    monkeypatch.setattr(streaming, "_read_images", logged)
    return listed


# --- Rows -----------------------------------------------------------------------------------------------------


def test_streamed_rows_are_those_of_the_stored_set(sharded):
    stored, streamed = (sources.load_source(str(sharded), streaming=value) for value in (False, True))
    assert list(streamed) == list(stored)
    for split, rows in streamed.items():
        assert rows[:] == stored[split][:]
        assert [row["image"] for row in rows.select_columns("image")] == stored[split]["image"][:]
        assert rows.select([7, 3])[1] == stored[split][3]
        assert rows.__getitems__([9, 2, 9]) == stored[split].__getitems__([9, 2, 9])


def test_reading_text_reads_no_images(rows, reads, captioner):
    checked = checks.check_rows(DatasetDict(train=rows), 0.0, os.devnull, unopened=["train"])
    tokenized = tokenize(checked, captioner, 64)
    usable = checks.usable(tokenized["train"], 30)
    assert len(usable["caption"][:]) == len(list(usable["input_ids"])) == 30
    checks.texts(rows)
    list(StreamingSampler(usable, seed=0))
    assert reads() == []
    usable[3], usable[4], usable[29]
    assert len(reads()) == 2, "rows 3 and 4 are in one row group"


def test_checks_are_those_of_the_stored_set(tmp_path, reads):
    captions, ids = make_rows(20)["caption"][:], [f"image_{i}" for i in range(20)]
    captions[4], ids[9] = " ", ids[0]
    rows = damage(make_rows(20, caption=captions, image_id=ids), 2, 17)
    write_shards(rows, tmp_path / "set" / "data", "validation")
    found = []
    for value in (False, True):
        file = tmp_path / f"rejected_{value}.jsonl"
        checks.check_rows(sources.load_source(str(tmp_path / "set"), streaming=value), 1.0, file)
        found.append(file.read_text())
    assert found[0] == found[1] and found[0].count("\n") == 4
    assert len(reads()) == 4, "each row group once"
    again = """
import sys
from captioning.data import checks, sources, streaming
checks.check_rows(sources.load_source(sys.argv[1], streaming=True), 1.0, sys.argv[2])
assert not streaming._row_groups, "the second of two processes reads none"
"""
    server().run(["-c", again, tmp_path / "set", tmp_path / "again.jsonl"])
    assert (tmp_path / "again.jsonl").read_text() == found[0]


def test_a_changed_shard_is_indexed_again(tmp_path):
    for number in (12, 8):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_shards(make_rows(number), tmp_path / "data", "train")
        streaming._footer.cache_clear()
        assert len(sources.load_source(str(tmp_path), streaming=True)["train"]) == number


def test_images_as_bare_bytes_and_row_groups_that_are_not_kept(tmp_path, monkeypatch, reads, caplog):
    monkeypatch.setattr(streaming, "CACHE_BYTES", 1)
    (tmp_path / "data").mkdir()
    images = [image["bytes"] for image in make_rows(8).cast_column("image", Image(decode=False))["image"]]
    table = pa.table({"image": images, "image_id": [str(i) for i in range(8)], "caption": ["a"] * 8})
    pq.write_table(table, tmp_path / "data" / "test-0.parquet", row_group_size=4)
    rows = sources.load_source(str(tmp_path), streaming=True)["test"]
    assert caplog.text.count("a row group holds 0 MB, which are read together") == 1
    assert [row["image"] for row in rows] == [{"bytes": image, "path": None} for image in images]
    assert len(reads()) == 2, "the one that is read last is kept, however large"
    rows[0], rows[7], rows[0]
    assert len(reads()) == 3


@pytest.mark.parametrize("source", ["phantoms", "saved", "zenodo"])
def test_a_source_that_is_not_parquet_is_refused_in_one_line(source, tmp_path):
    if source == "saved":
        DatasetDict(train=make_rows(2)).save_to_disk(str(tmp_path))
    if source == "zenodo":
        (tmp_path / "train_captions.csv").write_text("ID,Caption\n")
    with pytest.raises(UserError, match=r"is not parquet.*leave --streaming out"):
        sources.load_source("phantoms" if source == "phantoms" else str(tmp_path), streaming=True)


def test_a_column_without_images_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    table = pa.table({"image": [1], "image_id": ["a"], "caption": ["b"]})
    pq.write_table(table, tmp_path / "data" / "test-0.parquet")
    with pytest.raises(UserError, match="column 'image' holds no images but int64"):
        sources.load_source(str(tmp_path), streaming=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_one_line(tmp_path, capfd, workers):
    write_shards(make_rows(4), tmp_path / "data", "test")
    rows = sources.load_source(str(tmp_path), streaming=True)["test"]
    shutil.rmtree(tmp_path / "data")
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        exit_on_user_error(lambda: list(DataLoader(rows, num_workers=workers)))
    error = capfd.readouterr().err
    assert re.match(r"error: '.*\.parquet' can no longer be read: FileNotFoundError.*--resume_from", error)
    assert error.count("\n") == 1


# --- Order ----------------------------------------------------------------------------------------------------


def test_each_row_comes_once_an_epoch_in_another_order_each_time(rows):
    sampler = StreamingSampler(rows, seed=0)
    orders = []
    for epoch in range(3):
        sampler.epoch = epoch
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(rows))) and len(sampler) == len(rows)
    assert len({tuple(order) for order in orders}) == 3
    sampler.epoch = 1
    assert list(sampler) == orders[1], "the order follows from seed and epoch"
    assert list(StreamingSampler(rows, seed=1)) != orders[0]


def test_rows_of_several_row_groups_are_mixed_within_the_memory_that_is_allowed(rows, monkeypatch):
    groups = [group_of(row) for row in StreamingSampler(rows, seed=0)]
    assert np.mean([len(set(groups[i : i + 4])) for i in range(0, 48, 4)]) > 2.5
    monkeypatch.setattr(samplers, "WINDOW_GROUPS", 3)
    groups = [group_of(row) for row in StreamingSampler(rows, seed=0)]
    ends = {group: place for place, group in enumerate(groups)}
    in_use = [{group for group in groups[: i + 1] if ends[group] >= i} for i in range(52)]
    assert np.mean([len(found) for found in in_use]) > 2 and max(map(len, in_use)) <= 4
    monkeypatch.setattr(samplers, "CACHE_BYTES", 1)
    groups = [group_of(row) for row in StreamingSampler(rows, seed=0)]
    assert sum(a != b for a, b in itertools.pairwise(groups)) == len(set(groups)) - 1, "one after the other"


def train_batches(rows, captioner, tmp_path, batch_size: int, workers: int, resumed_at: int = 0) -> list[list[str]]:
    """Return the image ids of each batch of the second epoch, by the Trainer's own loader."""
    args = CaptioningArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", dataloader_num_workers=workers, do_eval=False,
        per_device_train_batch_size=batch_size,
    )  # fmt: skip
    trainer = CaptioningTrainer(
        captioner=captioner, args=args, train_dataset=rows, generation_config=args.decoding(),
        data_collator=lambda examples: {"image_id": [row["image_id"] for row in examples if row["image"]["bytes"]]},
    )  # fmt: skip
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)  # as the Trainer does
    sampler = next(found for found in trainer.callback_handler.callbacks if isinstance(found, StreamingSampler))
    sampler.on_epoch_begin(args, SimpleNamespace(epoch=1.3), None)
    return [batch["image_id"] for batch in skip_first_batches(loader, resumed_at)]


def test_any_number_of_workers_gets_the_same_batches_and_reads_each_row_group_once(
    rows, reads, captioner, tmp_path, forget
):
    expected = list(StreamingSampler(rows, seed=42))
    found = {}
    for workers in (0, 1, 2, 3):
        forget()
        found[workers] = train_batches(rows, captioner, tmp_path, 4, workers)
        read = reads()
        assert len(read) == len({group for _, group in read}) == 10, "row groups in all"
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 13
    order = list(itertools.chain(*found[0]))
    assert sorted(order) == sorted(rows["image_id"]) and order != [rows[row]["image_id"] for row in expected]
    smaller = train_batches(rows, captioner, tmp_path, 2, 2)
    assert list(itertools.chain(*smaller)) == order, "two accumulated batches of half the size are one batch"
    # A resumed run with other workers and batches goes on where the other has ended, and reads what is left
    forget(), reads()
    rest = list(itertools.chain(*train_batches(rows, captioner, tmp_path, 2, 3, resumed_at=20)))
    assert rest == order[40:]
    wanted = {group_of(int(image_id.removeprefix("image_"))) for image_id in rest}
    assert sorted(group for _, group in reads()) == sorted(wanted)


def test_row_groups_that_are_kept_stay_few(rows, reads, monkeypatch):
    for module in (samplers, streaming):
        monkeypatch.setattr(module, "WINDOW_GROUPS", 2)
    for row in StreamingSampler(rows, seed=0):
        assert rows[row]["image"]["bytes"]
        assert len(streaming._row_groups) <= 4
        assert len(list(streaming.SHARED_FOLDER.iterdir())) <= 2 * 4, "with a lock each"
    assert len(reads()) == 10, "few, but enough of them that none is read again"


def test_images_are_read_where_they_cannot_be_shared(rows, reads, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(streaming, "SHARED_FOLDER", tmp_path / "file" / "folder")
    assert [row["image"]["bytes"] for row in rows] == [make_png(i) for i in range(52)]
    assert len(reads()) == 10


# --- Runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(config_file, sharded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(flags(config_file, sharded, folder, streaming=True, save_strategy="epoch", dataloader_num_workers=2))
    return folder


def test_a_model_has_the_scores_that_it_has_on_stored_data(finished, sharded, tmp_path):
    results = []
    for value in (False, True):
        folder = tmp_path / str(value)
        metrics = run_captioning.main(
            helpers.score_flags(finished, sharded, folder, streaming=value, max_eval_samples=20)
        )
        results.append((helpers.without_times(metrics), (folder / "predictions" / "test.jsonl").read_text()))
    assert results[0] == results[1]
    assert results[0][0]["eval_samples"] == 20


STEPS = {
    "per_device_train_batch_size": 2, "do_eval": False, "do_predict": False, "streaming": True, "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 5, "save_total_limit": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(config_file, sharded, tmp_path_factory) -> Path:
    """A run in one process, of two workers and 13 steps an epoch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    options = STEPS | {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}
    run(flags(config_file, sharded, folder, **options))
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_in_an_epoch_goes_on_as_if_nothing_had_happened(
    config_file, sharded, alone, tmp_path, processes
):
    """It goes on in the middle of the second epoch. Two processes of a worker each see what two workers see."""
    options = STEPS | {"dataloader_num_workers": 2 // processes, "gradient_accumulation_steps": 2 // processes}

    def train(folder: Path, **more) -> None:
        helpers.run_ranks(processes, flags(config_file, sharded, folder, **options | more))

    whole, half = alone, tmp_path / "half"
    if processes == 2:
        train(whole := tmp_path / "whole")
        np.testing.assert_allclose(losses(whole), losses(alone), rtol=1e-5)
    shutil.copytree(whole, half)
    for name in ("checkpoint-20", "checkpoint-25", "checkpoint-26"):
        shutil.rmtree(half / name)
    (half / "model.safetensors").unlink()
    train(half, resume_from_checkpoint=True)
    weights = [load_file(folder / "model.safetensors") for folder in (whole, half)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


LOG_ROWS = """
import os, run_captioning
from pathlib import Path
from captioning.command_line import exit_on_user_error
from captioning.training.trainer import CaptioningTrainer
step = CaptioningTrainer.training_step
def logged(self, model, inputs, *arguments):
    with open(Path(self.args.output_dir) / f"rows_{os.environ.get('RANK', 0)}", "a") as file:
        print(self.state.global_step, *inputs["image_id"], file=file)
    return step(self, model, inputs, *arguments)
CaptioningTrainer.training_step = logged
exit_on_user_error(run_captioning.main)
"""


@pytest.mark.slow
def test_each_step_sees_the_same_rows_in_any_number_of_processes_and_workers(config_file, sharded, tmp_path):
    """Also a step after a resume with other numbers: no row is repeated, and none left out."""
    (tmp_path / "logs_rows.py").write_text(LOG_ROWS)

    def rows_of_steps(name: str, processes: int, workers: int, accumulated: int = 1, **more) -> dict[int, list[str]]:
        sizes = {"per_device_train_batch_size": 4 // processes // accumulated, "dataloader_num_workers": workers}
        options = STEPS | sizes | {"gradient_accumulation_steps": accumulated} | more
        helpers.run_ranks(
            processes, flags(config_file, sharded, tmp_path / name, **options), script=tmp_path / "logs_rows.py"
        )
        found: dict[int, list[str]] = {}
        for file in (tmp_path / name).glob("rows_*"):
            for step, *ids in map(str.split, file.read_text().splitlines()):
                found.setdefault(int(step), []).extend(image_id for image_id in ids if image_id != "(blank)")
            file.unlink()
        return {step: sorted(ids) for step, ids in sorted(found.items())}

    expected = rows_of_steps("1x0", 1, 0)
    assert len(expected) == 26 and sum(map(len, expected.values())) == 104
    assert rows_of_steps("1x3", 1, 3, accumulated=2) == expected
    assert rows_of_steps("2x0", 2, 0) == expected
    assert rows_of_steps("2x2", 2, 2, accumulated=2) == expected
    for name, processes, workers in (("2x2", 1, 0), ("1x0", 2, 1)):
        for number in (20, 25, 26):
            shutil.rmtree(tmp_path / name / f"checkpoint-{number}")
        resumed = rows_of_steps(name, processes, workers, resume_from_checkpoint=True)
        assert resumed == {step: ids for step, ids in expected.items() if step >= 15}


# --- Unreadable images ----------------------------------------------------------------------------------------


@pytest.fixture
def with_damage(sharded, tmp_path):
    """Return a function that makes a copy of the rows whose training images are partly unreadable."""

    def make(number: int, damaged) -> Path:
        data = tmp_path / "set" / "data"
        shutil.copytree(sharded / "data", data, ignore=shutil.ignore_patterns("train*"))
        rows = make_rows(number, caption=[f"a caption {i}" for i in range(number)])
        write_shards(damage(rows, *damaged), data, "train")
        return data.parent

    return make


def test_an_unreadable_training_image_is_masked_from_the_loss_and_listed_once(config_file, with_damage, tmp_path):
    options = {"streaming": True, "dataloader_num_workers": 2, "per_device_train_batch_size": 1, "logging_steps": 1}
    arguments = flags(config_file, with_damage(20, (2, 17)), tmp_path / "run", do_predict=False, **options)
    result = run(arguments)
    assert "Training image 'image_0002' is left out: not an image" in result.stderr
    lines = read_lines(tmp_path / "run" / "rejected.jsonl")
    assert sorted(line["image_id"] for line in lines) == ["image_0002", "image_0017"]
    assert all(line["split"] == "train" and "unreadable image: not an image" in line["reason"] for line in lines)
    found = losses(tmp_path / "run")
    assert found.count(0.0) == 4, "batches of one image, two epochs"
    assert all(np.isfinite(found))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    # All epochs are done, and there are no baselines to be made: no image is read again
    resumed = run([*arguments, "--resume_from_checkpoint", "true", "--do_eval", "false"])
    assert "is left out" not in resumed.stderr
    assert read_lines(tmp_path / "run" / "rejected.jsonl") == lines


def test_what_another_run_has_rejected_is_not_listed_in_a_new_one(sharded, tmp_path):
    rejected = tmp_path / "rejected.jsonl"
    streamed = {"split": "train", "image_id": "a", "reason": "unreadable image: empty"}
    others = [streamed | {"split": "test"}, streamed | {"row": 3}]
    dataset = sources.load_source(str(sharded), streaming=True)
    for entries, half_a_line, unopened, kept in (
        ([streamed], "", [], []),
        ([*others, streamed], '{"split": "tr', ["train"], [streamed]),
    ):
        rejected.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + half_a_line)
        checks.check_rows(dataset, 0.0, rejected, unopened=unopened)
        assert read_lines(rejected) == kept


@pytest.mark.parametrize("fast", [True, False])
def test_a_batch_of_unreadable_images_has_no_loss_and_no_gradient(make_trainer, splits, fast):
    trainer, found = make_trainer(fast=fast), []
    trainer.data_collator.unreadable = lambda image_id, reason: found.append(image_id)
    rows = splits["train"].select([3, 5])
    batch = trainer.data_collator([row | {"image": {"bytes": b"", "path": None}} for row in rows])
    assert found == rows["image_id"][:]
    for number in (None, torch.tensor(0), torch.tensor(7)):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=number)
        assert loss == 0
        loss.backward()
        assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_too_many_unreadable_images_end_the_run_in_one_line(config_file, with_damage, tmp_path):
    data = with_damage(40, range(25))
    arguments = flags(config_file, data, tmp_path / "run", streaming=True, dataloader_num_workers=2)
    result = run([*arguments, "--disable_tqdm", "true"], code=2)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: split 'train': 2") and "raise --max_rejected_fraction above 0.01" in last
    assert "Traceback" not in result.stderr


def test_unreadable_images_are_few_or_too_many_by_the_rows_seen(tmp_path):
    images = UnreadableImages(0.1, tmp_path / "rejected.jsonl")
    args = CaptioningArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=4)

    images.on_train_begin(args, SimpleNamespace(global_step=100), None)
    for number in range(safeguards.FEW_UNREADABLE):
        images.add(str(number), "broken")
    images.on_step_end(args, SimpleNamespace(global_step=101), None)
    images.add("one more", "broken")
    images.on_step_end(args, SimpleNamespace(global_step=160), None)  # 21 of 240
    with pytest.raises(UserError, match="21 of about 200 images"):
        images.on_step_end(args, SimpleNamespace(global_step=150), None)


# --- The Hub --------------------------------------------------------------------------------------------------


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_from_the_hub_reads_ranges_and_downloads_nothing(config_file, finished, tmp_path):
    large = [{"bytes": make_png(seed, (200, 150)), "path": None} for seed in range(60)]
    captions = [f"an axial CT number {i}" for i in range(60)]
    folder = tmp_path / "set"
    write_shards(make_rows(60, image=large, caption=captions), folder / "data", "train")
    for split, start in (("validation", 100), ("test", 200)):
        write_shards(make_rows(20, start, image=large[start // 10 : start // 10 + 20]), folder / "data", split)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
    with HubServer() as hub:
        commit = hub.add_repository("some/data", files, kind="dataset")
        python = Server(hub.environment(tmp_path / "home"))
        arguments = flags(config_file, "some/data", tmp_path / "run", streaming=True, dataloader_num_workers=2,
                          num_train_epochs=1, do_predict=False)  # fmt: skip
        python.run(["run_captioning.py", *arguments])
        assert not hub.problems
        stored = size_of(tmp_path / "home")
        assert stored < 0.1 * size_of(folder), f"{stored} of {size_of(folder)} bytes are on the disk"

        recipe = read_json(tmp_path / "run" / "recipe.json")
        assert (recipe["dataset_revision"], recipe["streaming"]) == (commit, True)
        pinned = helpers.score_flags(
            tmp_path / "run", "some/data", tmp_path / "hub", streaming=True, dataset_revision=commit
        )
        hub.add_repository("some/data", {"data/test-0.parquet": b""}, kind="dataset")
        python.run(["run_captioning.py", *pinned])
        # Other files than parquet are refused in a line
        hub.add_repository("some/csv", {"train.csv": b"image_id,caption\na,b\n"}, kind="dataset")
        arguments = flags(config_file, "some/csv", tmp_path / "csv", streaming=True)
        result = python.run(["run_captioning.py", *arguments], code=2)
        assert "error: dataset 'some/csv' is not parquet" in result.stderr.splitlines()[-1]
        python.close()
    local = run_captioning.main(helpers.score_flags(tmp_path / "run", folder, tmp_path / "local"))
    from_hub = read_json(tmp_path / "hub" / "all_results.json")
    assert helpers.without_times(from_hub) == {k: v for k, v in helpers.without_times(local).items() if k in from_hub}
