"""Images read from parquet shards when they are needed, from a folder or the Hub: `--streaming`.

The footer and the text columns of each shard are read once, into an ordinary `Dataset` that records where each image
is. Its column `image` is a `StreamedImage`: reading an image reads the row group that holds it, which is kept for the
rows that follow. So checks, tokens, baselines and the Trainer work as on stored data.

One process of a machine reads a row group and leaves it in a file that the others map into their memory.
`training.samplers.StreamingSampler` shuffles so that each row group is in use for a short part of an epoch.
"""

import atexit
import hashlib
import logging
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, load_dataset_builder
from datasets.config import HF_DATASETS_CACHE
from datasets.features.features import register_feature
from huggingface_hub import HfFileSystem
from huggingface_hub.utils import WeakFileLock

from captioning.errors import UserError, as_user_error


logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("image_id", "caption", "cui")
HUB = "hf://"
READERS = 8  # shards whose texts are read at once: a read from the Hub is mostly waiting
# Limits of the row groups whose rows are mixed; on the Hub one holds 100 rows of ROCOv2. Twice as much is kept, since
# processes are ahead of each other; a single larger row group is kept alone
CACHE_BYTES = 256 * 2**20
WINDOW_GROUPS = 8
SHARED_FOLDER = Path(HF_DATASETS_CACHE) / "streamed_row_groups"  # of all processes; it goes when a run ends
MAX_UNPACKED = 100  # times the size in a shard: images are compressed already, only a bomb unpacks to more
SMALL_SHARD = 2**30  # bytes; up to this size any ratio is harmless
STORED = "{} is not parquet, and only parquet is streamed; leave --streaming out: it needs no more memory"


# --- Index ----------------------------------------------------------------------------------------------------


def hub_shards(name: str, revision: str | None) -> dict[str, list[str]]:
    """Return by split the addresses of a Hub dataset's parquet files, with their commit.

    Raises:
        UserError: the dataset is stored in another format.
    """
    builder = load_dataset_builder(name, revision=revision)  # knows where a repository may keep which split
    files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    paths = [path for of_split in files.values() for path in of_split]
    if not paths or not all(path.startswith(HUB) and path.endswith(".parquet") for path in paths):
        raise UserError(STORED.format(f"dataset '{name}'"))
    return files


def index_shards(shards: dict[str, list[str]]) -> DatasetDict:
    """Return the rows of parquet shards: their texts, and an `image` that is read when it is asked for.

    The index, some hundred bytes a row, is stored in the cache of `datasets`.

    Args:
        shards: by split, paths or addresses `hf://...`; of the latter only byte ranges are read.

    Raises:
        UserError: a shard lacks a column, or its column `image` is not of bytes.
    """
    atexit.register(shutil.rmtree, SHARED_FOLDER, ignore_errors=True)
    splits = {}
    for split, files in shards.items():
        schema = _footer(files[0]).schema.to_arrow_schema()
        texts = [field for field in schema if field.name in TEXT_COLUMNS]
        features = Features.from_arrow_schema(pa.schema(texts, metadata=schema.metadata))
        if missing := [name for name in ("image", *TEXT_COLUMNS[:2]) if name not in schema.names]:
            there = ", ".join(schema.names)
            raise UserError(f"'{files[0]}': column '{missing[0]}' is missing, it has {there}; leave --streaming out")
        kind = schema.field("image").type
        has_field = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not has_field and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
            raise UserError(f"'{files[0]}': column 'image' holds no images but {kind}")
        features |= Features.from_arrow_schema(pa.schema({"image": StreamedImage.pa_type}))
        arguments = {"files": tuple(files), "state": tuple(_shard_state(file) for file in files)}
        rows = Dataset.from_generator(_index_rows, features=Features(features), gen_kwargs=arguments, split=split)
        largest = pc.max(pc.struct_field(rows.data.column("image"), "group_bytes")).as_py() or 0
        if largest > CACHE_BYTES:
            message = "%s: a row group holds %d MB, which are read together; write row groups of about 100 rows"
            logger.warning(message, split, largest / 1e6)
        splits[split] = rows.cast_column("image", StreamedImage(list(files)))
    return DatasetDict(splits)


def is_streamed(rows: Any) -> bool:
    """Tell whether the images of a split are read when they are needed."""
    return isinstance(rows, Dataset) and isinstance(rows.features.get("image"), StreamedImage)


def _shard_state(file: str) -> str:
    """Return what changes whenever the shard does; the address of one on the Hub contains its commit."""
    if file.startswith(HUB):
        return file
    status = os.stat(file)
    return f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}"


def _index_rows(files: tuple[str, ...], state: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), READERS):  # so that no more of them are in memory
            for shard, read in enumerate(pool.map(_read_index, files[start : start + READERS]), start):
                for group, (size, texts) in enumerate(read):
                    for row, text in enumerate(texts.to_pylist()):
                        yield text | {"image": {"shard": shard, "row_group": group, "row": row, "group_bytes": size}}


def read_footer(file: str) -> pq.FileMetaData:
    """Read the footer of a parquet file; UserError if it states that the file unpacks to far more than its size."""
    with _open_shard(file) as source:
        footer = pq.read_metadata(source)
        packed = source.seek(0, os.SEEK_END)
    unpacked = sum(_unpacked_size(footer, group) for group in range(footer.num_row_groups))
    if unpacked > max(MAX_UNPACKED * packed, SMALL_SHARD):
        raise UserError(f"'{file}': {packed:,} bytes unpack to {unpacked:,}, which images do not; remove it")
    return footer


_footer = lru_cache(maxsize=1024)(read_footer)  # for a run, in which shards stay as they are


def _unpacked_size(footer: pq.FileMetaData, group: int) -> int:
    return footer.row_group(group).total_byte_size


def _read_index(file: str) -> list[tuple[int, pa.Table]]:
    """Return for each row group of a shard its size in bytes, and its texts."""
    footer = _footer(file)
    columns = [name for name in footer.schema.to_arrow_schema().names if name in TEXT_COLUMNS]
    with _open_shard(file) as source:
        reader = pq.ParquetFile(source, metadata=footer, pre_buffer=True)  # merges adjacent ranges
        return [(_unpacked_size(footer, i), reader.read_row_group(i, columns)) for i in range(footer.num_row_groups)]


def _open_shard(file: str) -> Any:
    """Open a shard anew: reads through a handle that is shared with a forked worker would get mixed up."""
    if file.startswith(HUB):
        # Without a cache each read is one request for its range; a cache would request more
        return HfFileSystem().open(file, "rb", cache_type="none")
    return open(file, "rb")


# --- Images ---------------------------------------------------------------------------------------------------


@dataclass
class StreamedImage:
    """A feature of `datasets` that stores where in `shards` an image is, and reads like `Image(decode=False)`."""

    shards: list[str]
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "dict"
    pa_type: ClassVar[pa.StructType] = pa.struct(
        {"shard": pa.int32(), "row_group": pa.int32(), "row": pa.int32(), "group_bytes": pa.int64()}
    )
    _type: str = field(default="StreamedImage", init=False, repr=False)

    def __call__(self) -> pa.StructType:
        """Return the stored type."""
        return self.pa_type

    def cast_storage(self, storage: pa.StructArray) -> pa.StructArray:
        """Return the stored places as they are."""
        return storage.cast(self.pa_type)

    def decode_example(self, value: dict[str, int], token_per_repo_id: dict | None = None) -> dict[str, Any]:
        """Read the image at a stored place; UserError, which ends the run, if the shard cannot be read."""
        images = _row_group(self.shards[value["shard"]], value["row_group"], value["group_bytes"])
        image = images[value["row"]].as_py()
        # A path in the table is ignored: it would name a file of this machine
        return {"bytes": image["bytes"] if isinstance(image, dict) else image, "path": None}


with warnings.catch_warnings(action="ignore"):  # "experimental": requirements.txt pins the library
    register_feature(StreamedImage, "StreamedImage")


_row_groups: OrderedDict[tuple[str, int], tuple[int, pa.ChunkedArray]] = OrderedDict()  # read or mapped last


def _row_group(file: str, group: int, size: int) -> pa.ChunkedArray:
    """Return the column `image` of a row group of `size` bytes; few are kept."""
    key = (file, group)
    if key not in _row_groups:
        while _row_groups and _is_full([size, *(held for held, _ in _row_groups.values())]):
            _row_groups.popitem(last=False)
        _row_groups[key] = (size, _shared_images(file, group))
    _row_groups.move_to_end(key)
    return _row_groups[key][1]


def _is_full(sizes: list[int]) -> bool:
    return len(sizes) > 2 * WINDOW_GROUPS or sum(sizes) > 2 * CACHE_BYTES


def _shared_images(file: str, group: int) -> pa.ChunkedArray:
    """Return the images of a row group, mapped from the file that the first process to need them wrote."""
    images = None
    with suppress(OSError):  # of a full disk, or a folder that another run removed: this process reads for itself
        SHARED_FOLDER.mkdir(parents=True, exist_ok=True)
        path = SHARED_FOLDER / f"{hashlib.sha256(f'{_shard_state(file)} {group}'.encode()).hexdigest()}.arrow"
        with WeakFileLock(path.with_suffix(".lock")):
            if not path.is_file():
                images = _read_images(file, group)
                _write_shared(path, images)
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]
    return _read_images(file, group) if images is None else images


def _write_shared(path: Path, images: pa.ChunkedArray) -> None:
    table, unfinished = pa.table({"image": images}), path.with_suffix(f".{os.getpid()}")
    try:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    found = sorted(((file.stat().st_mtime_ns, file) for file in path.parent.glob("*.arrow")), reverse=True)
    sizes = [file.stat().st_size for _, file in found]
    for number, (_, file) in enumerate(found[1:], 2):
        if _is_full(sizes[:number]):
            file.unlink(missing_ok=True)  # who has mapped it keeps it
            file.with_suffix(".lock").unlink(missing_ok=True)


def _read_images(file: str, group: int) -> pa.ChunkedArray:
    gone = as_user_error(f"'{file}' can no longer be read", "continue with --resume_from_checkpoint true")
    with gone, _open_shard(file) as source:
        return pq.ParquetFile(source, metadata=_footer(file)).read_row_group(group, ["image"])["image"]
