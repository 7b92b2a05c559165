"""Streaming: which images are read, by whom and how often, and that a run on them is the run on stored data."""

import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from datasets import DatasetDict, Image
from helpers import (
    flags,
    make_png,
    make_rows,
    outcome,
    read_json,
    read_lines,
    run,
    save_captioner,
    score_flags,
    start_ranks,
    without_times,
)
from hub_server import HubServer
from processes import Server, server
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import run_captioning
from captioning.command_line import exit_on_user_error
from captioning.data import checks, sources, streaming
from captioning.data.streaming import ROW_GROUPS
from captioning.data.tokenize_captions import tokenize
from captioning.errors import UserError
from captioning.training import safeguards, samplers
from captioning.training.arguments import CaptioningArguments
from captioning.training.safeguards import UnreadableImages
from captioning.training.samplers import StreamingSampler


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
def nothing_kept():
    ROW_GROUPS._groups.clear()
    ROW_GROUPS.reads = 0


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Return a function that lists (process, shard, row group) of each read, in workers too."""
    log = tmp_path / "reads"
    log.touch()
    read = streaming._read_images

    def logged(file, group):
        with open(log, "a") as opened:
            opened.write(f"{os.getpid()} {file} {group}\n")
        return read(file, group)

    monkeypatch.setattr(streaming, "_read_images", logged)

    def listed() -> list[tuple[str, str]]:
        found = [line.split(" ", 1) for line in log.read_text().splitlines()]
        log.write_text("")
        return [(process, group) for process, group in found]

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
    list(StreamingSampler(usable, 4, 2, seed=0))
    assert reads() == []
    usable[3], usable[4], usable[29]
    assert len(reads()) == 2, "rows 3 and 4 are in one row group"


def test_checks_are_those_of_the_stored_set(tmp_path, reads):
    rows = damage(make_rows(20), 2, 17)
    columns = {"caption": rows["caption"][:], "image_id": rows["image_id"][:]}
    columns["caption"][4], columns["image_id"][9] = " ", "image_0000"
    rows = make_rows(20, image=rows.with_format("arrow")["image"][:].to_pylist(), **columns)
    write_shards(rows, tmp_path / "set" / "data", "validation")
    found = []
    for value in (False, True):
        file = tmp_path / f"rejected_{value}.jsonl"
        checks.check_rows(sources.load_source(str(tmp_path / "set"), streaming=value), 1.0, file)
        found.append(file.read_text())
    assert found[0] == found[1] and found[0].count("\n") == 4
    assert len(reads()) == 4, "each row group once"
    again = "import sys; from captioning.data import checks, sources, streaming; "
    again += "checks.check_rows(sources.load_source(sys.argv[1], streaming=True), 1.0, sys.argv[2]); "
    again += "assert not streaming.ROW_GROUPS.reads"  # the second of two processes
    server().run(["-c", again, tmp_path / "set", tmp_path / "again.jsonl"])
    assert (tmp_path / "again.jsonl").read_text() == found[0]


def test_a_changed_shard_is_indexed_again(tmp_path):
    for number in (12, 8):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_shards(make_rows(number), tmp_path / "data", "train")
        streaming._footer.cache_clear()
        assert len(sources.load_source(str(tmp_path), streaming=True)["train"]) == number


def test_images_as_bare_bytes_and_row_groups_that_are_not_kept(tmp_path, monkeypatch, reads):
    monkeypatch.setattr(streaming, "CACHE_BYTES", 1)
    (tmp_path / "data").mkdir()
    images = [image["bytes"] for image in make_rows(8).cast_column("image", Image(decode=False))["image"]]
    table = pa.table({"image": images, "image_id": [str(i) for i in range(8)], "caption": ["a"] * 8})
    pq.write_table(table, tmp_path / "data" / "test-0.parquet", row_group_size=4)
    rows = sources.load_source(str(tmp_path), streaming=True)["test"]
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


def test_a_column_without_images_and_a_missing_shard_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "test-0.parquet"
    pq.write_table(pa.table({"image": [1], "image_id": ["a"], "caption": ["b"]}), path)
    with pytest.raises(UserError, match="column 'image' holds no images but int64"):
        sources.load_source(str(tmp_path), streaming=True)
    streaming._footer.cache_clear()
    make_rows(2).to_parquet(str(path))
    rows = sources.load_source(str(tmp_path), streaming=True)["test"]
    path.unlink()
    with pytest.raises(UserError, match=r"test-0.parquet' can no longer be read: FileNotFoundError.*--resume_from"):
        rows[0]


def test_a_missing_shard_is_one_line_in_a_worker_too(tmp_path, capfd):
    write_shards(make_rows(4), tmp_path / "data", "test")
    rows = sources.load_source(str(tmp_path), streaming=True)["test"]
    shutil.rmtree(tmp_path / "data")
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        exit_on_user_error(lambda: list(DataLoader(rows, num_workers=1)))
    error = capfd.readouterr().err
    assert error.startswith("error: '") and error.count("\n") == 1 and "Traceback" not in error


# --- Order ----------------------------------------------------------------------------------------------------


def pairs_read(reads) -> Counter:
    return Counter(group for _, group in reads)


@pytest.mark.parametrize(("batch_size", "slots"), [(1, 1), (4, 1), (4, 3), (8, 4), (16, 4), (64, 2)])
def test_each_row_comes_once_an_epoch_in_another_order_each_time(rows, batch_size, slots):
    sampler = StreamingSampler(rows, batch_size, slots, seed=0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(rows))) and len(sampler) == len(rows)
    assert len({tuple(order) for order in orders}) == 3
    sampler.set_epoch(1)
    assert list(sampler) == orders[1], "the order follows from seed and epoch"
    assert list(StreamingSampler(rows, batch_size, slots, seed=1)) != orders[0]


def test_rows_of_several_row_groups_are_mixed(rows):
    order = list(StreamingSampler(rows, 4, 1, seed=0))
    shards_and_groups = [(row // SHARD, row % SHARD // GROUP) for row in order]
    assert np.mean([len(set(shards_and_groups[i : i + 4])) for i in range(0, 48, 4)]) > 2.5


def test_a_window_fits_in_the_memory_of_a_worker(rows, monkeypatch):
    monkeypatch.setattr(samplers, "CACHE_BYTES", 1)
    order = list(StreamingSampler(rows, 4, 1, seed=0))
    groups = [(row // SHARD, row % SHARD // GROUP) for row in order]
    assert sum(a != b for a, b in itertools.pairwise(groups)) == len(set(groups)) - 1, "one after the other"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_group_is_read_by_one_worker_of_one_process(rows, reads, workers, processes):
    """But for those on the borders between slots, of which there are one fewer than slots."""
    slots, batch_size = processes * max(1, workers), 4
    seen, found = [], []
    for process in range(processes):
        ROW_GROUPS._groups.clear()
        sampler = StreamingSampler(rows, batch_size, slots, seed=3)
        order = list(sampler)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][process::processes]
        loader = DataLoader(rows, batch_sampler=batches, num_workers=workers, collate_fn=lambda batch: batch)
        seen += [row["image_id"] for batch in loader for row in batch]
        found += reads()
    assert sorted(seen) == sorted(rows["image_id"])
    times = pairs_read(found)
    assert len(times) == 10, "row groups in all"
    assert sum(times.values()) <= 10 + slots - 1
    if workers:
        assert len({process for process, _ in found}) == slots


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_rows_are_not_read(rows, reads, workers, monkeypatch):
    for module in (samplers, streaming):
        monkeypatch.setattr(module, "WINDOW_GROUPS", 2)
    group_of = {}
    for file in rows.features["image"].shards:
        for group in range(pq.read_metadata(file).num_row_groups):
            ids = pq.ParquetFile(file).read_row_group(group, ["image_id"])["image_id"].to_pylist()
            group_of |= dict.fromkeys(ids, f"{file} {group}")

    def loader():
        sampler = StreamingSampler(rows, 4, max(1, workers), seed=0)
        return DataLoader(rows, batch_size=4, sampler=sampler, num_workers=workers, collate_fn=lambda batch: batch)

    whole = [[row["image_id"] for row in batch] for batch in loader()]
    assert len(reads()) >= 10
    ROW_GROUPS._groups.clear()
    rest = [[row["image_id"] for row in batch] for batch in skip_first_batches(loader(), 10)]
    assert rest == whole[10:] and len(rest) == 3
    wanted = {group_of[row] for batch in rest for row in batch}
    assert set(pairs_read(reads())) == wanted and len(wanted) < len(set(group_of.values())) / 2


# --- Runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(config_file, sharded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(flags(config_file, sharded, folder, streaming=True, save_strategy="epoch", dataloader_num_workers=2))
    return folder


def test_the_output_folder_is_whole(finished):
    for name in ("model.safetensors", "report.html", "scores.json", "README.md", "predictions/test.jsonl"):
        assert (finished / name).exists(), name
    assert read_json(finished / "recipe.json")["streaming"] is True
    metrics = read_json(finished / "all_results.json")
    assert metrics["train_samples"] == 52 and metrics["predict_samples"] == 22
    assert "predict_rougeL_nearest_image" in metrics
    assert (finished / "rejected.jsonl").read_text() == ""


def test_a_model_has_the_scores_that_it_has_on_stored_data(finished, sharded, tmp_path):
    results = []
    for value in (False, True):
        folder = tmp_path / str(value)
        metrics = run_captioning.main(score_flags(finished, sharded, folder, streaming=value, max_eval_samples=20))
        page = (folder / "report.html").read_text().partition("const ")[2].replace(str(folder), "")
        results.append((without_times(metrics), (folder / "predictions" / "test.jsonl").read_text(), len(page)))
    assert results[0][:2] == results[1][:2]
    assert results[0][0]["eval_samples"] == 20


def test_a_run_is_repeated_by_its_recipe(finished, tmp_path):
    run([finished / "recipe.json", "--output_dir", tmp_path / "again", "--use_cpu", "true"])
    assert outcome(tmp_path / "again") == outcome(finished)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_that_is_killed_in_an_epoch_goes_on_as_if_nothing_had_happened(config_file, sharded, tmp_path, workers):
    """13 steps an epoch, checkpoints each 5 steps: it goes on in the middle of the second epoch."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    options = {"streaming": True, "dataloader_num_workers": workers, "logging_steps": 5, "save_strategy": "steps"}
    options |= {"save_steps": 5, "save_total_limit": 9, "do_eval": False, "do_predict": False}
    run(flags(config_file, sharded, whole, **options))
    shutil.copytree(whole, half)
    for path in half.iterdir():
        if path.name in ("checkpoint-20", "checkpoint-25", "checkpoint-26", "model.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run([*flags(config_file, sharded, half, **options), "--resume_from_checkpoint", "true"])
    assert_same_weights(whole, half)


def assert_same_weights(*folders: Path) -> None:
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


PROCESSES = """
import json, os, sys
from captioning.data import checks, sources
from captioning.data.tokenize_captions import tokenize
from captioning.models.load import load_captioner
from captioning.training.arguments import CaptioningArguments
from captioning.training.trainer import CaptioningTrainer
from collator import CaptioningCollator
folder, data, name = sys.argv[1:]
captioner = load_captioner(folder + "/model")
args = CaptioningArguments(
    output_dir=folder + "/run", report_to="none", use_cpu=True, do_eval=False, num_train_epochs=2,
    per_device_train_batch_size=2, dataloader_num_workers=2, save_strategy="steps", save_steps=7, disable_tqdm=True,
)
class Logging(CaptioningCollator):
    def __call__(self, examples):
        with open(f"{folder}/rows-{os.environ['RANK']}-{name}", "a") as file:
            file.write(json.dumps([os.getpid(), *(row["image_id"] for row in examples)]) + "\\n")
        return super().__call__(examples)
with args.main_process_first():
    checked = checks.check_rows(sources.load_source(data, streaming=True), 0.0, os.devnull, unopened=["train"])
    rows = tokenize(checked, captioner, 64)["train"].select(range(48))
trainer = CaptioningTrainer(
    captioner=captioner, args=args, data_collator=Logging(captioner), train_dataset=rows,
    generation_config=args.decoding(),
)
trainer.train(resume_from_checkpoint=folder + "/run/checkpoint-21" if name == "resume" else None)
if trainer.is_world_process_zero():
    trainer.save_model(folder + "/out-" + name)
"""


def test_two_processes_see_each_row_once_and_a_resume_in_the_second_epoch_is_exact(captioner, sharded, tmp_path):
    """12 steps an epoch, 24 in all, resumed after 21."""
    save_captioner(captioner, tmp_path / "model")
    for name in ("whole", "resume"):
        for rank in start_ranks(2, ["-c", PROCESSES, tmp_path, sharded, name]):
            errors = rank.communicate(timeout=200)[1]
            assert rank.returncode == 0, errors[-3000:]

    def logged(rank: int, name: str) -> list[list[str]]:
        """Return the ids of each batch by worker, in order: workers write at the same time."""
        lines = read_lines(tmp_path / f"rows-{rank}-{name}")
        workers = {line[0]: [other[1:] for other in lines if other[0] == line[0]] for line in lines}
        return list(workers.values())

    whole = [logged(rank, "whole") for rank in range(2)]
    seen = Counter(row for rank in whole for worker in rank for batch in worker for row in batch)
    assert set(seen.values()) == {2} and len(seen) == 48, "two epochs"
    for rank in range(2):
        last_epoch = whole[rank][2:]  # workers are started anew in each epoch
        rest = [batch for worker in logged(rank, "resume") for batch in worker]
        assert len(rest) == 3
        assert all(any(batch in worker[-2:] for worker in last_epoch) for batch in rest)
    assert_same_weights(tmp_path / "out-whole", tmp_path / "out-resume")


# --- Unreadable images ----------------------------------------------------------------------------------------


@pytest.fixture
def with_damage(sharded, tmp_path):
    """Return a function that makes a copy of the rows whose training images are partly unreadable."""

    def make(number: int, damaged) -> Path:
        shutil.copytree(sharded / "data", tmp_path / "set" / "data", ignore=shutil.ignore_patterns("train*"))
        rows = make_rows(number, caption=[f"a caption {i}" for i in range(number)])
        write_shards(damage(rows, *damaged), tmp_path / "set" / "data", "train")
        return tmp_path / "set"

    return make


def test_an_unreadable_training_image_is_masked_from_the_loss_and_listed_once(config_file, with_damage, tmp_path):
    options = {"streaming": True, "dataloader_num_workers": 2, "per_device_train_batch_size": 1, "logging_steps": 1}
    arguments = flags(config_file, with_damage(20, (2, 17)), tmp_path / "run", do_predict=False, **options)
    result = run(arguments)
    assert "Training image 'image_0002' is left out: not an image" in result.stderr
    lines = read_lines(tmp_path / "run" / "rejected.jsonl")
    assert sorted(line["image_id"] for line in lines) == ["image_0002", "image_0017"]
    assert all(line["split"] == "train" and "unreadable image: not an image" in line["reason"] for line in lines)
    history = read_json(tmp_path / "run" / "trainer_state.json")["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses.count(0.0) == 4, "batches of one image, two epochs"
    assert all(np.isfinite(losses))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    # All epochs are done, and there are no baselines to be made: no image is read again
    resumed = run([*arguments, "--resume_from_checkpoint", "true", "--do_eval", "false"])
    assert "is left out" not in resumed.stderr
    assert read_lines(tmp_path / "run" / "rejected.jsonl") == lines


def test_what_another_run_has_rejected_is_not_listed_in_a_new_one(sharded, tmp_path):
    rejected = tmp_path / "rejected.jsonl"
    streamed = {"split": "train", "image_id": "a", "reason": "unreadable image: empty"}
    others = [streamed | {"split": "test"}, streamed | {"row": 3}, "no entry", 7]
    dataset = sources.load_source(str(sharded), streaming=True)
    for entries, half_a_line, unopened, kept in (
        ([streamed, *others[:2]], "", ["train"], [streamed]),
        ([streamed], "", [], []),
        ([*others, streamed], '{"split": "tr', ["train"], [streamed]),
        (others, "", ["train"], []),
    ):
        rejected.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + half_a_line)
        checks.check_rows(dataset, 0.0, rejected, unopened=unopened)
        assert read_lines(rejected) == kept


def test_a_batch_of_unreadable_images_has_no_loss_and_no_gradient(make_trainer, splits):
    trainer = make_trainer()
    found = []
    trainer.data_collator.unreadable = lambda image_id, reason: found.append(image_id)
    batch = trainer.data_collator(
        [row | {"image": {"bytes": b"", "path": None}} for row in splits["train"].select([3, 5])]
    )
    assert found == splits["train"]["image_id"][3:6:2]
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
        pinned = score_flags(tmp_path / "run", "some/data", tmp_path / "hub", streaming=True, dataset_revision=commit)
        hub.add_repository("some/data", {"data/test-0.parquet": b""}, kind="dataset")
        python.run(["run_captioning.py", *pinned])
        # Other files than parquet are refused in a line
        hub.add_repository("some/csv", {"train.csv": b"image_id,caption\na,b\n"}, kind="dataset")
        arguments = flags(config_file, "some/csv", tmp_path / "csv", streaming=True)
        result = python.run(["run_captioning.py", *arguments], code=2)
        assert "error: dataset 'some/csv' is not parquet" in result.stderr.splitlines()[-1]
        python.close()
    local = run_captioning.main(score_flags(tmp_path / "run", folder, tmp_path / "local"))
    from_hub = read_json(tmp_path / "hub" / "all_results.json")
    assert without_times(from_hub) == {k: v for k, v in without_times(local).items() if k in from_hub}
