"""Images that are read when they are needed, from parquet shards in a folder or on the Hub: `--streaming`.

Of each shard the footer and the text columns are read once, into an ordinary `Dataset` that also says where each image
lies. Its column `image` is a `StreamedImage`: whoever asks for the image of a row gets the bytes, and the row group
that holds it is read for that, and kept for the rows that follow; whoever asks for another column reads no image. So
checks, tokens, baselines and the Trainer work as on data that is stored, with a known number of rows.

`StreamingSampler` shuffles so that a row group is read once an epoch, by one worker of one process.
"""

import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Value, load_dataset_builder
from datasets.features.features import register_feature
from huggingface_hub import HfFileSystem

from captioning.errors import UserError, first_line


logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("image_id", "caption", "cui")
HUB = "hf://"
READERS = 8  # shards whose texts are read at once: a read from the Hub is mostly waiting
CACHE_BYTES = 256 * 2**20  # images that a process keeps; a single row group that is larger is kept alone
WINDOW_GROUPS = 8  # row groups whose rows are mixed; on the Hub one holds 100 rows of ROCOv2
MAX_UNPACKED = 100  # times the size in a shard; images are compressed themselves, a bomb is far denser
SMALL_SHARD = 2**30  # bytes; what unpacks to no more may be as dense as it likes
STORED = "{} is no parquet, and only parquet is streamed; leave --streaming out: it needs no more memory"


# --- Index ----------------------------------------------------------------------------------------------------


def hub_shards(name: str, revision: str | None) -> dict[str, list[str]]:
    """Return by split the addresses `hf://datasets/<id>@<commit>/<path>` of a Hub dataset's parquet files.

    Raises:
        UserError: the dataset is stored otherwise.
    """
    builder = load_dataset_builder(name, revision=revision)  # knows where a repository may keep which split
    files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    if not files or not all(
        path.startswith(HUB) and path.endswith(".parquet") for paths in files.values() for path in paths
    ):
        raise UserError(STORED.format(f"dataset '{name}'"))
    return files


def index_shards(shards: dict[str, list[str]]) -> DatasetDict:
    """Return the rows of parquet shards: their texts, and an `image` that is read when it is asked for.

    The index, some hundred bytes a row, is stored in the cache of `datasets`: it is memory-mapped, and the other
    processes of a run, and the next run, find it there.

    Args:
        shards: by split, paths or addresses `hf://...`, which are read by byte ranges.

    Raises:
        UserError: a shard's column `image` holds no images.
    """
    splits = {}
    for split, files in shards.items():
        schema = _footer(files[0]).schema.to_arrow_schema()
        _refuse_other_images(schema, files[0])
        features = Features.from_arrow_schema(schema)
        features = Features({column: features[column] for column in TEXT_COLUMNS if column in features})
        if "image" in schema.names:
            features["image"] = {name: Value(str(kind.type)) for name, kind in _fields(StreamedImage.pa_type)}
        state = [_state(file) for file in files]
        rows = Dataset.from_generator(
            _index_rows, features=features, gen_kwargs={"files": tuple(files), "state": tuple(state)}, split=split
        )
        splits[split] = rows.cast_column("image", StreamedImage(list(files))) if "image" in schema.names else rows
    return DatasetDict(splits)


def is_streamed(rows: Any) -> bool:
    """Tell whether the images of a split are read when they are needed."""
    return isinstance(rows, Dataset) and isinstance(rows.features.get("image"), StreamedImage)


def _fields(struct: pa.StructType) -> list[tuple[str, pa.Field]]:
    return [(item.name, item) for item in struct]


def _refuse_other_images(schema: pa.Schema, file: str) -> None:
    if "image" not in schema.names:
        return  # said by the check of the columns
    kind = schema.field("image").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and not (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    ):
        raise UserError(f"'{file}': column 'image' holds no images but {kind}")


def _state(file: str) -> str:
    """Return what changes when a shard does; the address of one on the Hub holds its commit."""
    if file.startswith(HUB):
        return file
    status = os.stat(file)
    return f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}"


def _index_rows(files: tuple[str, ...], state: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    largest = 0
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), READERS):  # no more of them in memory
            for shard, read in enumerate(pool.map(_read_index, files[start : start + READERS]), start):
                for group, (size, texts) in enumerate(read):
                    largest = max(largest, size)
                    for row, text in enumerate(texts.to_pylist()):
                        place = {"shard": shard, "row_group": group, "row": row, "group_bytes": size}
                        yield text | {"image": place} if size else text
    if largest > CACHE_BYTES:
        logger.warning(
            "%s: a row group holds %d MB of images, and each worker keeps one in memory; shards with row groups of "
            "100 rows or so need less",
            files[0],
            largest / 1e6,
        )


def refuse_bomb(file: str, footer: pq.FileMetaData) -> None:
    """Raise UserError on a parquet file that says it unpacks to far more than its size."""
    columns = [
        footer.row_group(group).column(column)
        for group in range(footer.num_row_groups)
        for column in range(footer.num_columns)
    ]
    packed, unpacked = (
        sum(getattr(column, f"total_{size}_size") for column in columns) for size in ("compressed", "uncompressed")
    )
    if unpacked > max(MAX_UNPACKED * packed, SMALL_SHARD):
        raise UserError(f"'{file}': {packed:,} bytes unpack to {unpacked:,}, which no images do; take it away")


def _read_index(file: str) -> list[tuple[int, pa.Table]]:
    """Return for each row group of a shard the bytes of its images, and its texts."""
    footer = _footer(file)
    refuse_bomb(file, footer)
    columns = [name for name in footer.schema.to_arrow_schema().names if name in TEXT_COLUMNS]
    with _open(file) as source:
        reader = pq.ParquetFile(source, metadata=footer, pre_buffer=True)  # joins the ranges of neighboring columns
        return [(_image_bytes(footer, i), reader.read_row_group(i, columns)) for i in range(footer.num_row_groups)]


def _image_bytes(footer: pq.FileMetaData, group: int) -> int:
    columns = (footer.row_group(group).column(i) for i in range(footer.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == "image")


@lru_cache(maxsize=1024)
def _footer(file: str) -> pq.FileMetaData:
    with _open(file) as source:
        return pq.read_metadata(source)


def _open(file: str) -> Any:
    """Open a shard anew: a handle or a connection that is shared with a forked worker would mix up their reads."""
    if file.startswith(HUB):
        # Each read is one request for its range: a cache would ask for more than is read
        return HfFileSystem().open(file, "rb", cache_type="none")
    return open(file, "rb")


# --- Images ---------------------------------------------------------------------------------------------------


@dataclass
class StreamedImage:
    """A feature of `datasets`: stored is where an image lies, what is read is `{"bytes": ..., "path": ...}`.

    That is what `datasets.Image(decode=False)` yields.

    Args:
        shards: paths or addresses `hf://...` of the parquet files that the stored numbers count.
    """

    shards: list[str]
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "dict"
    pa_type: ClassVar[pa.StructType] = pa.struct(
        {"shard": pa.int32(), "row_group": pa.int32(), "row": pa.int32(), "group_bytes": pa.int64()}
    )
    _type: str = field(default="StreamedImage", init=False, repr=False)

    def __call__(self) -> pa.StructType:
        """Return the type that is stored."""
        return self.pa_type

    def cast_storage(self, storage: pa.StructArray) -> pa.StructArray:
        """Return the stored places as they are."""
        return storage.cast(self.pa_type)

    def decode_example(self, value: dict[str, int], token_per_repo_id: dict | None = None) -> dict[str, Any]:
        """Read the image that lies at a stored place.

        Raises:
            UserError: the shard cannot be read; that is no fault of the image, and ends a run.
        """
        images = ROW_GROUPS.read(self.shards[value["shard"]], value["row_group"], value["group_bytes"])
        image = images[value["row"]].as_py()
        # Without the path that a table may name: it would be one of this machine
        return {"bytes": image["bytes"] if isinstance(image, dict) else image, "path": None}


with warnings.catch_warnings(action="ignore"):  # that it is experimental: requirements.txt pins the library
    register_feature(StreamedImage, "StreamedImage")


class RowGroups:
    """The images of the row groups that were read last: a window, `WINDOW_GROUPS` and `CACHE_BYTES` at most.

    Sizes are those of the parquet footers, by which `StreamingSampler` measures a window, too.

    Attributes:
        reads: how many row groups this process has read.
    """

    def __init__(self):
        self._groups: OrderedDict[tuple[str, int], tuple[int, pa.ChunkedArray]] = OrderedDict()
        self.reads = 0

    def read(self, file: str, group: int, size: int) -> pa.ChunkedArray:
        """Return the column `image` of a row group, whose images take `size` bytes."""
        key = (file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key][1]
        while self._groups and (
            len(self._groups) == WINDOW_GROUPS or size + sum(held for held, _ in self._groups.values()) > CACHE_BYTES
        ):
            self._groups.popitem(last=False)
        self._groups[key] = (size, _read_images(file, group))
        self.reads += 1
        return self._groups[key][1]


ROW_GROUPS = RowGroups()


def _read_images(file: str, group: int) -> pa.ChunkedArray:
    try:
        with _open(file) as source:
            return pq.ParquetFile(source, metadata=_footer(file)).read_row_group(group, ["image"])["image"]
    except Exception as error:  # of pyarrow, the operating system, the Hub's client
        raise UserError(
            f"'{file}' can no longer be read: {first_line(error)}; go on by --resume_from_checkpoint true"
        ) from error
