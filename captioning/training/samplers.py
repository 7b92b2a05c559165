"""The order in which rows are trained on: the same in one process and in several, and streamed.

Accelerate fills the last global batch of an epoch with rows from the epoch's beginning, which then count twice: the
loss of that step differs from that of one process. Here blank rows fill it, whose tokens are all masked from the loss.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from PIL import Image
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback

from captioning.data.streaming import CACHE_BYTES, WINDOW_GROUPS


# --- Several processes ----------------------------------------------------------------------------------------


class PaddedRows:
    """The N `rows` of a tokenized split; every index from N up is a blank row.

    A blank row has a black image and the tokens `prompt_row`, without a caption, so that all its labels are -100.
    """

    def __init__(self, rows: Dataset, prompt_row: list[int]):
        self.rows = rows
        # An image of the data might be unreadable, or on the Hub
        self.blank = {"image_id": "(blank)", "image": Image.new("L", (64, 64)), "input_ids": prompt_row}

    def __len__(self) -> int:
        """Return N; blank rows are not counted."""
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch, those of the split in one read."""
        real = [index for index in indices if index < len(self.rows)]
        found = iter(self.rows.__getitems__(real) if real else [])
        return [next(found) if index < len(self.rows) else self.blank for index in indices]


class PaddedSampler(Sampler[int]):
    """The indices of another sampler, then those of blank rows up to a whole number of global batches.

    Args:
        sampler: of N rows; a `RandomSampler` gets the order that accelerate gives it in one process.
        num_rows: N, which is also the index of a blank row.
        multiple: rows of a global batch.
        data_seed: the Trainer's; None for torch's.
    """

    def __init__(self, sampler: Sampler[int], num_rows: int, multiple: int, data_seed: int | None = None):
        if isinstance(sampler, RandomSampler):
            sampler = SeedableRandomSampler(sampler.data_source, generator=sampler.generator, data_seed=data_seed)
        self.sampler, self.num_rows, self.multiple = sampler, num_rows, multiple

    def __len__(self) -> int:
        """Return the number of indices, those of blank rows included."""
        return math.ceil(len(self.sampler) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch."""
        yield from self.sampler
        yield from [self.num_rows] * (len(self) - len(self.sampler))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


# --- Streaming ------------------------------------------------------------------------------------------------


class StreamingSampler(Sampler[int]):
    """The rows of a streamed split in a random order that reads each row group once, in one worker of one process.

    Batch j goes to process j mod P, and the i-th batch of a process to its worker i mod W: together to one of P x W
    slots, j mod (P x W). Row groups are shuffled and dealt to the slots. A slot shuffles the rows within windows of as
    many row groups as fit in the memory of a worker. Only a row group on the border of two slots is read by both.

    The order follows from seed and epoch alone, so that a resumed run skips rows without reading them.

    Args:
        rows: a streamed split.
        batch_size: rows of a batch of one process.
        slots: P x W; without workers, W is 1.
        seed: of the order, together with the epoch.
    """

    def __init__(self, rows: Dataset, batch_size: int, slots: int, seed: int):
        self.batch_size, self.slots, self.seed, self.epoch = batch_size, slots, seed, 0
        places = rows.select_columns("image").with_format("arrow")[:]["image"].combine_chunks().flatten()
        shard, group, _, size = (place.to_numpy() for place in places)
        _, first, of_row = np.unique(shard.astype(np.int64) << 32 | group, return_index=True, return_inverse=True)
        self._sizes = size[first]
        self._rows = np.split(np.argsort(of_row, kind="stable"), np.cumsum(np.bincount(of_row))[:-1])

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = -(-len(self) // self.batch_size)
        rows_of_slot = [len(range(slot, batches, self.slots)) * self.batch_size for slot in range(self.slots)]
        rows_of_slot[(batches - 1) % self.slots] -= batches * self.batch_size - len(self)
        borders = np.cumsum(rows_of_slot)[:-1]
        groups = rng.permutation(len(self._rows))
        rows = np.concatenate([self._rows[group] for group in groups])
        group_of_row = np.repeat(groups, [len(self._rows[group]) for group in groups])
        dealt = zip(np.split(rows, borders), np.split(group_of_row, borders), strict=True)
        shuffled = [self._shuffle_windows(rows, groups, rng) for rows, groups in dealt]
        for batch in range(batches):
            start = batch // self.slots * self.batch_size
            yield from shuffled[batch % self.slots][start : start + self.batch_size].tolist()

    def _shuffle_windows(self, rows: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shuffle the rows of a slot within windows of their row groups."""
        borders, num_groups, size = [], 0, 0
        for start in np.flatnonzero(np.diff(groups, prepend=-1)).tolist():
            group_size = int(self._sizes[groups[start]])
            if num_groups == WINDOW_GROUPS or (num_groups and size + group_size > CACHE_BYTES):
                borders.append(start)
                num_groups, size = 0, 0
            num_groups, size = num_groups + 1, size + group_size
        return np.concatenate([rng.permutation(window) for window in np.split(rows, borders)])


class SetEpoch(TrainerCallback):
    """Tell a sampler its epoch: after a resume the Trainer's own call does not get through accelerate's wrappers."""

    def __init__(self, sampler: StreamingSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Choose the order of the epoch that begins, or that the run resumes in."""
        self.sampler.set_epoch(int(state.epoch))
